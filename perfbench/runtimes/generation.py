"""What goes into a generation and what comes out, and the two observers that Hugging Face's `generate()` takes."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch.nn.functional import pad
from transformers.generation import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

# Stands after the end of a request.
PAD = 0


@dataclass(frozen=True)
class Batch:
    """One batch of Q requests, each of its own tenant.

    input_ids, attention_mask: int64 [Q, S] on the device, padded on the left; slots: the bank slot of each request,
    -1 for the bare backbone; rows of the model are Q x beams. eos: the tokens that end a request; none in latency
    work, where every request makes exactly new_tokens. follow_up: int64 [Q, F], what each request says next, once it
    has its new tokens; None where the conversation ends there. shared_tokens: so many of each prompt's first tokens are
    the same for all requests, and none of them is padded. drawn: whether the prompts are drawn by lot; kept: of each
    request the places [first, end) of its prompt that stay when others are drawn; acts_from: of each request the first
    place on whose token its adapter acts, once an arm has looked (`shared_context.invoked`).
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    slots: tuple[int, ...]
    beams: int
    new_tokens: int
    eos: tuple[int, ...] = ()
    follow_up: torch.Tensor | None = None
    shared_tokens: int = 0
    drawn: bool = False
    kept: tuple[tuple[int, int], ...] = ()
    acts_from: tuple[int, ...] = ()

    def conversation(self, generated: torch.Tensor) -> Batch:
        """The second turn as a batch that reads all from the start: prompt, `generated` int64 [Q, N], follow-up."""
        assert self.follow_up is not None
        new = torch.cat([generated, self.follow_up], dim=1)
        return replace(
            self,
            input_ids=torch.cat([self.input_ids, new], dim=1),
            attention_mask=torch.cat([self.attention_mask, torch.ones_like(new)], dim=1),
            follow_up=None,
        )

    def alone(self, request: int) -> Batch:
        """That request as a batch of its own, without the padding it had in company."""
        length = int(self.attention_mask[request].sum())
        return replace(
            self,
            input_ids=self.input_ids[request : request + 1, -length:],
            attention_mask=self.attention_mask[request : request + 1, -length:],
            slots=(self.slots[request],),
            follow_up=None,
            kept=(),
        )


@dataclass(frozen=True)
class Generation:
    """tokens: int64 [Q, N], the best beam's, PAD after one of batch.eos; logits: fp32 [Q, N, V],
    where they were asked for, of the first beam."""

    tokens: torch.Tensor
    logits: torch.Tensor | None


def end(tokens: torch.Tensor, eos: tuple[int, ...]) -> torch.Tensor:
    """int64 [Q, N] with PAD in place of everything that follows a row's first token of `eos`."""
    ends = torch.isin(tokens, torch.tensor(eos, device=tokens.device))
    over = ends.cumsum(dim=1) - ends.long() > 0
    return tokens.masked_fill(over, PAD)


class Arm(Protocol):
    """One method with its tenants, resident on the device and ready to generate."""

    model: Any

    def generate(
        self,
        batch: Batch,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """Generates batch.new_tokens tokens for each request; the rest as `generate` below."""

    def tensors(self) -> list[torch.Tensor]:
        """What the arm holds on the device beside the model."""

    def close(self) -> None:
        """Gives back what the arm holds beside the backbone's weights."""


class StepClock(StoppingCriteria):
    """Notes the instant at which each step's token was chosen, and stops nothing.

    On CUDA an event is recorded in the stream, so that nothing waits; elsewhere the host's clock is read.
    """

    def __init__(self, device: torch.device):
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._never: torch.Tensor | None = None

    def mark(self) -> None:
        """Notes now."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.mark()
        if self._never is None or self._never.shape[0] != input_ids.shape[0]:
            self._never = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
        return self._never

    def elapsed_ms(self) -> list[float]:
        """Milliseconds from the first mark to each later one; waits for the device."""
        first = self._marks[0]
        if self._cuda:
            torch.cuda.synchronize()
            return [first.elapsed_time(mark) for mark in self._marks[1:]]
        return [(mark - first) * 1e3 for mark in self._marks[1:]]


class ForcedTokens(LogitsProcessor):
    """Teacher forcing inside `generate()`: step n chooses tokens[:, n] (int64 [Q, N]), whatever the logits say."""

    def __init__(self, tokens: torch.Tensor, beams: int):
        self._tokens = tokens.repeat_interleave(beams, dim=0)
        self._step = 0

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        # Finite, so that beam search's sums stay finite; the first beam alone carries the forced tokens.
        forced = torch.full_like(scores, -1e4)
        forced.scatter_(1, self._tokens[:, self._step : self._step + 1], 0.0)
        self._step += 1
        return forced


def generate(
    model: Any,
    batch: Batch,
    *,
    clock: StoppingCriteria | None = None,
    forced: torch.Tensor | None = None,
    with_logits: bool = False,
    **model_kwargs: Any,
) -> Generation:
    """`model.generate()` on a batch: greedy for one beam, else beam search.

    clock: sees every step; forced: int64 [Q, N] tokens to choose instead; with_logits: keep each step's raw logits.
    """
    with torch.inference_mode():
        out = model.generate(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            num_beams=batch.beams,
            max_new_tokens=batch.new_tokens,
            min_new_tokens=None if batch.eos else batch.new_tokens,
            eos_token_id=list(batch.eos) or None,
            pad_token_id=PAD,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([] if clock is None else [clock]),
            logits_processor=LogitsProcessorList([] if forced is None else [ForcedTokens(forced, batch.beams)]),
            return_dict_in_generate=True,
            output_logits=with_logits,
            **model_kwargs,
        )
    tokens = out.sequences[:, batch.input_ids.shape[1] :]
    if batch.eos:
        tokens = end(pad(tokens, (0, batch.new_tokens - tokens.shape[1]), value=PAD), batch.eos)
    elif tokens.shape[1] != batch.new_tokens:
        raise RuntimeError(f"expected {batch.new_tokens} new tokens, got {tokens.shape[1]}")
    logits = torch.stack(out.logits, dim=1)[:: batch.beams].float() if with_logits else None
    return Generation(tokens, logits)

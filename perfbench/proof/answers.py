"""The oracle's answers, kept: arms that serve the same adapters by other runtimes, other kernels or PEFT ask the same
questions, and an answer follows from backbone, adapter and tokens alone, never from the arm."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import torch

from perfbench.proof import oracle
from perfbench.proof.oracle import Served
from perfbench.runtimes.backbone import Backbone

MOST_BYTES = 2**30


@dataclass
class Kept:
    """Answers by question, the oldest of them forgotten where they would take more than `most_bytes`."""

    most_bytes: int = MOST_BYTES
    held_bytes: int = 0
    answers: OrderedDict[Hashable, torch.Tensor] = field(default_factory=OrderedDict)

    def put(self, question: Hashable, answer: torch.Tensor) -> None:
        """Keeps one more, on the host; what is kept already stays as it is."""
        if question in self.answers:
            return
        self.answers[question] = answer.cpu()
        self.held_bytes += answer.nbytes
        while self.held_bytes > self.most_bytes and self.answers:
            self.held_bytes -= self.answers.popitem(last=False)[1].nbytes

    def get(self, question: Hashable, device: torch.device) -> torch.Tensor | None:
        """The answer on `device`, or None where it is not known."""
        found = self.answers.get(question)
        return None if found is None else found.to(device)


@dataclass(frozen=True)
class Oracle:
    """Asks `perfbench.proof.oracle` about one backbone and one set of adapters, and never twice the same.

    `adapters` says which they are: with the same `kept`, equal words stand for equal adapters in equal slots.
    """

    backbone: Backbone
    adapters: Hashable = None
    kept: Kept = field(default_factory=Kept)

    def logits(self, asked: Sequence[Served], dtype: torch.dtype) -> list[torch.Tensor]:
        """As `oracle.logits`."""
        questions = [self._question(one, dtype) for one in asked]
        found = [self.kept.get(question, self.backbone.device) for question in questions]
        missing = [i for i, answer in enumerate(found) if answer is None]
        if missing:
            for i, answer in zip(
                missing, oracle.logits(self.backbone, [asked[i] for i in missing], dtype), strict=True
            ):
                self.kept.put(questions[i], answer)
                found[i] = answer
        return [answer for answer in found if answer is not None]

    def beam_search(self, asked: Served, beams: int, new_tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """As `oracle.beam_search`, for the prompt and the adapter of `asked`."""
        question = (self.adapters, asked.slot, asked.shared_tokens, _words(asked.prompt), beams, new_tokens, dtype)
        found = self.kept.get(question, self.backbone.device)
        if found is None:
            found = oracle.beam_search(
                self.backbone, asked.prompt, asked.plan, beams, new_tokens, dtype, asked.shared_tokens
            )
            self.kept.put(question, found)
        return found

    def _question(self, asked: Served, dtype: torch.dtype) -> Hashable:
        return (self.adapters, asked.slot, asked.shared_tokens, _words(asked.prompt), _words(asked.chosen), dtype)


def _words(tokens: torch.Tensor) -> tuple[int, ...]:
    return tuple(tokens.tolist())

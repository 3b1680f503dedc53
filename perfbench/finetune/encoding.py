"""Examples as token ids, with the loss on the answer only, and the batches that training sees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.errors import TaskError
from perfbench.finetune.choices import check_length, encode_answer, encode_choices
from perfbench.finetune.tasks.task import Example, Task

IGNORED = -100  # what torch's cross-entropy skips


@dataclass(frozen=True)
class Encoded:
    """One example as one sequence: `ids` are the prompt's tokens, then the answer's; `prompt_tokens` counts the
    first."""

    ids: tuple[int, ...]
    prompt_tokens: int


def encode(example: Example, tokenizer: Any, *, end: bool) -> Encoded:
    """The tokens of prompt and answer (see `encode_answer`); with `end`, the end-of-sequence token after them.

    TaskError, with the record, for a prompt or an answer without a token.
    """
    prompt, answer = encode_answer(tokenizer, example.prompt, example.answer)
    for what, tokens in (("prompt", prompt), ("answer", answer)):
        if not tokens:
            raise TaskError(f"{place_of(example)}: expected {what} of at least one token, got none; mend the record")
    if end:
        if tokenizer.eos_token_id is None:
            raise TaskError("the tokenizer has no end-of-sequence token, which generated answers end in; set eos_token")
        answer = [*answer, tokenizer.eos_token_id]
    return Encoded((*prompt, *answer), len(prompt))


def encode_split(
    examples: Sequence[Example],
    tokenizer: Any,
    *,
    end: bool,
    max_tokens: int,
    leave_out: bool = False,
    invocation: Sequence[int] = (),
) -> tuple[list[Encoded], int]:
    """Every example of a split that fits `max_tokens`, and how many were left out because they do not.

    TaskError, with the record, for the first that does not fit, unless `leave_out`; and where none is left; and for one
    that the tokens of `invocation` do not invoke at the end of the prompt or before: PEFT would train nothing on it, or
    from another place on than it is served.
    """
    kept: list[Encoded] = []
    for example in examples:
        encoded = encode(example, tokenizer, end=end)
        if invocation and not _is_invoked(encoded, tuple(invocation)):
            raise TaskError(
                f"{place_of(example)}: expected the tokens {list(invocation)}, which invoke the adapter, in the prompt "
                f"and not in the answer; mend the record, or the method's invocation"
            )
        if len(encoded.ids) <= max_tokens:
            kept.append(encoded)
        elif not leave_out:
            answer = len(encoded.ids) - encoded.prompt_tokens
            raise TaskError(
                f"{place_of(example)}: expected at most max_tokens {max_tokens}, got {encoded.prompt_tokens} of the "
                f"prompt + {answer} of the answer; raise max_tokens, or set too_long to leave-out"
            )
    if examples and not kept:
        raise TaskError(f"{place_of(examples[0])}: none of {len(examples)} examples fits max_tokens {max_tokens}")
    return kept, len(examples) - len(kept)


def _is_invoked(encoded: Encoded, tokens: tuple[int, ...]) -> bool:
    ends = [end for end in range(len(tokens), len(encoded.ids) + 1) if encoded.ids[end - len(tokens) : end] == tokens]
    return bool(ends) and ends[-1] <= encoded.prompt_tokens


def fits(task: Task, example: Example, tokenizer: Any, context: int, leave_out: bool) -> bool:
    """Whether `example` and what is predicted on it fit the backbone's `context`; TaskError unless `leave_out`."""
    if task.kind == "choose":
        longest = max(len(prompt) + len(choice) for prompt, choice in encode_choices(tokenizer, example))
    else:
        longest = len(tokenizer(example.prompt)["input_ids"]) + task.new_tokens
    if not leave_out:
        check_length(place_of(example), longest, context)
    return longest <= context


def place_of(example: Example) -> str:
    """Where a message says that `example` is."""
    return example.where or example.id


@dataclass(frozen=True)
class Collator:
    """Pads on the right to the longest of a batch: input_ids, attention_mask, labels [B, S], and nothing else."""

    pad_id: int

    def __call__(self, batch: Iterable[Encoded]) -> dict[str, torch.Tensor]:
        rows = list(batch)
        longest = max(len(row.ids) for row in rows)
        ids = torch.full((len(rows), longest), self.pad_id)
        mask = torch.zeros((len(rows), longest), dtype=torch.long)
        labels = torch.full((len(rows), longest), IGNORED)
        for index, row in enumerate(rows):
            tokens, length = torch.tensor(row.ids), len(row.ids)
            ids[index, :length] = tokens
            mask[index, :length] = 1
            labels[index, row.prompt_tokens : length] = tokens[row.prompt_tokens :]
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def answers_only(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The batch with what lets a model of transformers make logits [B, places, V] of no other places than those before
    a token that counts: the same loss, without a vocabulary's worth of sums at every other place.

    Not for PEFT's soft prompts, which move the places.
    """
    following = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED)
    places = (following != IGNORED).any(dim=0).nonzero().flatten()
    return {**batch, "logits_to_keep": places, "shift_labels": following[:, places]}

"""From text to token ids and back, and which choice wins: plain functions that predictions as trained (predict.py)
and predictions through the serving path share, so that they can differ in the model's arithmetic alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.errors import TaskError
from perfbench.finetune.tasks.task import Example


def encode_answer(tokenizer: Any, prompt: str, answer: str) -> tuple[list[int], list[int]]:
    """(the prompt's tokens, the answer's): the answer's are those that it has in its place after the prompt, where
    the prompt's own stay as they are; else those that it has alone. No end-of-sequence token."""
    before = tokenizer(prompt)["input_ids"]
    whole = tokenizer(prompt + answer)["input_ids"]
    if whole[: len(before)] == before:
        return before, whole[len(before) :]
    return before, tokenizer(answer, add_special_tokens=False)["input_ids"]


def encode_choices(tokenizer: Any, example: Example) -> list[tuple[list[int], list[int]]]:
    """(the prompt's tokens, the choice's) of each choice; TaskError for a choice without a token."""
    rows = [encode_answer(tokenizer, example.prompt, choice) for choice in example.choices]
    for choice, (_, tokens) in zip(example.choices, rows, strict=True):
        if not tokens:
            raise TaskError(f"{example.where}: the choice {choice!r} has no token; give it a text")
    return rows


@dataclass(frozen=True)
class Scored:
    """What is read at once: a prompt and the first of `choices`; the others, where there are any, are of one token each
    and are scored by the same logits."""

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens that are read."""
        return len(self.prompt) + len(self.choices[0])


def read_together(rows: Sequence[tuple[list[int], list[int]]]) -> list[Scored]:
    """The (prompt, choice) of one example as they are read: each alone, or at once where each is a single token."""
    if all(len(choice) == 1 and prompt == rows[0][0] for prompt, choice in rows):
        return [Scored(tuple(rows[0][0]), tuple(tuple(choice) for _, choice in rows))]
    return [Scored(tuple(prompt), (tuple(choice),)) for prompt, choice in rows]


def scores_of(choices: Sequence[Sequence[int]], log_probabilities: torch.Tensor) -> list[float]:
    """Each choice's sum of log-probabilities of its tokens, of [N, V] at the places where those of the first stand."""
    chosen = [log_probabilities[range(len(tokens)), list(tokens)] for tokens in choices]
    return [float(values.sum()) for values in chosen]


def choose(scores: Sequence[float]) -> int:
    """The place of the highest score (a choice's sum of log-probabilities); the first of equal ones."""
    return max(range(len(scores)), key=lambda index: (scores[index], -index))


def cut(text: str, stop: Sequence[str]) -> str:
    """The text up to the first of the stop strings."""
    return text[: min((at for at in map(text.find, stop) if at >= 0), default=len(text))]


def decode(tokenizer: Any, tokens: Sequence[int], stop: Sequence[str]) -> str:
    """The text of new tokens up to the end-of-sequence token, cut at the first of the stop strings."""
    tokens = list(tokens)
    if tokenizer.eos_token_id in tokens:
        tokens = tokens[: tokens.index(tokenizer.eos_token_id)]
    text = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return cut(text, stop)


def check_length(example_where: str, tokens: int, limit: int | None) -> None:
    """TaskError where a sequence of `tokens`, new ones included, exceeds the `limit` of the backbone's positions."""
    if limit is not None and tokens > limit:
        raise TaskError(
            f"{example_where}: prompt and answer may take {tokens} tokens, more than the backbone's {limit} positions; "
            "leave this record out, ask for fewer new tokens, or take another backbone"
        )

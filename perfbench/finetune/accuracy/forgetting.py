"""What training on one task costs elsewhere: the loss of the answers of another task, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from perfbench.errors import FinetuneError
from perfbench.finetune.choices import encode_answer
from perfbench.finetune.finetune_config import TaskSource
from perfbench.finetune.predict import choice_scores
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.finetune.tasks.task import Example


@dataclass(frozen=True)
class Elsewhere:
    """`examples`, each of which has its answer as its only choice, and how many `tokens` the answers have in all."""

    examples: Sequence[Example]
    tokens: int


def read(source: TaskSource, tokenizer: Any, max_tokens: int) -> Elsewhere:
    """At most `train_examples` of the training split, those that fit `max_tokens` with their answers. TaskError as the
    task has it, FinetuneError where none fits."""
    examples: list[Example] = []
    tokens = 0
    for example in load_splits(find(source.name), source.source, ("train",))["train"]:
        prompt, answer = encode_answer(tokenizer, example.prompt, example.answer)
        if answer and len(prompt) + len(answer) <= max_tokens and len(examples) < (source.train_examples or 0):
            examples.append(replace(example, choices=(example.answer,)))
            tokens += len(answer)
    if not examples:
        raise FinetuneError(f"forgetting: no example of {source.name} fits max_tokens {max_tokens}; raise it")
    return Elsewhere(examples, tokens)


def loss(model: Any, tokenizer: Any, elsewhere: Elsewhere, batch: int) -> float:
    """The mean negative log-probability of a token of the answers, natural logarithm."""
    scores = choice_scores(model, tokenizer, elsewhere.examples, batch=batch)
    return -sum(score for (score,) in scores) / elsewhere.tokens

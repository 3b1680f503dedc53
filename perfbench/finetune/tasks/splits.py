"""Cutting a dev set out of train, halving a validation set, taking a few; and refusing a set that leaks into train.

All is decided by hashes of the text, so it is the same on every machine and whatever the order of the file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from perfbench.errors import TaskError
from perfbench.finetune.tasks.task import Example

Item = TypeVar("Item")


def fingerprint(text: str) -> str:
    """SHA-256 of the text without regard to case and blanks: two prompts that differ in those alone are one."""
    return hashlib.sha256(" ".join(text.casefold().split()).encode()).hexdigest()


def hold_out(
    examples: Sequence[Example], count: int, group: Callable[[Example], str] = lambda example: example.prompt
) -> tuple[list[Example], list[Example]]:
    """(train, dev): dev has `count` examples, or the few more that complete its last group.

    Examples of one group (by default: of one prompt) stay on one side. Groups are taken in the order of their hashes.
    """
    hashes = [fingerprint(group(example)) for example in examples]
    sizes: dict[str, int] = {}
    for found in hashes:
        sizes[found] = sizes.get(found, 0) + 1
    taken: set[str] = set()
    total = 0
    for found in sorted(sizes):
        if total >= count:
            break
        taken.add(found)
        total += sizes[found]
    train = [example for example, found in zip(examples, hashes, strict=True) if found not in taken]
    dev = [example for example, found in zip(examples, hashes, strict=True) if found in taken]
    return train, dev


def halve(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """(dev, test): the first, third, fifth... and the others."""
    return list(items[0::2]), list(items[1::2])


def take(examples: Sequence[Example], count: int) -> list[Example]:
    """`count` of the examples, those whose ids have the lowest hashes, in the order they had."""
    chosen = set(sorted(range(len(examples)), key=lambda index: fingerprint(examples[index].id))[:count])
    return [example for index, example in enumerate(examples) if index in chosen]


def refuse_leak(train: Sequence[Example], others: Mapping[str, Sequence[Example]]) -> None:
    """TaskError where a prompt of `others` (split -> examples) is in train too; it names both records."""
    known = {fingerprint(example.prompt): example.where for example in train}
    for split, examples in others.items():
        for example in examples:
            at = known.get(fingerprint(example.prompt))
            if at is not None:
                raise TaskError(
                    f"{example.where}: this prompt of {split} is in train too, at {at}: a score on it says nothing; "
                    "take it out of one of them"
                )

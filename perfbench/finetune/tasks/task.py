"""What a task is: examples of a split, how a prediction is made, and the metric that judges it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = ("train", "dev", "test")


@dataclass(frozen=True)
class Example:
    """One item of a set.

    id: stable over runs, unique in its task; prompt: all that stands before the answer; answer: what the loss is
    on; references: what the metric compares with (the answer alone, where there is one); choices: of a
    multiple-choice item, one of which is the answer; where: `file:record`, for messages; extra: what else the
    metric needs, such as the path of a database.
    """

    id: str
    prompt: str
    answer: str
    references: tuple[str, ...]
    choices: tuple[str, ...] = ()
    where: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One line of `registry.TASKS`.

    kind: `generate` (the prediction is the text of the new tokens) or `choose` (each choice is scored by the sum of
    the log-probabilities of its tokens, the highest wins). load(source, split): `source` is a folder in the set's
    original format or a hub id; TaskError names the file and the record. metric: a name in `metrics.METRICS`;
    new_tokens: most that an answer may take; stop: strings at which a generated answer ends.
    """

    name: str
    summary: str
    kind: Literal["generate", "choose"]
    metric: str
    load: Callable[[str, Split], list[Example]]
    new_tokens: int = 0
    stop: tuple[str, ...] = ()

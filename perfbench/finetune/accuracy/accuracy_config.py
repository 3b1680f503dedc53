"""The YAML of `perfbench accuracy`: methods x tasks x seeds, how they are trained, and how they are served. Strict.

    config = load("scenarios/accuracy/cpu.yaml", ["seeds=[0]"])

All fields of a fine-tuning file (perfbench.finetune.finetune_config) but `method` and `task` are there, for all alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perfbench.errors import nearest
from perfbench.files.yaml_source import Place, Source
from perfbench.finetune import finetune_config
from perfbench.finetune.finetune_config import (
    DTYPES,
    FinetuneConfig,
    Given,
    TaskSource,
    check,
    rate_of,
    read_source,
    refuse,
)
from perfbench.spec.scenario_schema import KERNELS, problems

# Runtimes that stop where an answer ends. `continuous` does too, under traffic; its arithmetic is that of `static`.
ANSWERING = ("transformers", "static")

# In the place of a method: the bare backbone's answers.
ZERO_SHOT = "zero-shot"

_LABEL = {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", "title": "a short name"}


def _several(names: Sequence[str], title: str) -> dict[str, Any]:
    one = {"type": "string", "enum": list(names), "title": title}
    return {"type": "array", "items": one, "minItems": 1, "uniqueItems": True}


# What an accuracy file has beside the fields of a fine-tuning file, which that file's own schema checks.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "methods": {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {"type": "string", "minLength": 1},
                    {"type": "object", "minProperties": 1, "maxProperties": 1, "title": "method"},
                ]
            },
        },
        "tasks": {"type": "array", "minItems": 1, "items": {"type": "object", "title": "task"}},
        "reference": {"type": "string", "minLength": 1},
        "learning_rates": {
            "type": "array",
            "items": {"type": ["number", "string"], "exclusiveMinimum": 0},
            "minItems": 2,
            "uniqueItems": True,
        },
        "forgetting": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1},
                "source": {"type": "string", "minLength": 1},
                "examples": {"type": "integer", "minimum": 1},
            },
            "required": ["name", "examples"],
            "additionalProperties": False,
        },
        "margin": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "serve": {
            "type": "object",
            "properties": {
                "runtimes": _several(list(ANSWERING), "runtime"),
                "kernels": _several(list(KERNELS), "kernels"),
                "dtypes": _several(DTYPES, "dtype"),
                "requests": {"type": "integer", "minimum": 2},
            },
            "additionalProperties": False,
        },
        **{name: {} for name in finetune_config.SCHEMA["properties"] if name not in ("method", "task", "backbone")},
        "backbone": finetune_config.SCHEMA["properties"]["backbone"],
    },
    "required": ["backbone", "methods", "tasks", "margin"],
    "additionalProperties": False,
}
# What one method alone may be trained with; the rest is that of all, for they are served and compared together. Values
# are checked with the fine-tuning.
_ALONE = (
    "learning_rate", "learning_rates", "warmup_share", "epochs", "batch", "accumulate", "evaluate_every", "patience",
    "max_tokens", "too_long",
)  # fmt: skip
_TRAIN: dict[str, Any] = {
    "type": "object",
    "properties": {name: {} for name in _ALONE},
    "additionalProperties": False,
}
_RATES = {"learning_rate", "learning_rates"}
_OWN = ("methods", "tasks", "reference", "margin", "serve", "forgetting")


@dataclass(frozen=True)
class Serving:
    """How the adapters are served: on each runtime, with each kernel set and in each dtype that the machine has;
    `requests`: prompts of one mixed batch."""

    runtimes: tuple[str, ...] = ANSWERING
    kernels: tuple[str, ...] = ("eager", "triton")
    dtypes: tuple[str, ...] = DTYPES
    requests: int = 16


@dataclass(frozen=True)
class Entry:
    """One method on one task, under the labels that name them in tables and folders. learning_rates: those that are
    tried with the first seed, of which the one with the lowest dev loss trains the others; none: that of `config`."""

    method: str
    task: str
    config: FinetuneConfig
    learning_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class AccuracyConfig:
    """All of a verdict. `reference`: the method that the others must not be worse than by more than `margin`, a
    difference of scores in [0, 1]. `forgetting`: another task, on whose `train_examples` the loss of the answers is
    measured before and after."""

    name: str
    question: str
    entries: tuple[Entry, ...]
    reference: str
    margin: float
    serving: Serving
    forgetting: TaskSource | None
    values: dict[str, Any] = field(repr=False)  # as resolved, for accuracy.json

    @property
    def methods(self) -> tuple[str, ...]:
        """Labels, in the order of the file."""
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Labels, in the order of the file."""
        return tuple(dict.fromkeys(entry.task for entry in self.entries))

    @property
    def common(self) -> FinetuneConfig:
        """Any of the fine-tunings: backbone, dtype, device, seeds and beams are those of all."""
        return self.entries[0].config


def load(given: Given, settings: Sequence[str] = ()) -> AccuracyConfig:
    """The file `given`, or such values, with every `KEY=VALUE` of `settings` laid over it. FinetuneError in
    one line, with the file and the line, for what can't be used, and TaskError or AdapterError of what is
    looked up for it."""
    source, path = read_source(given, settings, "an accuracy file")
    check(source, SCHEMA)
    return _build(source, path)


def _build(source: Source, path: Path) -> AccuracyConfig:
    values = source.values
    entries = []
    methods = [_labelled(source, "methods", index) for index in range(len(values["methods"]))]
    tasks = [_labelled(source, "tasks", index) for index in range(len(values["tasks"]))]
    for what, labels in (("methods", methods), ("tasks", tasks)):
        for index, label in enumerate(labels):
            if label in labels[:index]:
                refuse(
                    source,
                    f"the label {label!r} is that of {what}.{labels.index(label)} already; add a label",
                    what,
                    index,
                )
    for t, task in enumerate(tasks):
        for m, method in enumerate(methods):
            entries.append(_entry(method, task, _one(source, m, t), path))
    reference = values.get("reference", "lora")
    if reference not in methods:
        refuse(
            source,
            f"expected one of the methods as the reference, got {reference!r}; {nearest(reference, methods)}",
            "reference",
        )
    serving: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in values.get("serve", {}).items()
    }
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-_") or "accuracy"
    return AccuracyConfig(
        name=values.get("name", stem),
        question=values.get("question", ""),
        entries=tuple(entries),
        reference=reference,
        margin=float(values["margin"]),
        serving=Serving(**serving),
        forgetting=_forgetting(source, entries, path),
        values=copy.deepcopy(values),
    )


def _entry(method: str, task: str, source: Source, path: Path) -> Entry:
    """One fine-tuning; its first seed may try several learning rates."""
    given = source.values.pop("learning_rates", [])
    if given and "learning_rate" in source.values:
        refuse(source, "expected learning_rate or learning_rates, got both; remove one", "learning_rates")
    rates = tuple(rate_of(value) for value in given)
    for place, rate in enumerate(rates):
        if not isinstance(rate, float) or rate <= 0:
            refuse(source, f"expected a number > 0, got {given[place]!r}", "learning_rates", place)
    if rates:
        source.values["learning_rate"] = rates[0]
    return Entry(method, task, finetune_config.from_source(source, path), rates)


def _forgetting(source: Source, entries: Sequence[Entry], path: Path) -> TaskSource | None:
    """The task of `forgetting`. FinetuneError where it is unknown, or one that is trained."""
    given = source.values.get("forgetting")
    if given is None:
        return None
    found = finetune_config.task_source(
        source, {"name": given["name"], "source": given.get("source", ""), "train_examples": given["examples"]},
        path, "forgetting",
    )  # fmt: skip
    for entry in entries:
        if (entry.config.task.name, entry.config.task.source) == (found.name, found.source):
            refuse(source, f"expected a task that is not trained, got that of tasks: {entry.task}", "forgetting")
    return found


def _labelled(source: Source, what: str, index: int) -> str:
    """The label of a method or task: its own, or its name."""
    item = source.values[what][index]
    name, options = (item, {}) if isinstance(item, str) else next(iter(item.items()))
    if what == "tasks":
        name, options = item.get("name", ""), item
    options = options if isinstance(options, dict) else {}
    label = options.get("label", name)
    if found := problems(label, _LABEL):
        refuse(source, found[0].message, what, index)
    if label == ZERO_SHOT:
        refuse(source, f"the label {label!r} is that of the bare backbone; give another", what, index)
    return str(label)


def _one(source: Source, method: int, task: int) -> Source:
    """The fine-tuning file of one method on one task, every value knowing where it was written."""
    one = Source(copy.deepcopy({key: value for key, value in source.values.items() if key not in _OWN}), {})
    moved: dict[Place, Place] = {("methods", method): ("method",), ("tasks", task): ("task",)}
    for place, origin in source.origins.items():
        to = moved.get(place[:2])
        if to is not None:
            one.origins[(*to, *place[2:])] = origin
        elif not place or place[0] not in _OWN:
            one.origins[place] = origin
    one.values["method"] = copy.deepcopy(source.values["methods"][method])
    one.values["task"] = {key: value for key, value in source.values["tasks"][task].items() if key != "label"}
    if isinstance(one.values["method"], dict):
        name, options = next(iter(one.values["method"].items()))
        if isinstance(options, dict):
            options.pop("label", None)
            # What this method alone is trained with, such as its learning rate.
            own = options.pop("train", {})
            if found := problems(own, _TRAIN):
                refuse(source, found[0].message, "methods", method, name, "train", *found[0].place)
            if _RATES & own.keys():  # its own way to a rate takes the place of that of all
                for key in _RATES:
                    one.values.pop(key, None)
            for key, value in own.items():
                one.values[key] = value
                one.origins[(key,)] = source.origin(("methods", method, name, "train", key))
    return one

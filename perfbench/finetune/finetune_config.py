"""A fine-tuning file: read strictly, changed by `--set`, checked, frozen.

config = load("scenarios/finetune/boolq_para.yaml", ["seeds=[0]"])
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from perfbench.errors import FinetuneError, ScenarioError, TaskError
from perfbench.files.paths import expanded
from perfbench.files.yaml_source import Place, Source, assign, dotted, of_values, parse, read
from perfbench.finetune.frozen_products import KINDS
from perfbench.finetune.tasks.registry import TASKS, find
from perfbench.finetune.trained import find as find_method
from perfbench.finetune.trained import options_of
from perfbench.finetune.trained_table import trainable, unknown_method
from perfbench.methods.options import LAYERS
from perfbench.spec.arms import frozen
from perfbench.spec.option_schema import schema_of
from perfbench.spec.scenario_schema import DEVICES, first_written, problems

DTYPES = ("fp32", "bf16")
TOO_LONG = {
    "refuse": "an example that does not fit max_tokens is an error that names its record",
    "leave-out": "it is left out of training and of the dev set, and counted aloud",
}


@dataclass(frozen=True)
class TaskSource:
    """Which task, where its data lies (a folder in the set's original format, or a hub id), the metric of a task that
    has none of its own, and at most how many examples of each split are used, all of them where the count is None.
    `test_examples` 0 trains only."""

    name: str
    source: str = ""
    metric: str | None = None
    train_examples: int | None = None
    dev_examples: int | None = None
    test_examples: int | None = None


@dataclass(frozen=True)
class FinetuneConfig:
    """One method on one task, ready to be trained with every seed.

    `batch`: examples of an optimizer step, over all devices and all `accumulate` pieces of it; `warmup_share`: of all
    steps; `evaluate_every`: optimizer steps between evaluations on the dev set, each epoch's end not counted;
    `patience`: evaluations without a lower dev loss after which a seed stops, those that only an epoch's end asked for
    not counted; `beams`: in prediction on the test set.
    `options` are those of the method, as plain JSON values. `frozen_products`: what the backbone's products are
    made in while an adapter is trained, `dtype` or bf16 (perfbench.finetune.frozen_products); nothing else is.
    """

    backbone: str
    method: str
    task: TaskSource
    name: str = "finetune"
    question: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "fp32"
    frozen_products: str = "dtype"
    device: str = "auto"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    max_tokens: int = 1024
    too_long: str = "refuse"
    learning_rate: float = 1e-4
    warmup_share: float = 0.06
    epochs: int = 10
    batch: int = 16
    accumulate: int = 1
    evaluate_every: int = 200
    patience: int = 10
    beams: int = 1

    def to_json(self) -> dict[str, Any]:
        """The resolved configuration as plain JSON data."""
        data: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return data


# A file, the values of one, or such values that know where they were written.
Given = str | Path | Mapping[str, Any] | Source

_EXPONENT = re.compile(r"\d+(\.\d+)?[eE]-?\d{1,3}")
_COUNT = {"type": "integer", "minimum": 1}
_EXAMPLES = {"type": ["integer", "null"], "minimum": 1, "description": "at most so many; default: all"}
_TEXT = {"type": "string", "minLength": 1}

# The only place that lists keys, types and ranges; names of tasks and methods come from their registries.
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._-]{0,39}$", "title": "a short name"},
        "question": {"type": "string"},
        "backbone": _TEXT,
        "dtype": {"type": "string", "enum": list(DTYPES), "title": "dtype"},
        "frozen_products": {"type": "string", "enum": list(KINDS), "title": "frozen_products"},
        "device": {"type": "string", "enum": list(DEVICES), "title": "device"},
        "method": {"anyOf": [_TEXT, {"type": "object", "minProperties": 1, "maxProperties": 1, "title": "method"}]},
        "task": {
            "type": "object",
            "properties": {
                "name": _TEXT,
                "source": _TEXT,
                "metric": {"type": ["string", "null"]},
                "train_examples": _EXAMPLES,
                "dev_examples": _EXAMPLES,
                "test_examples": {**_EXAMPLES, "minimum": 0},
            },
            "required": ["name"],
            "additionalProperties": False,
        },
        "seeds": {
            "type": "array",
            "items": {"type": "integer", "minimum": 0, "maximum": 2**32 - 1},
            "minItems": 1,
            "uniqueItems": True,
        },
        "max_tokens": {"type": "integer", "minimum": 2},
        "too_long": {"type": "string", "enum": list(TOO_LONG), "title": "too_long"},
        "learning_rate": {"type": "number", "exclusiveMinimum": 0},
        "warmup_share": {"type": "number", "minimum": 0, "maximum": 0.99},
        "epochs": _COUNT,
        "batch": _COUNT,
        "accumulate": _COUNT,
        "evaluate_every": _COUNT,
        "patience": _COUNT,
        "beams": _COUNT,
    },
    "required": ["backbone", "method", "task"],
    "additionalProperties": False,
}


def load(path: Given, settings: Sequence[str] = ()) -> FinetuneConfig:
    """The configuration in a YAML file, or in such values, with every `KEY=VALUE` of `settings` laid over it.

    FinetuneError, in one line with the file and the line, for malformed YAML, unknown keys, values out of range, an
    unknown task or method and a FanLoRA setting that can't be read.
    """
    return from_source(*read_source(path, settings, "a fine-tuning file"))


def read_source(given: Given, settings: Sequence[str], what: str) -> tuple[Source, Path]:
    """(The mapping in the YAML file `given`, or that it is itself, with `settings` laid over it and not checked
    further; the path that it is known by); `what` it is, for messages. FinetuneError in one line, with the line."""
    try:
        if isinstance(given, Source):
            source, path = given, Path(given.origin(()).rpartition(":")[0])
        elif isinstance(given, Mapping):
            source, path = of_values(given, "settings"), Path("settings")
        else:
            source, path = read(given), Path(given)
        if not isinstance(source.values, dict):
            refuse(source, "expected a mapping of fields")
        for text in settings:
            key, separator, value = text.partition("=")
            if not separator or not value.strip() or not key.strip():
                raise FinetuneError(f"--set {text}: expected key=value, such as seeds=[0]")
            assign(source, key.strip().split("."), parse(value, f"--set {' '.join(text.split())}"))
    except ScenarioError as error:  # the reader's words are about YAML, except for this one
        raise FinetuneError(str(error).replace("a scenario file", what)) from None
    return source, path


def check(source: Source, schema: dict[str, Any]) -> None:
    """FinetuneError for the first fault, in the order of the file, of what `schema` refuses."""
    if found := problems(source.values, schema):
        first = first_written(source, found)
        refuse(source, first.message, *first.place)


def from_source(source: Source, path: Path) -> FinetuneConfig:
    """The configuration of values already read; relative paths are looked for beside `path` too. FinetuneError as
    `load`."""
    if "learning_rate" in source.values:
        source.values["learning_rate"] = rate_of(source.values["learning_rate"])
    check(source, SCHEMA)
    values = dict(source.values)
    method, options = _method(source, values.pop("method"), path)
    task = task_source(source, dict(values.pop("task")), path, "task")
    if values.get("batch", 16) % values.get("accumulate", 1):
        got = f"{values.get('batch', 16)} / {values.get('accumulate', 1)}"
        refuse(source, f"expected batch to be a multiple of accumulate, got {got}", "accumulate")
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip(".-_") or "finetune"
    fields = {"name": stem} | {key: frozen(value) for key, value in values.items()}
    return FinetuneConfig(method=method, options=options, task=task, **fields)


def _method(source: Source, value: Any, path: Path) -> tuple[str, dict[str, Any]]:
    """(name, options) of `name` or `{name: options}`; a FanLoRA setting's file is read."""
    name, options = (value, {}) if isinstance(value, str) else next(iter(value.items()))
    place: Place = ("method",) if isinstance(value, str) else ("method", name)
    if name not in trainable():
        refuse(source, unknown_method(name), *place)
    if not isinstance(options, dict):
        refuse(source, f"expected a mapping of options, got {options!r}", *place)
    known = {key: rules for key, rules in schema_of(find_method(name).options).items() if key != "adapters"}
    schema = {"type": "object", "properties": known, "additionalProperties": False, "title": "option"}
    if found := problems(options, schema):
        refuse(source, found[0].message, *place, *found[0].place)
    options = dict(options)
    if isinstance(options.get("setting"), str):
        options["setting"] = _read_setting(source, _located(options["setting"], path), *place, "setting")
    options = {key: frozen(value) for key, value in options.items()}
    try:
        options_of(name, options)
    except FinetuneError as error:
        refuse(source, str(error).removeprefix(f"method.{name}: "), "method", name)
    return name, options


def rate_of(value: Any) -> Any:
    """A learning rate as a float where it is a number or, since to YAML 1.1 1e-4 is a string, is written as one."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if number or (isinstance(value, str) and _EXPONENT.fullmatch(value)) else value


def task_source(source: Source, task: dict[str, Any], path: Path, place: str) -> TaskSource:
    """The task that stands at `place`; a relative folder is looked for beside `path` too. FinetuneError for an unknown
    task or metric."""
    try:
        find(task["name"], task.get("metric"))
    except TaskError as error:
        refuse(source, str(error), place, "metric" if task["name"] in TASKS else "name")
    if task.get("source"):
        task["source"] = _located(task["source"], path)
    return TaskSource(**task)


def _read_setting(source: Source, file: str, *place: str | int) -> Any:
    """The layers of a FanLoRA setting, what `perfbench fanlora search` writes."""
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        refuse(source, f"{file}: expected a JSON file, can't read it: {error}", *place)
    layers = content.get("layers") if isinstance(content, dict) else None
    if found := problems(layers, LAYERS):
        refuse(source, f"{file}: layers{dotted(('', *found[0].place))}: {found[0].message}", *place)
    return layers


def _located(name: str, config: Path) -> str:
    """`name` where it exists as it stands or is no path here (a hub id); else the one beside the file, if there."""
    beside = config.parent / name
    return str(beside) if not expanded(name).exists() and beside.exists() else name


def refuse(source: Source, message: str, *place: str | int) -> NoReturn:
    """Raises FinetuneError: where `place` was written, its name, the message."""
    origin, name = source.origin(place), dotted(place)
    known = not name or origin.startswith(f"--set {name}=")
    text = f"{origin}: {message}" if known else f"{origin}: {name}: {message}"
    raise FinetuneError(" ".join(text.splitlines()))

"""A study file: which commands are chained, once for each row of a table.

    study = load("scenarios/studies/k_max.yaml", ["let.backbone=FOLDER"], size="small")

`$name` in a step is what `let`, the size or the row calls so, or the folder of the step of that name; a row adds what
only it has. A step whose values are the same for several rows is done once for all of them.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import FinetuneError, ScenarioError, nearest
from perfbench.figures.papers import STUDIES, PaperStudy
from perfbench.files.plain_text import shown
from perfbench.files.yaml_source import Place, Source, assign, read
from perfbench.finetune.finetune_config import SCHEMA as FINETUNE
from perfbench.finetune.finetune_config import Given, check, read_source, refuse
from perfbench.finetune.study.step_kinds import KINDS, Figure
from perfbench.finetune.study.substitution import Filler, is_in_folder, part_of, put_folders, references, with_folders
from perfbench.spec import shipped
from perfbench.spec.scenario_schema import first_written, problems

_NAME = re.compile(r"[a-z][a-z0-9_]*")
# Of a row: how the table names it, and which row of the paper's stands beside it.
_OF_ROW = ("label", "paper")
_VALUES = {"type": "object", "title": "mapping of names to values"}
_ROWS = {"type": "array", "items": {"type": "object"}, "minItems": 1}
_STEP: dict[str, Any] = {
    "type": "object",
    "properties": {
        "command": {"type": "string", "enum": list(KINDS), "title": "command"},
        "from": {"anyOf": [{"type": "string", "minLength": 1}, {"type": "object"}]},
        "set": {"type": "object"},
    },
    "required": ["command"],
    "additionalProperties": False,
}
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": FINETUNE["properties"]["name"],
        "question": {"type": "string"},
        "paper": {"type": "string", "enum": list(STUDIES), "title": "table of a paper"},
        "let": _VALUES,
        "sizes": {"type": "object"},
        "for_each": _ROWS,
        "steps": {"type": "object"},
        "columns": {"type": "array", "items": {"type": "string"}, "minItems": 1, "uniqueItems": True},
    },
    "required": ["question", "steps", "columns"],
    "additionalProperties": False,
}
_SIZE = {"type": "object", "properties": {"let": _VALUES, "for_each": _ROWS}, "additionalProperties": False}


@dataclass(frozen=True)
class Step:
    """One step of one row. `values`: the fields of its command, every `$name` but those of steps filled in; `uses`:
    the steps that it names."""

    name: str
    command: str
    values: Source
    uses: tuple[str, ...]

    def config(self, folders: Mapping[str, str]) -> Any:
        """What its command is given, `folders` in the place of `$name`. FinetuneError as the command says it."""
        return KINDS[self.command].load(with_folders(self.values, folders))


@dataclass(frozen=True)
class Row:
    """One line of the table: its steps by name, in their order; `paper`: the paper's numbers for it, none if empty."""

    label: str
    paper: tuple[float, ...]
    steps: Mapping[str, Step]


@dataclass(frozen=True)
class Study:
    """All of a study. `columns`: `step.figure` -> that figure; `values`: the file as it was read."""

    name: str
    question: str
    size: str
    paper: PaperStudy | None
    rows: tuple[Row, ...]
    columns: Mapping[str, Figure]
    values: Mapping[str, Any]


def load(given: Given, settings: Sequence[str] = (), size: str = "") -> Study:
    """The study in the file `given`, every `KEY=VALUE` of `settings` laid over it, in its size `size` (the first that
    is written where it says none). Every step of every row is read as its command reads it.

    FinetuneError, in one line with the file and the line, for what can't be used.
    """
    source, path = read_source(given, settings, "a study file")
    check(source, SCHEMA)
    name = source.values.get("name", path.stem)
    let, each, size = _size(source, size)
    _check_steps(source, let)
    rows = tuple(_row(source, path, let, place) for place in each)
    labels = [row.label for row in rows]
    for place, label in zip(each, labels, strict=True):
        if labels.count(label) > 1:
            refuse(source, f"the label {label!r} is that of another row too; give each its own", *place, "label")
    columns = _try_out(source, rows)
    paper = STUDIES.get(source.values.get("paper", ""))
    return Study(name, source.values["question"], size, paper, rows, columns, source.values)


def _size(source: Source, size: str) -> tuple[dict[str, Place], list[Place], str]:
    """(name -> where its value stands, where the rows stand, the size's name)."""
    sizes = source.values.get("sizes", {})
    if not size:
        size = next(iter(sizes), "")
    elif size not in sizes:
        raise FinetuneError(f"--size: unknown size {size!r}; {nearest(size, sizes) if sizes else 'the file has none'}")
    for name in sizes:
        _check_part(source, ("sizes", name), _SIZE)
        _check_names(source, source.values["sizes"][name].get("let", {}), ("sizes", name, "let"))
    chosen = sizes.get(size, {})
    let: dict[str, Place] = {name: ("sizes", size, "let", name) for name in chosen.get("let", {})}
    # These go before the size's, so that --set let.NAME=VALUE does.
    let |= {name: ("let", name) for name in source.values.get("let", {})}
    at: Place = ("sizes", size, "for_each") if "for_each" in chosen else ("for_each",)
    rows = chosen.get("for_each", source.values.get("for_each", [{}]))
    return let, [(*at, index) for index in range(len(rows))], size


def _check_steps(source: Source, let: Mapping[str, Place]) -> None:
    """FinetuneError for a step that is malformed, and for a name that two things have."""
    _check_names(source, source.values["steps"], ("steps",))
    _check_names(source, source.values.get("let", {}), ("let",))
    if not source.values["steps"]:
        refuse(source, f"expected at least one step, a name and its command, one of {', '.join(KINDS)}", "steps")
    for name in source.values["steps"]:
        _check_part(source, ("steps", name), _STEP)
        if name in let:
            refuse(source, f"{name!r} is the name of a value too; give the step another", "steps", name)


def _check_part(source: Source, place: Place, schema: dict[str, Any]) -> None:
    """FinetuneError for the first fault of what stands at `place`."""
    part = part_of(source, place)
    if found := problems(part.values, schema):
        first = first_written(part, found)
        refuse(source, first.message, *place, *first.place)


def _check_names(source: Source, names: Mapping[str, Any], place: Place) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            refuse(source, f"expected a name of small letters, digits and _, got {name!r}", *place, name)


def _row(source: Source, path: Path, let: Mapping[str, Place], place: Place) -> Row:
    """The steps of the row at `place`, and what it is called."""
    own = part_of(source, place).values if place[0] in source.values else {}
    _check_names(source, own, place)
    names = dict(let) | {name: (*place, name) for name in own if name not in _OF_ROW}
    every = tuple(source.values["steps"])
    steps: dict[str, Step] = {}
    for order, (name, step) in enumerate(source.values["steps"].items()):
        filler = Filler(source, names, every[:order], every[order:])
        steps[name] = _step(filler, path, name, step["command"])
    filler = Filler(source, names, (), every)
    values = {name: value for name, value in own.items() if name not in _OF_ROW}
    label = filler.filled((*place, "label")).values if "label" in own else None
    if label is None:
        label = ", ".join(f"{name} {value}" for name, value in values.items() if not isinstance(value, dict | list))
    label = str(label) or "all"
    beside = filler.filled((*place, "paper")).values if "paper" in own else None
    table = STUDIES.get(source.values.get("paper", ""))
    if beside is not None and (table is None or not isinstance(beside, str) or beside not in table.values):
        known = nearest(str(beside), table.values) if table else "the study names no paper"
        refuse(source, f"unknown row {beside!r} of the paper's table; {known}", *place, "paper")
    return Row(label, table.values[beside] if table and beside is not None else (), steps)


def _step(filler: Filler, path: Path, name: str, command: str) -> Step:
    """One step: the fields of `from`, each of `set` laid over them."""
    source, place = filler.source, ("steps", name)
    given = filler.filled((*place, "from")) if "from" in source.values["steps"][name] else None
    if given is None:
        fields = Source({}, {(): source.origin(place)})
    elif isinstance(given.values, str):
        fields = _read(source, given.values, path, (*place, "from"))
    else:
        fields = given
    if not isinstance(fields.values, dict):
        refuse(
            source, f"expected the name of a file, or a mapping of fields, got {shown(fields.values)}", *place, "from"
        )
    for key in source.values["steps"][name].get("set", {}):
        try:
            assign(fields, key.split("."), filler.filled((*place, "set", key)))
        except ScenarioError as error:
            raise FinetuneError(str(error)) from None
    # Always its own: what a half-done step goes on with must not hang on how the file is called.
    fields.values["name"] = name.replace("_", "-")
    named = references(fields.values, filler.steps)
    for at, text, used in named:
        if not is_in_folder(text):
            refuse(fields, f"expected ${used}, or a place in it such as ${used}/setting.json, got {text!r}", *at)
    uses = tuple(dict.fromkeys(used for _, _, used in named))
    return Step(name, command, fields, uses)


def _read(source: Source, given: str, path: Path, place: Place) -> Source:
    """The fields in a file beside the study, or in one that comes with perfbench."""
    try:
        beside = path.parent / given
        return read(beside if beside.is_file() else shipped.find(given)[0])
    except ScenarioError as error:
        refuse(source, str(error), *place)


def _try_out(source: Source, rows: Sequence[Row]) -> dict[str, Figure]:
    """Has every step's command read its fields, with stand-ins for what earlier steps will have written; the figures of
    the columns. FinetuneError as the command says it, and for an unknown column."""
    found: dict[str, Figure] = {}
    with tempfile.TemporaryDirectory() as place:
        folders = {name: f"{place}/{name}" for name in source.values["steps"]}
        for row in rows:
            for step in row.steps.values():
                for _, text, _ in references(step.values.values, step.uses):
                    _stand_in(Path(put_folders(text, folders)))
                config = step.config(folders)
                for name, figure in KINDS[step.command].figures(config).items():
                    found.setdefault(f"{step.name}.{name}", figure)
    for index, column in enumerate(source.values["columns"]):
        if column not in found:
            refuse(source, f"unknown column {column!r}; {nearest(column, found)}", "columns", index)
    return {column: found[column] for column in source.values["columns"]}


def _stand_in(path: Path) -> None:
    """A FanLoRA setting where a file is named, else a folder."""
    if path.suffix == ".json":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"layers": [["v"]]}), encoding="utf-8")
    else:
        path.mkdir(parents=True, exist_ok=True)

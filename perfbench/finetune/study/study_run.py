"""`perfbench study`: does every step that is not done yet, with what it needs, then writes the table and the picture.

OUT/study.json          the rows with their figures, the paper's numbers, every step with its inputs
OUT/study.md, study.svg the table and the picture of it
OUT/<step>-<key>/       what the step's command writes, and `step.json`, its stamp, written once all of it is there

The key is made of all that decides what a step gives: its resolved configuration, the bytes of the local data,
backbones and adapters that it reads, and the bytes of what it takes from earlier steps. So whatever is changed, the
steps that hang on it have other folders, and the others are found done.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from perfbench import __version__
from perfbench.errors import FinetuneError, PerfbenchError
from perfbench.files import strict_json
from perfbench.files.paths import expanded
from perfbench.files.run_lock import LOCK
from perfbench.files.whole import write
from perfbench.finetune import small_backbone
from perfbench.finetune.study import study_folder, study_table
from perfbench.finetune.study.step_kinds import KINDS, to_json
from perfbench.finetune.study.study_config import Row, Step, Study
from perfbench.finetune.study.substitution import put_folders, references
from perfbench.machine import environment
from perfbench.machine.device import device_kind
from perfbench.spec import method_plugins

STAMP = "step.json"
_KEY = 12


def execute(study: Study, out: Path, console: Console | None = None) -> dict[str, Any]:
    """Does what is not done in the folder `out`; what study.json then holds. What was done stays, whatever fails.

    RunDirectoryError where `out` holds something else; what the commands of the steps raise.
    """
    console = console or Console(stderr=True, soft_wrap=True, highlight=False, markup=False)
    study_folder.begin(out, study.name, study.size)
    manifest: dict[str, Any] = {
        "kind": study_folder.KIND,
        "schema_version": study_folder.SCHEMA_VERSION,
        "perfbench_version": __version__,
        "name": study.name,
        "size": study.size,
        "question": study.question,
        "started_at": _now(),
        "finished_at": None,
        "study": study.values,
        "environment": environment.collect(device_kind("auto")[0], torch.get_num_threads()),
        "plugins": method_plugins.as_json(),
        "paper": None if study.paper is None else {key: getattr(study.paper, key) for key in study_folder.PAPER},
        "columns": {name: {"title": one.title, "form": one.form} for name, one in study.columns.items()},
        "rows": [],
        "differs": [],
        "steps": {},
    }
    study_folder.write_manifest(out, manifest)
    work = _Work(out, console)
    for row in study.rows:
        work.do(row)
        cells = {name: _cell(name, study, row, out, work.folders) for name in study.columns}
        steps = {name: folder.name for name, folder in work.folders.items()}
        manifest["rows"].append({"label": row.label, "paper": list(row.paper), "cells": cells, "steps": steps})
        manifest["differs"] += [f"{row.label}: {line}" for line in _differs(row, work.folders)]
        manifest["steps"] = work.stamps
        study_folder.write_manifest(out, manifest)
    manifest["finished_at"] = _now()
    study_folder.write_manifest(out, manifest)
    study_table.write(out, manifest)
    return manifest


def _differs(row: Row, folders: Mapping[str, Path]) -> list[str]:
    """What is not served as it was trained, in any step of the row."""
    return [line for name, step in row.steps.items() for line in KINDS[step.command].differs(folders[name])]


def _cell(name: str, study: Study, row: Row, out: Path, folders: Mapping[str, Path]) -> list[float]:
    """The numbers of a column; none where this row's step has no such figure."""
    step, _, figure = name.partition(".")
    config = row.steps[step].config({name: str(folder) for name, folder in folders.items()})
    found = KINDS[row.steps[step].command].figures(config).get(figure)
    return [] if found is None else found.of(folders[step])


@dataclass
class _Work:
    """The steps of one call after another. folders: where those of the row are; stamps: folder's name -> its stamp, of
    all rows."""

    out: Path
    console: Console
    folders: dict[str, Path] = field(default_factory=dict)
    stamps: dict[str, dict[str, Any]] = field(default_factory=dict)
    hashes: dict[Path, str] = field(default_factory=dict)

    def do(self, row: Row) -> None:
        """Every step of a row, those that are done as they are."""
        self.folders = {}
        for name, step in row.steps.items():
            places = {used: str(self.folders[used]) for used in step.uses}
            named = references(step.values.values, step.uses)
            taken = {text: self._hash(_taken(step, text, used, places[used])) for _, text, used in named}
            config = step.config(places)
            inputs = {**self._inputs(step, config, places), "steps": taken}
            key = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()
            folder = self.out / f"{name}-{key[:_KEY]}"
            if folder.name not in self.stamps:
                self.stamps[folder.name] = self._done(folder, key) or self._run(step, config, folder, key, inputs, row)
            self.folders[name] = folder

    def _inputs(self, step: Step, config: Any, places: Mapping[str, str]) -> dict[str, Any]:
        """What decides, beside earlier steps, what this one gives. A hub id counts by its name, what is here by its
        bytes."""
        files = {name: self._hash(_local(name, self.console)) for name in KINDS[step.command].reads(config) if name}
        files = {_unplaced(name, places): sha256 for name, sha256 in files.items()}
        found = {"command": step.command, "config": _unplaced(to_json(config), places), "files": files}
        text = json.dumps(found["config"])
        plugins = [one for one in method_plugins.as_json() if any(f'"{name}"' in text for name in one["methods"])]
        # The code of a method that the step names; where no plugin has one, nothing is said of plugins.
        return found | ({"plugins": [one["sha256"] or one["source"] for one in plugins]} if plugins else {})

    def _hash(self, path: Path | None) -> str | None:
        """SHA-256 of a file, or of all files in a folder with their names; None of what is not here."""
        if path is None:
            return None
        if path not in self.hashes:
            self.hashes[path] = _hash(path)
        return self.hashes[path]

    def _done(self, folder: Path, key: str) -> dict[str, Any] | None:
        """The stamp of a step that is whole."""
        try:
            stamp = strict_json.parse((folder / STAMP).read_bytes())
        except (OSError, ValueError):
            return None
        whole = isinstance(stamp, dict) and stamp.get("key") == key and "inputs" in stamp
        if whole:
            self.console.print(f"{folder.name}: done already")
        return stamp if whole else None

    def _run(
        self, step: Step, config: Any, folder: Path, key: str, inputs: Mapping[str, Any], row: Row
    ) -> dict[str, Any]:
        """Does the step, going on where it was begun, and stamps it."""
        kind = KINDS[step.command]
        begun = bool(kind.manifest) and (folder / kind.manifest).is_file()
        if folder.exists() and not begun:
            shutil.rmtree(folder)  # of a kill before anything was there to go on with
        self.console.print(f"{folder.name}: {'going on with' if begun else ''} {step.command} for {row.label}")
        kind.run(config, folder, begun, self.console)
        stamp = {
            "step": step.name,
            "command": step.command,
            "key": key,
            "inputs": dict(inputs),
            "perfbench_version": __version__,
            "finished_at": _now(),
        }
        write(folder / STAMP, study_folder.as_json(stamp))
        return stamp


def _local(name: str, console: Console) -> Path | None:
    """Where the data or backbone `name` lies here; None of a hub id."""
    try:
        path = expanded(small_backbone.resolve(name, console))
        return path if path.exists() else None
    except PerfbenchError:
        return None


def _taken(step: Step, text: str, used: str, folder: str) -> Path:
    """What an earlier step, `used`, has written. FinetuneError where it is not there."""
    path = Path(put_folders(text, {used: folder}))
    if not path.exists():
        raise FinetuneError(
            f"steps.{step.name}: {text}: expected {path}, which is not there; if it was lost, delete {folder} to do "
            "that step again"
        )
    return path


def _unplaced(value: Any, places: Mapping[str, str]) -> Any:
    """`value` with `$step` in the place of its folder again: where that lies decides nothing, what is in it does."""
    if isinstance(value, str):
        for name, folder in places.items():
            value = value.replace(folder, f"${name}")
        return value
    if isinstance(value, dict):
        return {_unplaced(key, places): _unplaced(member, places) for key, member in value.items()}
    return [_unplaced(member, places) for member in value] if isinstance(value, list) else value


def _hash(path: Path) -> str:
    if path.is_file():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    total = hashlib.sha256()
    for one in sorted(one for one in path.rglob("*") if one.is_file() and one.name not in (LOCK, STAMP)):
        total.update(f"{one.relative_to(path).as_posix()} {_hash(one)}\n".encode())
    return total.hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

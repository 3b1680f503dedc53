"""study.json: what a study wrote, typed; written whole, read strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfbench import exit_codes
from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json
from perfbench.files.run_lock import has_files
from perfbench.files.whole import write
from perfbench.files.yaml_source import dotted
from perfbench.run_folder.run_directory import STUDY_MANIFEST as MANIFEST
from perfbench.run_folder.run_schema import ENVIRONMENT, Schema
from perfbench.spec.scenario_schema import problems

KIND, SCHEMA_VERSION = "study", 1
PAPER = ("title", "unit", "finding")

_TEXT: Schema = {"type": "string"}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}


def _whole(fields: dict[str, Schema]) -> Schema:
    return {"type": "object", "properties": fields, "required": list(fields)}


def _by_name(one: Schema) -> Schema:
    return {"type": "object", "properties": {}, "additionalProperties": one}


_ROW = {"label": _TEXT, "paper": _NUMBERS, "cells": _by_name(_NUMBERS), "steps": _by_name(_TEXT)}
STUDY: Schema = _whole(
    {
        **dict.fromkeys(("kind", "perfbench_version", "name", "size", "question", "started_at"), _TEXT),
        "schema_version": {"type": "integer"},
        "finished_at": {"type": ["string", "null"]},
        "study": {"type": "object"},
        "environment": ENVIRONMENT,
        "plugins": {"type": "array"},
        "paper": {"anyOf": [{"type": "null"}, _whole(dict.fromkeys(PAPER, _TEXT))]},
        "columns": _by_name(
            _whole({"title": _TEXT, "form": {"type": "string", "pattern": r"^,?\.\df$", "title": "a form such as .1f"}})
        ),
        "rows": {"type": "array", "items": _whole(_ROW)},
        "differs": {"type": "array", "items": _TEXT},
        "steps": _by_name(_whole(dict.fromkeys(("step", "command", "key", "finished_at"), _TEXT))),
    }
)


def begin(out: Path, name: str, size: str) -> None:
    """Makes `out`, a new or empty folder, or one where this study was begun. RunDirectoryError where it is neither."""
    if out.is_dir() and (out / MANIFEST).is_file():
        found = read(out)
        if (found["name"], found["size"]) != (name, size):
            there = " ".join((found["name"], found["size"])).strip()
            raise RunDirectoryError(
                f"{out}: holds the study {there}, not {f'{name} {size}'.strip()}; give another --out"
            )
        return
    if out.exists() and (not out.is_dir() or has_files(out)):
        what = "has files in it" if out.is_dir() else "is a file"
        raise RunDirectoryError(
            f"{out}: expected a new or empty folder, or that of this study, this one {what}; give another --out"
        )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"{out}: can't be made ({error.strerror}); give another --out") from None


def read(path: Path) -> dict[str, Any]:
    """What study.json in the folder `path` holds. RunDirectoryError where it is not what a study writes."""
    file = path / MANIFEST
    try:
        found = strict_json.parse(file.read_bytes())
    except OSError as error:
        raise RunDirectoryError(f"{file}: can't be read ({error.strerror}); give the folder of a study") from None
    except ValueError as error:
        raise RunDirectoryError(f"{file}: not valid JSON ({error}); restore the file, or give another folder") from None
    for problem in problems(found, STUDY):
        where = f"{dotted(problem.place)}: " if problem.place else ""
        raise RunDirectoryError(f"{file}: {where}{problem.message}; restore the file, or give another folder")
    if (found["kind"], found["schema_version"]) != (KIND, SCHEMA_VERSION):
        raise RunDirectoryError(f"{file}: expected a study of schema {SCHEMA_VERSION}; give another folder")
    return dict(found)


def exit_code(manifest: Mapping[str, Any]) -> int:
    """That of the command: whether anything is served otherwise than it was trained."""
    return exit_codes.FAILED if manifest["differs"] else exit_codes.OK


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    """Puts `manifest` in the place of study.json, whole or not at all."""
    write(out / MANIFEST, as_json(manifest))


def as_json(content: Mapping[str, Any]) -> bytes:
    """Strict JSON, with a line break at its end."""
    return (json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n").encode()

"""Records of a set's files, or of the hub, each with its place for messages. Every error is one line that names it."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError

# Of an id such as google/boolq; a path has a dot, a tilde or a slash in front, or is longer.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


@dataclass(frozen=True)
class Record:
    """One record: its fields, `id` (`file:number` without the folder) and `where` (with it), numbered from 1."""

    fields: Mapping[str, Any]
    id: str
    where: str

    def text(self, name: str) -> str:
        """The field `name`, which has to be a string with something in it."""
        value = self.get(name)
        if not isinstance(value, str) or not value.strip():
            raise TaskError(f"{self.where}: {name}: expected text, got {_shown(value)}")
        return value

    def get(self, name: str) -> Any:
        """The field `name`, of any type; TaskError where it is missing."""
        if name not in self.fields:
            raise TaskError(f"{self.where}: no field {name!r}; it has {', '.join(map(repr, self.fields)) or 'none'}")
        return self.fields[name]

    def label(self, name: str, known: Sequence[Any]) -> int:
        """The place in `known` of the field `name`; TaskError on a label that is not there."""
        value = self.get(name)
        for index, label in enumerate(known):
            if value == label and isinstance(value, bool) == isinstance(label, bool):
                return index
        expected = ", ".join(json.dumps(label) for label in known)
        raise TaskError(f"{self.where}: {name}: expected one of {expected}, got {_shown(value)}")


def is_local(source: str) -> bool:
    """True for a folder or file that is there, False for what can be a hub id; TaskError for what is neither."""
    if Path(source).exists():
        return True
    if _HUB_ID.fullmatch(source):
        return False
    raise TaskError(f"{source}: no such folder; give the set's folder, or an id on the hub such as google/boolq")


def find_file(source: str, *patterns: str) -> Path:
    """The file in the folder `source` that fits the first of `patterns` that any file fits; TaskError otherwise."""
    folder = Path(source)
    if not folder.is_dir():
        raise TaskError(f"{source}: expected a folder with {' or '.join(patterns)}, got a file")
    for pattern in patterns:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise TaskError(f"{source}: expected one file that fits {pattern}, got {names}; leave one of them there")
        if found:
            return found[0]
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
    raise TaskError(f"{source}: expected a file {' or '.join(patterns)}; the folder has {there}")


def read_jsonl(path: Path, *, torn: bool = False) -> list[Record]:
    """One record for each line that is not blank; `torn`: without what stands after the last line's end."""
    records = []
    lines = _text(path).split("\n")
    for number, line in enumerate(lines[:-1] if torn else lines, start=1):
        if line.strip():
            value = _parse(line, f"{path}:{number}")
            records.append(_record(value, path, number))
    return records


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return _parse(_text(path), str(path))


def read_json_list(path: Path) -> list[Record]:
    """One record for each object of a JSON file's list."""
    values = read_json(path)
    if not isinstance(values, list):
        raise TaskError(f"{path}: expected a list of objects, got {_shown(values)}")
    return [_record(value, path, number) for number, value in enumerate(values, start=1)]


def read_csv(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(number of the record from 1, its cells), a header too where the file has one."""
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        yield from enumerate((cells for cells in reader if cells), start=1)
    except csv.Error as error:
        raise TaskError(f"{path}: line {reader.line_num}: malformed CSV: {error}") from None


def read_hub(source: str, config: str | None, split: str) -> list[Record]:
    """The records of one split on the hub, through `datasets` (not tested against the live hub)."""
    try:
        from datasets import load_dataset
    except ImportError:
        raise TaskError(
            f"{source}: no such folder, and reading it from the hub needs `pip install adapter-perfbench[hub]`"
        ) from None
    try:
        rows = load_dataset(source, config, split=split)
    except Exception as error:  # its kinds are many: no network, no such set, a gated one, a moved script
        reason = " ".join(str(error).split())[:200]
        what = "is no folder, and the hub did not give it"
        raise TaskError(f"{source}: {what}: {reason}; check the name and the network, or give a folder") from None
    return [Record(row, f"{split}:{n}", f"{source} ({split}):{n}") for n, row in enumerate(rows, start=1)]


def _record(value: Any, path: Path, number: int) -> Record:
    where = f"{path}:{number}"
    if not isinstance(value, dict):
        raise TaskError(f"{where}: expected a JSON object, got {_shown(value)}")
    return Record(value, f"{path.stem}:{number}", where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: expected UTF-8 text, got another byte at offset {error.start}") from None
    except OSError as error:
        raise TaskError(f"{path}: can't be read: {error.strerror}") from None


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise TaskError(f"{where}: malformed JSON: {error.msg} (character {error.pos + 1})") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{where}: malformed JSON: {error}") from None


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."

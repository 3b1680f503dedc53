"""What a search has measured so far: one JSON line for each finished unit of work, so that a kill loses one unit."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perfbench.errors import FinetuneError


class Journal:
    """The lines of one score of one seed. The first line says what they were measured on: lines of another backbone,
    adapter or held-out set are never mixed in."""

    def __init__(self, path: Path, subject: Mapping[str, Any]):
        """Reads what is at `path`, a torn last line cut off. FinetuneError for a corrupt line or another subject."""
        self.path = path
        self.lines: dict[tuple[int, ...], dict[str, Any]] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            whole = path.read_bytes() if path.exists() else b""
            end = whole.rfind(b"\n") + 1
            if end < len(whole):
                os.truncate(path, end)
            self._read(whole[:end], json.loads(json.dumps(subject)))
            if not end:
                self._append({"subject": subject})
        except OSError as error:
            raise FinetuneError(f"{path}: can't be read or written: {error.strerror}; give another --out") from None

    def _read(self, whole: bytes, subject: Any) -> None:
        for number, text in enumerate(whole.split(b"\n")[:-1], start=1):
            try:
                line = json.loads(text)
                if number == 1:
                    found = line["subject"]
                else:
                    self.lines[tuple(line["unit"])] = line
            except (ValueError, KeyError, TypeError):
                raise FinetuneError(
                    f"{self.path}:{number}: not a line of a search; delete the file, and it is measured anew"
                ) from None
            if number == 1 and found != subject:
                changed = sorted(key for key in {*found, *subject} if found.get(key) != subject.get(key))
                raise FinetuneError(
                    f"{self.path}: was measured with another {', '.join(changed)}; give a new --out, or what it had"
                )

    def add(self, unit: tuple[int, ...], line: Mapping[str, Any]) -> None:
        """One finished unit, on disk before this returns."""
        whole = {"unit": list(unit), **line}
        try:
            self._append(whole)
        except OSError as error:
            raise FinetuneError(f"{self.path}: can't be written: {error.strerror}; free some space") from None
        self.lines[unit] = whole

    def _append(self, content: Any) -> None:
        with self.path.open("ab", buffering=0) as file:
            line = memoryview(json.dumps(content, allow_nan=False).encode() + b"\n")
            while line:  # a disk that fills up takes a part first, and only then fails
                line = line[file.write(line) :]

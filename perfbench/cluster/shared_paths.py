"""Whether the files that a job names are the same on a node as where the command was started. Free of torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

# Of larger files only the size, the begin and the end are compared: weights of many gigabytes would take minutes.
_WHOLE_BYTES = 64 * 2**20
_PART_BYTES = 2**20


def digests(values: Any) -> dict[str, str]:
    """{path: hash of all that is in it} of every path of a file or folder that is written in JSON-able `values`."""
    return {text: _digest(Path(text)) for text in sorted(set(_paths(values)))}


def unlike(expected: Mapping[str, str]) -> str | None:
    """What of `expected`, made elsewhere, is missing or other here, in words; None where all is the same."""
    for text, digest in expected.items():
        if not Path(text).exists():
            return f"{text}: not there"
        if _digest(Path(text)) != digest:
            return f"{text}: other content"
    return None


def _paths(values: Any) -> Iterator[str]:
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, list | tuple):
        for one in values:
            yield from _paths(one)
    elif isinstance(values, str) and os.sep in values and Path(values).exists():
        yield values


def _digest(path: Path) -> str:
    found = hashlib.sha256()
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    for file in files:
        size = file.stat().st_size
        found.update(f"{file.relative_to(path).as_posix()} {size}\0".encode())
        with file.open("rb") as content:
            if size <= _WHOLE_BYTES:
                found.update(content.read())
            else:
                found.update(content.read(_PART_BYTES))
                content.seek(size - _PART_BYTES)
                found.update(content.read())
    return found.hexdigest()

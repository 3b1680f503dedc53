"""The formats in which `show`, `report`, `history` and `gate` give what they have found. Free of torch.

Each is a function from a Subject to text or bytes; adding one is that function and a line of FORMATS.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from perfbench.errors import PerfbenchError, nearest
from perfbench.report import tables

WIDTH = 100


class Subject(Protocol):
    """What is to be shown: a run, several runs, series of a figure, the report of a gate."""

    def print(self, console: Any) -> None:
        """Prints it for people to `console` (rich's)."""

    def markdown(self) -> str:
        """It as Markdown, for a pull request."""

    def records(self) -> list[dict[str, Any]]:
        """Its figures as flat rows, every row with the same fields; values are text, numbers, lists of these or
        None."""

    def page(self) -> str:
        """It as one HTML page that loads nothing."""


def console_of(**how: Any) -> Any:
    """rich's console for standard output: WIDTH columns where that is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False, **how)


def terminal(subject: Subject) -> str:
    """What `print` prints, without colour."""
    text = io.StringIO()
    subject.print(console_of(file=text))
    return text.getvalue()


def as_json(subject: Subject) -> str:
    """The records as a list of objects."""
    return json.dumps(subject.records(), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Subject], str | bytes]] = {
    "table": terminal,
    "markdown": lambda subject: subject.markdown(),
    "csv": lambda subject: tables.as_csv(subject.records()),
    "json": as_json,
    "parquet": lambda subject: tables.as_parquet(subject.records()),
    "html": lambda subject: subject.page(),
}


def rendered(subject: Subject, format: str) -> str | bytes:
    """`subject` in one of FORMATS. PerfbenchError on another, and where the subject can't be had in it."""
    if format not in FORMATS:
        raise PerfbenchError(f"--format: unknown format {format!r}; {nearest(format, FORMATS)}")
    return FORMATS[format](subject)


def put(subject: Subject, format: str, out: Path | None = None, *, filed: str | None = None) -> None:
    """Writes `subject` in one of FORMATS to the file `out`, as a whole or not at all, else to standard output; a page
    and bytes to the file `filed`.FORMAT, where that is said. PerfbenchError as `rendered` has it, where the file
    can't be written, and on bytes for a terminal."""
    from perfbench.files.whole import write

    if format == "table" and out is None:
        subject.print(console_of())  # in colour, and as wide as the terminal is
        return
    content = rendered(subject, format)
    if out is None and filed is not None and (isinstance(content, bytes) or format == "html"):
        out = Path(f"{filed}.{format}")
    if out is not None:
        data = content.encode() if isinstance(content, str) else content
        write(out, data)
        print(f"{out}: {len(data) / 1e6:.2f} MB", file=sys.stderr)
    elif isinstance(content, str):
        sys.stdout.write(content)
    elif sys.stdout.isatty():
        raise PerfbenchError(f"--format {format}: not for a terminal; send it to a file with > FILE")
    else:
        sys.stdout.flush()
        sys.stdout.buffer.write(content)

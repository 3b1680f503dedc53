"""Chrome traces as torch's profiler writes them: found, read within a limit, and written. Free of torch."""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import TraceError

# What perfbench writes and torch's own handler writes, packed or not.
SUFFIXES = (".trace.json.gz", ".trace.json")
# Unpacked. A browser needs several times as much to show it, and gives up before 2 GiB.
LARGEST_BYTES = 256 * 2**20

Event = dict[str, Any]


@dataclass(frozen=True)
class Trace:
    """The complete events (`ph` X) of one file; `head`: the other keys of the file."""

    events: list[Event]
    head: dict[str, Any]


def find(folder: Path) -> list[Path]:
    """The traces in `folder` itself, else those anywhere below it, in the order of their names. TraceError."""
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "no such folder"
        raise TraceError(f"{folder}: expected a folder that `perfbench profile` wrote, got {kind}")
    for files in (folder.iterdir(), folder.rglob("*")):
        found = sorted(path for path in files if path.name.endswith(SUFFIXES) and path.is_file())
        if found:
            return found
    raise TraceError(
        f"{folder}: no trace in it; expected a file that ends in {' or '.join(SUFFIXES)}; "
        f"`perfbench profile SCENARIO --case ID` makes one"
    )


# Within these a sum of times is finite; a clock of nanoseconds since 1970 is.
_LATEST_US = 1e18


def read(path: Path, largest_bytes: int = LARGEST_BYTES) -> Trace:
    """One trace. TraceError where it is no trace, torn, or larger than `largest_bytes` unpacked.

    A file is unpacked no further than the limit, whatever its head says of its size. Bytes that are no text become
    replacement characters.
    """
    try:
        size = path.stat().st_size
        packed = path.name.endswith(".gz")
        with gzip.open(path) if packed else path.open("rb") as file:
            text = file.read(largest_bytes + 1) if size <= largest_bytes else b""
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: can't be read ({error}); profile again") from None
    if size > largest_bytes or len(text) > largest_bytes:
        found = f"{_mib(size)} packed, more than {_mib(largest_bytes)} unpacked" if text else _mib(size)
        raise TraceError(
            f"{path}: {found}, and the page shows at most {_mib(largest_bytes)}; profile fewer steps "
            f"(--steps 1) or a smaller batch, or open it in https://ui.perfetto.dev, which reads it in your browser"
        )
    try:
        document = _parse(text.decode(json.detect_encoding(text), errors="replace"))
    except (ValueError, RecursionError) as error:
        raise TraceError(f"{path}: not a whole JSON file ({error}); was its writing interrupted?") from None
    return _trace(document, path)


# A backslash that begins no escape of JSON's, beside those that do.
_BACKSLASH = re.compile(r"""\\(?:(["\\/bfnrt]|u[0-9a-fA-F]{4})|)""")


def _parse(text: str) -> Any:
    """What JSON says, and what torch writes: names of files and arguments go into its traces as they are, with control
    characters and, on Windows, with backslashes. ValueError."""
    lenient = json.JSONDecoder(strict=False)
    try:
        return lenient.decode(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Invalid \\"):
            raise
    return lenient.decode(_BACKSLASH.sub(lambda found: found[0] if found[1] else r"\\", text))


def _trace(document: Any, path: Path) -> Trace:
    events = document.get("traceEvents") if isinstance(document, dict) else document
    if not isinstance(events, list):
        raise TraceError(f"{path}: expected a Chrome trace, an object with a list `traceEvents`")
    complete = [event for event in events if isinstance(event, dict) and event.get("ph") == "X"]
    for event in complete:
        numbers = (event.get("ts"), event.get("dur", 0))
        # A NaN is on neither side of anything.
        timed = all(isinstance(number, int | float) and abs(number) < _LATEST_US for number in numbers)
        if not timed or numbers[1] < 0 or not isinstance(event.get("name"), str):
            raise TraceError(f"{path}: an event without a name or a time: {str(event)[:100]}")
    if not complete:
        raise TraceError(f"{path}: a trace without one complete event; nothing was recorded")
    head = {key: value for key, value in document.items() if key != "traceEvents"} if isinstance(document, dict) else {}
    return Trace(complete, head)


def mark_ranges(events: Iterable[Event], names: Collection[str]) -> None:
    """Makes annotations of the events that are named ranges, which torch's quick way of making them calls operators."""
    for event in events:
        if event.get("name") in names and event.get("cat") == "cpu_op":
            event["cat"] = "user_annotation"


def _mib(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"

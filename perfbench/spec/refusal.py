"""What the parts of a scenario file have in common: how a value is refused, read as an axis, or found as a file.
Free of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NoReturn

from perfbench.errors import PerfbenchError, ScenarioError
from perfbench.files.paths import expanded
from perfbench.files.yaml_source import Place, Source, dotted


def refuse(source: Source, message: str, *place: str | int) -> NoReturn:
    """Raises ScenarioError: where `place` was written, its name, the message."""
    origin, name = source.origin(place), dotted(place)
    # `--set workload.tenants=0` names its place already.
    known = not name or origin.startswith(f"--set {name}=")
    text = f"{origin}: {message}" if known else f"{origin}: {name}: {message}"
    raise ScenarioError(" ".join(text.splitlines()))  # a key between quotes may hold a line break


def last_set(source: Source, *places: Place) -> Place:
    """Of the places that contradict each other the one that a `--set` wrote; else the first."""
    return next((place for place in places if source.origin(place).startswith("--set ")), places[0])


def axis(value: Any) -> tuple[Any, ...]:
    """A scalar as an axis of one value."""
    return tuple(value) if isinstance(value, list) else (value,)


def existing(source: Source, name: str, scenario: Path, kind: str, *place: str | int) -> str:
    """The path of the file or folder `name`, looked for in the current folder, then beside the scenario."""
    try:
        written = expanded(name)
    except PerfbenchError as error:
        refuse(source, f"expected a {kind}, got {error}", *place)
    for candidate in (written, scenario.parent / name):
        if candidate.is_file() if kind == "file" else candidate.is_dir():
            return str(candidate)
    beside = "" if Path(name).is_absolute() else f", neither in the current folder nor in {scenario.parent}"
    refuse(source, f"no such {kind} {name!r}{beside}", *place)

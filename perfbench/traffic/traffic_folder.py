"""The folder of a traffic run: traffic.json, and measurements.jsonl with every request measured. Free of torch.

What has been measured stands in measurements.jsonl alone; the figures in traffic.json are made of it again whenever the
run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json, whole
from perfbench.files.plain_text import shown
from perfbench.traffic.folder_schema import COLUMNS, problem_of_manifest, problem_of_measurement, problem_of_verdicts
from perfbench.traffic.outcome import Answered

SCHEMA_VERSION = 1
MANIFEST, MEASUREMENTS = "traffic.json", "measurements.jsonl"


class Key(NamedTuple):
    """Which measurement: of which arm, with how many tenants, at how many requests a second, which time; in_flight: how
    many requests were open at any time, 0 of an open loop."""

    arm: str
    tenants: int
    rate: float
    repetition: int
    in_flight: int = 0


class Measured(NamedTuple):
    """What a measurement gave: its requests in the order in which they were due, None where it was given up after
    `sent` of them; `loaded_bytes`: of adapters, from the host. Over HTTP too: lag_ms: how late each was sent; failed:
    the place of each that got no answer, its tenant, and why."""

    answered: list[Answered] | None
    sent: int
    loaded_bytes: int | None
    lag_ms: list[float] | None = None
    failed: Sequence[list[Any]] = ()


class TrafficFolder:
    """A folder that was just made, or that holds a run of the same scenario."""

    def __init__(self, path: Path, manifest: dict[str, Any], measured: dict[Key, Measured]):
        self.path, self.manifest, self.measured = path, manifest, measured

    @classmethod
    def create(cls, path: Path, manifest: dict[str, Any]) -> TrafficFolder:
        """A new folder. RunDirectoryError where it can't be made, or holds something."""
        try:
            path.mkdir(parents=True, exist_ok=True)
            if any(entry.name != "lock" and not entry.name.startswith(".") for entry in path.iterdir()):
                raise RunDirectoryError(f"{path}: is not empty; measure with another --out, or go on with --resume")
            made = cls(path, manifest, {})
            made.write()
            (path / MEASUREMENTS).touch()
        except OSError as error:
            raise RunDirectoryError(f"{path}: can't be written ({error.strerror})") from None
        return made

    @classmethod
    def open(cls, path: Path) -> TrafficFolder:
        """The run in a folder. RunDirectoryError where there is none, or it is damaged."""
        manifest = _manifest(path)
        lines, measured = _read(path / MEASUREMENTS)
        if lines[-1]:  # what follows the last line end was torn
            _write(path / MEASUREMENTS, b"\n".join([*lines[:-1], b""]), "wb")
        return cls(path, manifest, measured)

    def add(self, key: Key, found: Measured) -> None:
        """Appends a measurement. RunDirectoryError where it can't be written."""
        rows = None if found.answered is None else [[getattr(one, name) for name in COLUMNS] for one in found.answered]
        about = {**key._asdict(), "sent": found.sent, "loaded_bytes": found.loaded_bytes}
        if found.lag_ms is not None:
            about |= {"lag_ms": found.lag_ms, "failed": found.failed}
        line = json.dumps({**about, "columns": COLUMNS, "rows": rows}, allow_nan=False, separators=(",", ":"))
        _write(self.path / MEASUREMENTS, line.encode() + b"\n", "ab")
        self.measured[key] = found

    def write(self) -> None:
        """Writes traffic.json, whole or not at all."""
        text = json.dumps(self.manifest, indent=1, allow_nan=False, ensure_ascii=False)
        whole.write(self.path / MANIFEST, text.encode() + b"\n")


def _write(file: Path, content: bytes, mode: str) -> None:
    try:
        with file.open(mode) as out:
            out.write(content)
    except OSError as error:
        raise RunDirectoryError(f"{file}: can't be written ({error.strerror})") from None


def read_measured(path: Path) -> dict[Key, Measured]:
    """Every measurement of a run, which may still be going on. RunDirectoryError where one is damaged."""
    return _read(path / MEASUREMENTS)[1]


def _read(file: Path) -> tuple[list[bytes], dict[Key, Measured]]:
    """The lines of measurements.jsonl, the last of them empty or torn, and what the others hold. RunDirectoryError."""
    measured: dict[Key, Measured] = {}
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise RunDirectoryError(f"{file}: can't be read ({error.strerror})") from None
    for number, line in enumerate(lines[:-1], start=1):
        try:
            key, found = _parse(strict_json.parse(line))
            if key in measured:
                raise ValueError("the same measurement stands there twice")
        except ValueError as error:
            raise RunDirectoryError(f"{file}:{number}: is damaged ({error}); restore it, or measure anew") from None
        measured[key] = found
    return lines, measured


def is_traffic(path: Path) -> bool:
    """Whether a folder holds a traffic run."""
    return (path / MANIFEST).is_file()


def read_manifest(path: Path) -> dict[str, Any]:
    """What traffic.json holds, for readers. RunDirectoryError where it is not there, damaged, of another version, or
    says more than was proved."""
    found = _manifest(path)
    if problem := problem_of_verdicts(found):
        raise RunDirectoryError(f"{path / MANIFEST}: {problem}; restore the file, or go on with --resume")
    return found


def _manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        found: Any = strict_json.parse(file.read_bytes())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise RunDirectoryError(f"{file}: can't be read ({why}); expected the folder of a traffic run") from None
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        got = found.get("schema_version") if isinstance(found, dict) else found
        raise RunDirectoryError(f"{file}: schema_version: expected {SCHEMA_VERSION}, got {shown(got)}")
    if problem := problem_of_manifest(found):
        raise RunDirectoryError(f"{file}: {problem}; restore the file, or measure anew")
    return found


def _parse(line: Any) -> tuple[Key, Measured]:
    """ValueError where no perfbench wrote it."""
    if problem := problem_of_measurement(line):
        raise ValueError(problem)
    answered = None
    if line["rows"] is not None:
        named = (dict(zip(COLUMNS, row, strict=True)) for row in line["rows"])
        answered = [Answered.of(one) for one in named]
    key = Key(line["arm"], line["tenants"], line["rate"], line["repetition"], line.get("in_flight", 0))
    return key, Measured(answered, line["sent"], line["loaded_bytes"], line.get("lag_ms"), line.get("failed", ()))

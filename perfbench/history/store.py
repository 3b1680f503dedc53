"""How figures moved over runs: an embedded store of run directories, and where a figure's level changed. Free of torch.

The store is one SQLite file; what it holds comes from run directories and can be made again from them.
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError, RunDirectoryError, nearest
from perfbench.figures.change_points import Change, changes
from perfbench.figures.metrics import METRICS, sample_values
from perfbench.figures.stats import median_bounds
from perfbench.files.plain_text import printable
from perfbench.report import rows, words
from perfbench.run_folder.run_directory import MANIFEST, RunDirectory

# Changes when the tables below do; a store of another version is refused.
_VERSION = 1
_TABLES = """
CREATE TABLE runs (
    id TEXT PRIMARY KEY, digest TEXT NOT NULL, path TEXT NOT NULL, scenario TEXT NOT NULL, started_at TEXT NOT NULL,
    commit_id TEXT, dirty INTEGER
);
CREATE TABLE figures (
    run TEXT NOT NULL REFERENCES runs (id), machine TEXT NOT NULL, case_id TEXT NOT NULL, options TEXT NOT NULL,
    figure TEXT NOT NULL, value REAL NOT NULL, low REAL, high REAL,
    PRIMARY KEY (run, case_id, figure)
);
CREATE INDEX figures_by_name ON figures (figure, machine, case_id);
"""
# A timed figure's level has changed where chance seldom does as much and by at least this share.
LEAST_CHANGE = 0.03


@dataclass(frozen=True)
class Point:
    """A figure of one run: `low` and `high` are its 95% interval, where there is one."""

    started_at: str
    commit: str | None
    dirty: bool
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Series:
    """One figure of one case with one set of options on one machine, oldest run first."""

    figure: str
    machine: str
    case_id: str
    options: str
    points: tuple[Point, ...]

    def changes(self) -> list[Change]:
        """Where its level changes: by any difference for an exact figure, by evidence for a timed one."""
        values = [point.value for point in self.points]
        if METRICS[self.figure].kind != "exact":
            return changes(values, LEAST_CHANGE)
        steps = range(1, len(values))
        return [Change(at, values[at - 1], values[at], 0.0) for at in steps if values[at] != values[at - 1]]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run directories among and anywhere under `paths`. RunDirectoryError where there is none."""
    found = []
    for path in paths:
        below = sorted(file.parent for file in path.rglob(MANIFEST)) if path.is_dir() else []
        if not below:
            raise RunDirectoryError(f"{path}: expected a run directory, or a folder with some in it, found none")
        found += below
    return list(dict.fromkeys(found))


class Store:
    """An open store; made by `open_store`."""

    def __init__(self, connection: sqlite3.Connection):
        self._connection = connection

    def add(self, path: Path) -> str:
        """Takes a run in: "new", "changed" (it was imported before it was resumed), "unchanged" or "unfinished".

        The same run is the same wherever its folder lies. RunDirectoryError where it can't be read.
        """
        directory = RunDirectory.open(path)
        manifest = directory.manifest
        if manifest.get("finished_at") is None:
            return "unfinished"
        identity = _digest([manifest[key] for key in ("started_at", "scenario", "environment")])
        # A run that was imported before a metric was declared is imported again.
        digest = _digest([manifest, list(METRICS)])
        known = self._connection.execute("SELECT digest FROM runs WHERE id = ?", (identity,)).fetchone()
        if known == (digest,):
            return "unchanged"
        checkout = manifest["environment"].get("checkout") or {}
        run = (identity, digest, str(path), str(manifest["scenario"].get("name")), manifest["started_at"])
        figures = [(identity, *figure) for figure in _figures(directory)]
        with self._connection:  # all of it or nothing
            self._connection.execute("DELETE FROM figures WHERE run = ?", (identity,))
            self._connection.execute("DELETE FROM runs WHERE id = ?", (identity,))
            self._connection.execute(
                "INSERT INTO runs VALUES (?, ?, ?, ?, ?, ?, ?)", (*run, checkout.get("commit"), checkout.get("dirty"))
            )
            self._connection.executemany("INSERT INTO figures VALUES (?, ?, ?, ?, ?, ?, ?, ?)", figures)
        return "changed" if known else "new"

    def series(self, figure: str, case: str = "*", machine: str = "") -> list[Series]:
        """How `figure` moved in each case whose id matches the glob, on each machine whose name contains `machine`.

        PerfbenchError on a figure or a machine that there is not, and where no case matches.
        """
        if figure not in METRICS:
            raise PerfbenchError(f"--figure: unknown figure {figure!r}; {nearest(figure, METRICS)}")
        rows = self._connection.execute(
            "SELECT machine, case_id, options, started_at, commit_id, dirty, value, low, high FROM figures "
            "JOIN runs ON runs.id = figures.run WHERE figure = ? ORDER BY started_at, runs.id", (figure,)
        ).fetchall()  # fmt: skip
        machines = {row[0] for row in rows}
        if rows and not any(machine.casefold() in name.casefold() for name in machines):
            raise PerfbenchError(f"--machine: no run on a machine like {machine!r}; {nearest(machine, machines)}")
        found: dict[tuple[str, str, str], list[Point]] = {}
        for name, case_id, options, started_at, commit, dirty, *values in rows:
            if machine.casefold() in name.casefold() and fnmatch.fnmatchcase(case_id, case):
                commit = None if commit is None else printable(str(commit))
                point = Point(printable(str(started_at)), commit, bool(dirty), *values)
                found.setdefault((printable(name), printable(case_id), printable(options)), []).append(point)
        if not found:
            raise PerfbenchError(f"history: no run has {figure} of a case that matches {case!r}; --case takes a glob")
        return [Series(figure, *key, tuple(points)) for key, points in sorted(found.items())]


@contextmanager
def open_store(path: Path, *, create: bool) -> Iterator[Store]:
    """The store in this file, made where there is none and `create` says so. PerfbenchError where it can't be used."""
    if not path.exists() and not create:
        raise PerfbenchError(f"--store {path}: there is no store yet; perfbench history RUN... imports runs into it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path, timeout=30)) as connection:
            _prepare(connection, path)
            yield Store(connection)
    except (sqlite3.Error, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PerfbenchError(
            f"--store {path}: can't be used ({reason}); give another file, it is made again from runs"
        ) from error


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    """Makes the tables in an empty file; refuses one of another version."""
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()
    if version == 0 and tables == 0:
        connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
    elif version != _VERSION:
        raise PerfbenchError(
            f"--store {path}: expected a store of version {_VERSION}, got {version}; give another file, "
            "it is made again from runs"
        )


def _figures(directory: RunDirectory) -> Iterator[tuple[Any, ...]]:
    """(machine, case id, options, figure, value, low, high) of everything that a run measured."""
    manifest, written = directory.manifest, directory.samples()
    directory.add_tails(written)
    samples: dict[str, list[Mapping[str, Any]]] = {}
    for sample in written:
        if sample["void"] is None:
            samples.setdefault(sample["case"], []).append(sample)
    for row in rows.rows(manifest):
        case = manifest["cases"][row["case"]]
        machine = words.machine(manifest["environment"], str(row["device"]))
        options = json.dumps(case["options"], sort_keys=True)
        for figure, metric in METRICS.items():
            name = rows.field_of(figure)
            if (value := row.get(name)) is None:
                continue
            low, high = row.get(f"{name}_low"), row.get(f"{name}_high")
            if metric.source == "sample":
                found = [sample_values(figure, sample, row["requests"]) for sample in samples.get(row["case"], ())]
                # The steps of one repetition are no repetitions: they have no interval.
                each = [values[0] for values in found if len(values) == 1]
                low, high = (median_bounds(each) if len(each) == len(found) else None) or (None, None)
            yield machine, row["case"], options, figure, value, low, high


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

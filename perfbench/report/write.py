"""`perfbench report`'s formats, and how its file is written: whole or not at all. Free of torch."""

from __future__ import annotations

import csv
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.report import columns, html, rows, table
from perfbench.report.read import Run
from perfbench.report.steadiness import drift

_SAMPLE_FIELDS = (
    "process", "round", "unix_time_s", "total_ms", "ttft_ms", "itl_ms", "decode_tokens_per_s", "tokens_per_s",
    "energy_mj", "sm_clock_mhz",
)  # fmt: skip


def render(runs: Sequence[Run], format: str, *, samples: bool = False) -> bytes:
    """The report in one of FORMATS; with `samples`, csv and parquet have a row for each repetition, not each case.

    PerfbenchError on another format, on `samples` with html or markdown, and where parquet lacks its library.
    """
    if format not in FORMATS:
        raise PerfbenchError(f"--format: unknown format {format!r}; {nearest(format, FORMATS)}")
    if samples and format not in _ROW_FORMATS:
        raise PerfbenchError(f"--samples: {format} shows figures of cases; expected --format csv or parquet")
    if format in _ROW_FORMATS:
        return _ROW_FORMATS[format](list(sample_rows(runs) if samples else case_rows(runs)))
    return _PAGE_FORMATS[format](runs).encode()


def case_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """One flat row for each case: its run, when, on which commit, then the figures of `perfbench show --format csv`."""
    for run in runs:
        manifest = run.manifest
        checkout = manifest["environment"].get("checkout") or {}
        head = {
            "run": run.label,
            "started_at": manifest["started_at"],
            "finished_at": manifest.get("finished_at"),
            "commit": checkout.get("commit"),
            "scenario": manifest["scenario"].get("name"),
        }
        for row in rows.rows(manifest):
            yield head | row


def sample_rows(runs: Sequence[Run]) -> Iterator[dict[str, Any]]:
    """One flat row for each valid repetition; `itl_ms` is the list of its times between tokens."""
    for run in runs:
        for row in rows.rows(run.manifest):
            identity = {key: row[key] for key in ("comparison", "case", "arm", "method", "kernels")}
            for sample in run.samples[row["case"]]:
                yield {"run": run.label} | identity | {field: sample[field] for field in _SAMPLE_FIELDS}


def _markdown(runs: Sequence[Run]) -> str:
    """The tables of the runs for a pull request, with what is odd and whether the time between tokens was steady."""
    lines = []
    for run in runs:
        lines += [f"### {columns.plain(run.label)}", ""] if len(runs) > 1 else []
        lines += [f"> {columns.plain(notice)}\n" for notice in run.notices]
        lines += [table.render(run.manifest, "markdown") or "", *_steadiness(run), ""]
    return "\n".join(lines).rstrip() + "\n"


def _steadiness(run: Run) -> Iterator[str]:
    """Which cases' time between tokens shifted during the run, in one line."""
    timed = [(row["case"], run.samples[row["case"]]) for row in rows.rows(run.manifest) if row["rounds"]]
    chart = drift(timed, points=1)
    if chart is None:
        return
    shifted = [f"{row[0]} {row[1]}" for row in chart.rows if row[3] is not None and row[1].startswith("shifts")]
    of = f"{len(shifted)} of {len(chart.rows)} cases"
    yield columns.plain(f"Time between tokens over the repetitions: the level of {of} shifts. {'; '.join(shifted)}")


def _csv(rows: list[dict[str, Any]]) -> bytes:
    """As CSV; a list becomes its values, separated by spaces."""
    text = io.StringIO()
    if rows:
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            flat = {key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
            writer.writerow(flat)
    return text.getvalue().encode()


def _parquet(rows: list[dict[str, Any]]) -> bytes:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PerfbenchError(
            "--format parquet: needs pyarrow, which is not installed; pip install 'adapter-perfbench[parquet]', "
            "or use csv"
        ) from None
    columns = {name: _one_type([row[name] for row in rows]) for name in (rows[0] if rows else ())}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _one_type(values: list[Any]) -> list[Any]:
    """A figure may be whole in one row and broken in another: then all of its column is."""
    broken = any(isinstance(value, float) for value in values)
    return [float(value) if broken and value is not None else value for value in values]


_PAGE_FORMATS: dict[str, Callable[[Sequence[Run]], str]] = {"html": html.render, "markdown": _markdown}
_ROW_FORMATS: dict[str, Callable[[list[dict[str, Any]]], bytes]] = {"csv": _csv, "parquet": _parquet}
FORMATS = (*_PAGE_FORMATS, *_ROW_FORMATS)


def write(path: Path, content: bytes) -> None:
    """Puts `content` in the place of `path`, as a whole or not at all. PerfbenchError where that can't be done."""
    if path.is_dir():
        raise PerfbenchError(f"--out {path}: is a folder; expected the name of a file")
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError as error:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        reason = error.strerror or str(error)
        raise PerfbenchError(f"--out {path}: can't be written ({reason}); give a file that you can write to") from None


def _umask() -> int:
    """The mask of this process: the temporary file is private, the report is as any file the user makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Runs as `perfbench report` gives them, in every format, and how its file is written: whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import named
from perfbench.report import rows, table, tables
from perfbench.report.read import Run
from perfbench.report.steadiness import drift


@dataclass(frozen=True)
class RunsReport:
    """Several runs as a Subject of formats."""

    runs: Sequence[Run]

    def print(self, console: Any) -> None:
        """The table of each."""
        for run in self.runs:
            for line in ([run.label] if len(self.runs) > 1 else []) + list(run.notices):
                console.print(line, markup=False)
            table.RunTable(run.manifest).print(console)

    def markdown(self) -> str:
        """Their tables for a pull request, with what is odd and whether the time between tokens was steady."""
        lines = []
        for run in self.runs:
            lines += [f"### {tables.plain(run.label)}", ""] if len(self.runs) > 1 else []
            lines += [f"> {tables.plain(notice)}\n" for notice in run.notices]
            lines += [table.RunTable(run.manifest).markdown(), *_steadiness(run), ""]
        return "\n".join(lines).rstrip() + "\n"

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each case."""
        return list(case_rows(self.runs))

    def page(self) -> str:
        """Verdicts, charts with intervals, environment."""
        from perfbench.report import html

        return html.render(self.runs)


@dataclass(frozen=True)
class SampleRows:
    """The repetitions of several runs as a Subject that has rows alone."""

    runs: Sequence[Run]

    def records(self) -> list[dict[str, Any]]:
        """A flat row for each valid repetition."""
        return list(sample_rows(self.runs))

    def print(self, console: Any) -> None:
        """Refused."""
        raise _no_samples()

    def markdown(self) -> str:
        """Refused."""
        raise _no_samples()

    def page(self) -> str:
        """Refused."""
        raise _no_samples()


def _no_samples() -> PerfbenchError:
    return PerfbenchError("--samples: this format shows figures of cases; expected --format csv, json or parquet")


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
    figures = (name for name, metric in named("sample").items() if metric.take is None)
    fields = ("process", "round", "unix_time_s", *figures, "energy_mj", "sm_clock_mhz")
    for run in runs:
        for row in rows.rows(run.manifest):
            identity = {key: row[key] for key in ("comparison", "case", "arm", "method", "kernels")}
            for sample in run.samples[row["case"]]:
                yield {"run": run.label} | identity | {field: sample.get(field) for field in fields}


def _steadiness(run: Run) -> Iterator[str]:
    """Which cases' time between tokens shifted during the run, in one line."""
    timed = [(row["case"], run.samples[row["case"]]) for row in rows.rows(run.manifest) if row["rounds"]]
    chart = drift(timed, points=1)
    if chart is None:
        return
    shifted = [f"{row[0]} {row[1]}" for row in chart.rows if row[3] is not None and row[1].startswith("shifts")]
    of = f"{len(shifted)} of {len(chart.rows)} cases"
    yield tables.plain(f"Time between tokens over the repetitions: the level of {of} shifts. {'; '.join(shifted)}")

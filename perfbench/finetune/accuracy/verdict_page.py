"""The page: accuracy against speed against memory, as served. One HTML file that opens offline. Free of torch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.errors import RunDirectoryError
from perfbench.finetune.accuracy import recommendation, verdict_words
from perfbench.finetune.accuracy.paths import AS_TRAINED
from perfbench.finetune.accuracy.verdict import MethodRow, Verdict
from perfbench.report import rows
from perfbench.report import words as run_words
from perfbench.report.chart import Chart
from perfbench.report.html import flatten
from perfbench.report.page import page
from perfbench.report.read import Run, read_runs

_MIB = 2**20


@dataclass(frozen=True)
class Point:
    """One method: its `score` on a task in percent, `speed` in tokens/s, `peak_mib` (None where it was not measured).

    A point is dominated where another is at least as good in all three, and better in one."""

    name: str
    score: float
    speed: float
    peak_mib: float | None

    def dominates(self, other: Point) -> bool:
        """Whether nobody would choose `other` for any of the three."""
        ours, theirs = self._values(other), other._values(self)
        return all(a >= b for a, b in zip(ours, theirs, strict=True)) and ours != theirs

    def _values(self, other: Point) -> tuple[float, ...]:
        known = self.peak_mib is not None and other.peak_mib is not None
        return (self.score, self.speed, -(self.peak_mib or 0) if known else 0)


def front(points: Sequence[Point]) -> list[Point]:
    """The Pareto front: those that no other dominates, the slowest first."""
    kept = [one for one in points if not any(other.dominates(one) for other in points)]
    return sorted(kept, key=lambda point: point.speed)


def read_run(path: Path, methods: Collection[str]) -> Run:
    """A `perfbench run` whose arms have these methods. RunDirectoryError where it has none of them."""
    (run,) = read_runs([path])
    arms = {row["method"] for row in rows.rows(run.manifest) if row["decode_tokens_per_s"] is not None}
    if arms.isdisjoint(methods):
        raise RunDirectoryError(
            f"{path}: expected measured arms of {', '.join(sorted(methods))}, got {', '.join(sorted(arms)) or 'none'}; "
            "give a run of a scenario with these methods"
        )
    return run


def render(manifest: Mapping[str, Any], verdict: Verdict, run: Run | None) -> str:
    """The page as text. `run`: where speeds and memory come from; without one the page says that they are missing."""
    charts: list[Sequence[Chart]] = []
    sections = []
    tasks = list(dict.fromkeys(row.task for row in verdict.methods))
    advice = list(recommendation.sentences(manifest, verdict, run)) if run else []
    joined = [chart for task in tasks for chart in _joined(manifest, verdict, task, run)] if run else []
    if joined:
        sections.append({"title": "Accuracy, speed and memory", "charts": len(charts)})
        charts.append(joined)
    sections.append({"title": "Accuracy and size of the adapter", "charts": len(charts)})
    charts.append([_by_size(manifest, verdict, task) for task in tasks])
    groups = []
    for task in tasks:
        groups.append({
            "title": task,
            "tables": list(_tables(manifest, verdict, task)),
            "lines": [],
            "charts": len(charts),
        })  # fmt: skip
        charts.append(list(_of_task(verdict, task)))
    return page(
        title=f"{manifest['name']}: accuracy as served",
        lead=list(_lead(manifest, run)),
        notices=list(_notices(manifest, verdict, run)),
        verdicts=[
            {
                "title": manifest["question"],
                "sentences": [verdict_words.headline(verdict), *verdict_words.findings(verdict)],
            },
            *([{"title": "What to serve", "sentences": advice}] if advice else []),
        ],
        sections=sections,
        comparisons=groups,
        comparisons_title="The task" if len(tasks) == 1 else "The tasks",
        open_first=len(tasks),
        environments=[_environment(manifest, run)],
        legend=verdict_words.legend(verdict),
        charts=charts,
        colors={method: place for place, method in enumerate(_methods(verdict), start=1)},
    )


def _methods(verdict: Verdict) -> list[str]:
    return list(dict.fromkeys(row.method for row in verdict.methods))


def _lead(manifest: Mapping[str, Any], run: Run | None) -> Iterator[str]:
    one = manifest["config"]["entries"][0]["finetune"]
    checkout = manifest["environment"].get("checkout") or {}
    changed = " with changes" if checkout.get("dirty") else ""
    yield (
        f"{one['backbone']}, trained in {one['dtype']}, seeds {', '.join(map(str, one['seeds']))}, "
        f"beams {one['beams']}; {manifest['environment']['device_kind']}; started {manifest['started_at']}, commit "
        f"{str(checkout.get('commit') or 'unknown')[:12]}{changed}, perfbench {manifest['perfbench_version']}."
    )
    if run is not None:
        backbones = ", ".join(dict.fromkeys(str(one["backbone"]) for one in run.manifest["comparisons"]))
        yield f"Speeds and memory: run {run.label}, started {run.manifest['started_at']}, of {backbones}."


def _notices(manifest: Mapping[str, Any], verdict: Verdict, run: Run | None) -> Iterator[str]:
    yield from verdict_words.left_out(manifest)
    if run is None:
        yield "No speeds: give a `perfbench run` directory of these methods with --run to see accuracy beside them."
        return
    yield from run.notices
    trained = manifest["config"]["entries"][0]["finetune"]["backbone"]
    if any(one["backbone"] != trained for one in run.manifest["comparisons"]):
        yield (
            f"Accuracy was measured on {trained}, speed on another backbone: points join a method's two figures, not "
            "two figures of one system."
        )
    measured = {row["method"] for row in rows.rows(run.manifest) if row["decode_tokens_per_s"] is not None}
    methods = {entry["method"]: entry["finetune"]["method"] for entry in manifest["config"]["entries"]}
    missing = [label for label, method in methods.items() if method not in measured]
    if missing:
        yield f"Without a speed in {run.label}: {', '.join(missing)}."
    entries = {
        entry["method"]: entry["finetune"] for entry in manifest["config"]["entries"] if entry["method"] not in missing
    }
    cases = run.manifest["cases"].values()
    if others := [
        label for label, own in entries.items() if not any(recommendation.is_same(case, own) for case in cases)
    ]:
        yield f"Measured in {run.label} with other options than were trained: {', '.join(others)}."


def _joined(manifest: Mapping[str, Any], verdict: Verdict, task: str, run: Run) -> Iterator[Chart]:
    """A chart for each comparison of the run that has these methods."""
    methods = {entry["method"]: entry["finetune"]["method"] for entry in manifest["config"]["entries"]}
    scored = {row.method: row for row in verdict.methods if row.task == task}
    for comparison, group in rows.groups(run.manifest):
        points = []
        for kernels in dict.fromkeys(row["kernels"] for row in group):
            for label, row in scored.items():
                arms = [arm for arm in group if arm["kernels"] == kernels and arm["decode_tokens_per_s"] is not None]
                arm = next((a for a in arms if a["arm"] == label), None)
                arm = arm or next((a for a in arms if a["method"] == methods[label]), None)
                if arm is not None:
                    several = len({one["kernels"] for one in group}) > 1
                    points.append((_point(row, arm, f"{label}, {kernels}" if several else label), row))
        if points:
            title = run_words.title(comparison, run.manifest["comparisons"])
            yield _scatter(task, title, points)


def _point(row: MethodRow, arm: Mapping[str, Any], name: str) -> Point:
    peak = arm["peak_allocated_bytes"]
    return Point(name, row.test.median * 100, arm["decode_tokens_per_s"], None if peak is None else peak / _MIB)


def _scatter(task: str, title: str, points: Sequence[tuple[Point, MethodRow]]) -> Chart:
    best = front([point for point, _ in points])
    return Chart(
        "scatter",
        f"{task}: accuracy against speed against memory",
        f"{task}, % of the test items",
        ("method", "decode tokens/s", "test %", "lowest seed", "highest seed", "peak MiB", "on the front"),
        [
            (
                point.name, point.speed, point.score, min(row.test.seeds) * 100, max(row.test.seeds) * 100,
                point.peak_mib, "yes" if point in best else "no",
            )
            for point, row in points
        ],
        f"{title}. Ringed: the Pareto front of score, speed and peak memory, by medians; differences "
        "within their intervals are ties. The line through a point: lowest to highest seed.",
        {"x": "decode tokens/s, higher is better"},
    )  # fmt: skip


def _by_size(manifest: Mapping[str, Any], verdict: Verdict, task: str) -> Chart:
    found = []
    for row in (row for row in verdict.methods if row.task == task):
        facts = next(iter(manifest["adapters"][task][row.method].values()))
        # Fewer is better: as a speed it counts backwards.
        found.append((Point(row.method, row.test.median * 100, -facts["trainable_parameters"], None), row))
    best = front([point for point, _ in found])
    return Chart(
        "scatter",
        f"{task}: accuracy against trained parameters",
        f"{task}, % of the test items",
        ("method", "trained parameters", "test %", "lowest seed", "highest seed", "", "on the front"),
        [
            (
                point.name, -point.speed, point.score, min(row.test.seeds) * 100, max(row.test.seeds) * 100, None,
                "yes" if point in best else "no",
            )
            for point, row in found
        ],
        "Counts are exact. Ringed: no other method scores at least as much with fewer parameters, by medians. The line "
        "through a point: lowest to highest seed.",
        {"x": "trained parameters, fewer is better"},
    )  # fmt: skip


def _of_task(verdict: Verdict, task: str) -> Iterator[Chart]:
    mine = [row for row in verdict.methods if row.task == task]
    yield Chart(
        "dots",
        "Test score of each method, as trained",
        "% of the test items, higher is better",
        ("method", "median of seeds", "lowest", "highest"),
        [(row.method, row.test.median * 100, min(row.test.seeds) * 100, max(row.test.seeds) * 100) for row in mine],
        "The line: lowest to highest seed.",
        {"unit": "%"},
    )
    # Where all predictions are the trained model's, its difference stands for both.
    equal = {
        (row.task, row.method, row.path)
        for row in verdict.paths
        if row.exact and not row.changed and row.anchor.startswith(AS_TRAINED)
    }
    differences = [
        (f"{row.method}, {path}", paired.difference * 100, paired.low * 100, paired.high * 100)
        for row in mine
        for path, paired in row.versus.items()
        if (row.task, row.method, path) not in equal
    ]
    if differences:
        yield Chart(
            "dots",
            f"Difference to {verdict.reference} on the same path",
            "points, higher is better",
            ("method, path", "difference", "low", "high"),
            differences,
            f"Paired by test item, with 95% intervals; to pass they must lie above -{verdict.margin * 100:g} points.",
            {"reference": 0},
        )


def _tables(manifest: Mapping[str, Any], verdict: Verdict, task: str) -> Iterator[dict[str, Any]]:
    mine = [verdict_words.method_cells(row, manifest, verdict.reference) for row in verdict.methods if row.task == task]
    mine = [*verdict_words.zero_shot_cells(task, verdict, manifest), *mine]
    yield _table(f"Against {verdict.reference}", verdict_words.METHOD_HEADS, mine, text=(0, 9))
    served = [verdict_words.path_cells(row) for row in verdict.paths if row.task == task]
    if served:
        yield _table("Served against trained", verdict_words.PATH_HEADS, served, text=(0, 1, 6))


def _table(caption: str, heads: Sequence[str], cells: Sequence[Sequence[str]], text: Sequence[int]) -> dict[str, Any]:
    columns = [{"head": head, "text": place in text} for place, head in enumerate(heads)]
    return {"caption": caption, "columns": columns, "rows": cells}


def _environment(manifest: Mapping[str, Any], run: Run | None) -> dict[str, Any]:
    """Settings of the fine-tunings and what all ran on; beside it what the speeds were measured on."""
    one = {key: value for key, value in manifest["config"]["entries"][0]["finetune"].items() if key != "question"}
    ours = flatten(one, "training") | flatten(manifest["config"]["serve"], "serve") | flatten(manifest["environment"])
    theirs = flatten(run.manifest["environment"]) if run else {}
    heads = ["", "accuracy", *([run.label] if run else [])]
    names = list(dict.fromkeys((*ours, *theirs)))
    lines = [
        {"name": name, "cells": [ours.get(name, "-"), *([theirs.get(name, "-")] if run else [])], "differs": False}
        for name in names
    ]
    return {"title": "Settings and environment", "heads": heads, "rows": lines, "note": _trained_apart(manifest)}


def _trained_apart(manifest: Mapping[str, Any]) -> str:
    """Whether all methods were trained alike, which the table of settings shows for the first of them."""
    fields = ("learning_rate", "epochs", "batch", "patience", "evaluate_every", "max_tokens")
    entries = manifest["config"]["entries"]
    apart = []
    for field in fields:
        values = {entry["method"]: entry["finetune"][field] for entry in entries}
        if len(set(values.values())) > 1:
            apart.append(f"{field}: {', '.join(f'{method} {value:g}' for method, value in values.items())}")
    shown = "Training is shown for the first method."
    return f"{shown} What differs between them: {'; '.join(apart)}." if apart else f"{shown} All were trained alike."

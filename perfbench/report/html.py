"""Runs as one HTML page: the answer first, then what it rests on. Free of torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from perfbench.figures.stats import TAILS
from perfbench.report import columns, rows, tables, words
from perfbench.report.chart import Chart
from perfbench.report.comparison_charts import arms_of, charts_of, comparison_notes
from perfbench.report.page import page
from perfbench.report.read import Run
from perfbench.report.run_charts import Point, across_runs, scaling
from perfbench.run_folder.run_schema import Manifest

# Comparisons that are open at first, and verdicts shown one by one; more are summed up in words.
OPEN_FIRST, VERDICTS = 3, 6
_TAILS = (
    "Tails: percentiles of the time to the first token (ttft) over the repetitions, and of the time between two tokens "
    f"(itl) over all their steps. A p95 needs {TAILS['p95'][1]:,} values and a p99 {TAILS['p99'][1]:,}; a dash stands "
    "where there are fewer."
)
# Points of drift in the whole page, so that a thousand cases stay under 3 MB.
_DRIFT_POINTS = 40_000


def render(runs: Sequence[Run]) -> str:
    """The page of these runs, as text."""
    cases = sum(len(run.manifest["cases"]) for run in runs)
    drift_points = max(10, min(60, _DRIFT_POINTS // max(1, cases)))
    charts: list[Sequence[Chart]] = []
    points: list[Point] = []
    comparisons, verdicts = [], []
    summed_up = sum(len(run.manifest["comparisons"]) for run in runs) > VERDICTS
    for run in runs:
        for comparison, group in rows.groups(run.manifest):
            arms = arms_of(group, run.manifest["cases"], run.samples)
            points.append(Point(run, comparison, arms))
            found = charts_of(comparison, [arm for arm in arms if arm.samples], drift_points)
            shown = words.title(comparison, run.manifest["comparisons"])
            shown = f"{run.label}: {shown}" if len(runs) > 1 else shown
            sentences = list(words.conclusion(group))
            comparisons.append({
                "title": shown,
                "tables": list(_tables(run.manifest, group)),
                "lines": [
                    words.hardware(run.manifest, comparison, group),
                    *(sentences if summed_up else ()),
                    *_reasons(group),
                    *comparison_notes(arms),
                ],
                "charts": len(charts) if found else None,
            })  # fmt: skip
            if found:
                charts.append(found)
            verdicts.append({"title": shown, "sentences": sentences or ["Nothing was measured."], "group": group})
    sections = []
    for heading, several in (
        ("Scaling", list(scaling(points))),
        ("The same comparison in several runs", list(across_runs(points))),
    ):
        if several:
            sections.append({"title": heading, "charts": len(charts)})
            charts.append(several)
    return page(
        title=_title(runs),
        lead=list(_lead(runs)),
        notices=[f"{run.label}: {notice}" if len(runs) > 1 else notice for run in runs for notice in run.notices],
        verdicts=[_overall(verdicts)] if summed_up else verdicts,
        sections=sections,
        comparisons=comparisons,
        comparisons_title="The comparison" if len(comparisons) == 1 else "The comparisons",
        open_first=OPEN_FIRST,
        environments=[_environment(runs)],
        legend=max((words.legend(run.manifest) for run in runs), key=len),
        charts=charts,
        colors=_colors(points),
    )


def _title(runs: Sequence[Run]) -> str:
    names = list(dict.fromkeys(str(run.manifest["scenario"].get("name")) for run in runs))
    return f"{', '.join(names)}: {len(runs)} runs" if len(runs) > 1 else names[0]


def _lead(runs: Sequence[Run]) -> Iterator[str]:
    """The question, then what each run is."""
    yield from dict.fromkeys(str(run.manifest["scenario"].get("question") or "") for run in runs)
    for run in runs:
        manifest = run.manifest
        commit = (manifest["environment"].get("checkout") or {}).get("commit") or "unknown"
        changed = " with changes" if (manifest["environment"].get("checkout") or {}).get("dirty") else ""
        yield (
            f"Run {run.label}: {len(manifest['cases'])} cases, started {manifest['started_at']}, "
            f"commit {commit[:12]}{changed}, perfbench {manifest['perfbench_version']}."
        )


def _overall(verdicts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Many verdicts in words: how often each arm kept most, ties included, and how much it kept."""
    kept: dict[str, list[float]] = {}
    best: Counter[str] = Counter()
    contests = 0
    for verdict in verdicts:
        measured = [row for row in verdict["group"] if row["kept_decode_tokens_per_s"] is not None]
        contests += len(measured) > 1
        for row in measured:
            kept.setdefault(row["arm"], []).append(row["kept_decode_tokens_per_s"])
            best[row["arm"]] += len(measured) > 1 and words.is_best(row, measured)
    sentences = [
        f"{arm} kept {min(kept[arm]):.1%} to {max(kept[arm]):.1%} of the bare backbone's decode speed; it kept most, "
        f"or tied with what did, in {best[arm]} of {contests} comparisons of several methods."
        for arm in sorted(kept, key=lambda arm: (-best[arm], -median(kept[arm])))
    ]
    failed = sum(row["status"] != "ok" for verdict in verdicts for row in verdict["group"])
    wrong = [f"{failed} cases were not measured; their reasons stand with their comparison."] if failed else []
    sentences = sentences or ["Nothing was measured beside a bare backbone."]
    return {"title": f"{len(verdicts)} comparisons", "sentences": [*sentences, *wrong]}


def _tables(manifest: Manifest, group: Sequence[rows.Row]) -> Iterator[dict[str, Any]]:
    """The terminal's table of one comparison, its tails, and the paper's figures where its setting matches."""
    shown = [*columns.columns_of(group), tables.Column("check", lambda row: row["check"], text=True)]
    yield _table("", shown, group)
    if any(row["rounds"] for row in group):
        yield _table(_TAILS, columns.columns_of(group, "tails"), group)
    paper, beside = rows.paper_of(manifest), [row for row in group if row["paper"]]
    if paper and beside:
        theirs = [shown[0], *columns.paper_columns(paper)]
        yield _table(words.paper_title(paper), theirs, beside)


def _table(caption: str, columns: Sequence[tables.Column], group: Sequence[rows.Row]) -> dict[str, Any]:
    rows = [[column.cell(row) for column in columns] for row in group]
    return {"caption": caption, "columns": columns, "rows": rows}


def _reasons(group: Sequence[rows.Row]) -> Iterator[str]:
    for row in group:
        if row["reason"]:
            yield f"{columns.arm_name(row, group)}: {rows.verdict(row)}"


def _colors(points: Sequence[Point]) -> dict[str, int]:
    """Arm -> place in the palette: 0 for bare backbones, the others in the order in which they come."""
    colors: dict[str, int] = {}
    for point in points:
        for arm in point.arms:
            taken = sum(place > 0 for place in colors.values())
            colors.setdefault(arm.name, 0 if arm.row["method"] == "none" else taken + 1)
    return colors


def _environment(runs: Sequence[Run]) -> dict[str, Any]:
    """What the runs ran on, a column for each; rows that differ are marked."""
    flat = [flatten(run.manifest["environment"]) for run in runs]
    names = list(dict.fromkeys(name for one in flat for name in one))
    cells = {name: [one.get(name, "-") for one in flat] for name in names}
    rows = [{"name": name, "cells": values, "differs": len(set(values)) > 1} for name, values in cells.items()]
    differing = sum(len(set(values)) > 1 for values in cells.values())
    note = f"{differing} lines differ between the runs; they are marked." if differing else ""
    return {"title": "The environment", "heads": ["", *(run.label for run in runs)], "rows": rows, "note": note}


def flatten(value: Any, name: str = "") -> dict[str, str]:
    """{"a.b": text} of nested data; lists of plain values as one text, what is empty left out."""
    if isinstance(value, Mapping):
        inner: Any = value.items()
    elif isinstance(value, list) and any(isinstance(member, (Mapping, list)) for member in value):
        inner = enumerate(value)
    else:
        text = value if isinstance(value, str) else json.dumps(value)
        text = ", ".join(map(str, value)) if isinstance(value, list) else text
        return {} if value in (None, "", []) else {name: text}
    found: dict[str, str] = {}
    for key, member in inner:
        found |= flatten(member, f"{name}.{key}" if name else str(key))
    return found

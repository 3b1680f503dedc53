"""Charts over several comparisons: how figures scale with one field of the workload, and how runs agree."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.report.chart import Chart
from perfbench.report.comparison_charts import Arm, percent_kept
from perfbench.report.read import Run
from perfbench.report.words import title, where

# Field of the workload -> (what its axis says, the sets of fields that may go along with it, holding the same value).
_AXES: dict[str, tuple[str, tuple[tuple[str, ...], ...]]] = {
    "tenants": ("tenants in the batch", ((), ("resident",))),
    "resident": ("resident tenants", ((),)),
    "requests": ("requests in the batch (rows with one beam)", ((), ("tenants",), ("tenants", "resident"))),
    "beams": ("beams of a request", ((),)),
    "prompt_tokens": ("prompt tokens", ((),)),
    "new_tokens": ("new tokens", ((),)),
}


@dataclass(frozen=True)
class Point:
    """One comparison of one run with its measured arms."""

    run: Run
    comparison: Mapping[str, Any]
    arms: Sequence[Arm]


def scaling(points: Sequence[Point]) -> Iterator[Chart]:
    """Two charts, speed and kept, for each set of comparisons of a run that differ in one field only."""
    for field, (label, companions) in _AXES.items():
        for along in companions:
            sets: dict[Any, list[Point]] = {}
            for point in points:
                load = point.comparison["workload"]
                if load.get(field) is not None and all(load.get(key) == load[field] for key in along):
                    sets.setdefault(_rest(point, field, along), []).append(point)
            for alike in sets.values():
                if len(alike) > 1:
                    alike.sort(key=lambda one: one.comparison["workload"][field])
                    yield from _scaling(field, label, along, alike)


def _rest(point: Point, field: str, along: tuple[str, ...]) -> Any:
    """All that has to be equal for two comparisons to differ in `field`, and those `along` with it, alone."""
    load = point.comparison["workload"]
    others = tuple((key, str(load[key])) for key in sorted(load) if key != field and key not in along)
    return (point.run.label, where(point.comparison), others)


def _scaling(field: str, label: str, along: tuple[str, ...], points: Sequence[Point]) -> Iterator[Chart]:
    speed, kept = [], []
    for point in points:
        x = point.comparison["workload"][field]
        for arm in point.arms:
            metric, share = "decode_tokens_per_s", "kept_decode_tokens_per_s"
            speed.append((arm.name, x, arm.row[metric], *arm.bounds(metric)))
            if arm.row[share] is not None:
                kept.append((arm.name, x, *percent_kept(arm.row)))
    subject = _subject(points[0], field, along)
    for rows, what, axis in (
        (speed, "Decode speed", "tokens/s, higher is better"),
        (kept, "Share of the bare backbone's speed kept", "% of the bare backbone, higher is better"),
    ):
        if rows:
            yield Chart(
                "lines",
                f"{what} by {label}",
                axis,
                ("method", label, axis.split(",")[0], "low", "high"),
                rows,
                f"{subject}. Medians with 95% intervals.",
                {"x": label},
            )


def _subject(point: Point, field: str, along: tuple[str, ...]) -> str:
    """What the points have in common."""
    load = point.comparison["workload"]
    moving = {field, *along}
    shown = ("prompt_tokens", "new_tokens", "beams", "requests", "tenants", "resident")
    fixed = [f"{key.removesuffix('_tokens').replace('_', ' ')} {load[key]}" for key in shown if key not in moving]
    return f"{point.run.label}: {where(point.comparison)}; {', '.join(fixed)}"


def across_runs(points: Sequence[Point]) -> Iterator[Chart]:
    """For each comparison that several runs measured: what each of them says that the arms kept, or their speed where
    there is nothing to keep."""
    by_id: dict[str, list[Point]] = {}
    for point in points:
        by_id.setdefault(point.comparison["id"], []).append(point)
    for alike in by_id.values():
        if len(alike) > 1:
            yield _across(alike)


def _across(points: Sequence[Point]) -> Chart:
    kept = any(arm.row["kept_decode_tokens_per_s"] is not None for point in points for arm in point.arms)
    metric = "kept_decode_tokens_per_s" if kept else "decode_tokens_per_s"
    rows = [
        (f"{arm.name}, {point.run.label}", *(percent_kept(arm.row) if kept else [arm.row[metric], *arm.bounds(metric)]))
        for point in points
        for arm in point.arms
        if arm.row[metric] is not None
    ]
    rows.sort(key=lambda row: str(row[0]))
    what = "share of the bare backbone's speed kept" if kept else "decode speed"
    axis = "% of the bare backbone, higher is better" if kept else "tokens/s, higher is better"
    return Chart(
        "dots",
        f"The same comparison in several runs: {what}",
        axis,
        ("method, run", axis.split(",")[0], "low", "high"),
        rows,
        f"{title(points[0].comparison, [point.comparison for point in points])}. Medians with 95% intervals: "
        "where runs differ by more than these, what differs between processes is larger than the noise within one.",
        {"unit": "%"} if kept else {},
    )

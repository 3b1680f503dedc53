"""The times between tokens: how they are distributed, and whether their level stays over the repetitions."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from perfbench.figures.change_points import FEWEST, largest_change
from perfbench.report.chart import Chart

BINS = 48
# A shift counts when chance seldom does as much and it is as large as what a gate looks for.
LEVEL, LEAST_SHIFT = 0.01, 0.03
Timed = Sequence[tuple[str, Sequence[dict[str, Any]]]]


def inter_token_times(arms: Timed) -> Chart | None:
    """A histogram for each arm, all on one axis that ends at the 99.5th percentile of the slowest arm."""
    times = {name: sorted(ms for sample in samples for ms in sample["itl_ms"]) for name, samples in arms}
    times = {name: values for name, values in times.items() if len(values) > 1}
    if not times:
        return None
    low = min(values[0] for values in times.values())
    high = max(_percentiles(values)[-1] for values in times.values())
    high = high if high > low else low * 1.01 + 1e-9
    edges = [low + (high - low) * place / BINS for place in range(1, BINS)]
    rows, counts, beyond = [], [], 0
    for name, values in times.items():
        p5, p25, p50, p75, p95, p99, _ = _percentiles(values)
        below = [0, *(bisect_left(values, edge) for edge in edges), bisect_right(values, high)]
        counts.append([end - start for start, end in pairwise(below)])
        beyond += len(values) - below[-1]
        rows.append((name, p50, p5, p25, p75, p95, p99, values[-1]))
    total = sum(map(len, times.values()))
    note = f"{beyond:,} of {total:,} steps lie right of the axis; the longest are in the table." if beyond else ""
    return Chart(
        "histogram",
        "Time between tokens: its distribution",
        "ms between two tokens, lower is better",
        ("method", "median", "5%", "25%", "75%", "95%", "99%", "longest"),
        rows,
        f"How often each time occurs, over all steps of all repetitions; the mark is the median. {note}".strip(),
        {"low": low, "high": high, "counts": counts},
    )


def _percentiles(ordered: Sequence[float]) -> list[float]:
    """5, 25, 50, 75, 95, 99 and 99.5%."""
    cuts = quantiles(ordered, n=200, method="inclusive")
    return [cuts[at - 1] for at in (10, 50, 100, 150, 190, 198, 199)]


def drift(arms: Timed, points: int) -> Chart | None:
    """The median time between tokens of each repetition, in the order they were taken, at most `points` for an arm."""
    rows, series = [], []
    for name, samples in arms:
        levels = [median(sample["itl_ms"]) for sample in samples]
        if not levels:
            continue
        rows.append((name, *_verdict(levels)))
        middle = median(levels)
        series.append([100 * (level / middle - 1) for level in _thinned(levels, points)])
    if not rows:
        return None
    shifted = [f"{row[0]} {row[1]}" for row in rows if str(row[1]).startswith("shifts")]
    judged = any(row[2] is not None for row in rows)
    answer = f"{'; '.join(shifted)}." if shifted else "No level shifts." if judged else "Too few rounds to say."
    longest = max(len(samples) for _, samples in arms)
    thinned = f" Each point is the median of neighbouring rounds, {points} points at most." if longest > points else ""
    return Chart(
        "drift",
        "Time between tokens over the repetitions: does its level stay?",
        "% off the method's own median",
        ("method", "verdict", "shift %", "at round", "p"),
        rows,
        f"{answer} One point a repetition, in the order taken.{thinned} A shift is called where Pettitt's test gives "
        f"p < {LEVEL} and the level moves by {LEAST_SHIFT:.0%} or more. Methods that shift together had "
        "a machine that changed, which comparing within a round cancels.",
        {"series": series, "rounds": longest},
    )


def _verdict(levels: Sequence[float]) -> tuple[str, float | None, int | None, float | None]:
    """(in words, the shift in %, the round before which it lies, its p-value)"""
    change = largest_change(levels)
    if change is None:
        return f"fewer than {FEWEST} rounds: can't say", None, None, None
    shift = 100 * (change.ratio - 1)
    found = change.p_value < LEVEL and abs(change.ratio - 1) >= LEAST_SHIFT
    words = f"shifts by {shift:+.1f}% at round {change.index + 1}" if found else "steady"
    return words, shift, change.index + 1, change.p_value


def _thinned(values: Sequence[float], points: int) -> Iterable[float]:
    """`values`, or the medians of `points` runs of neighbours where there are more."""
    if len(values) <= points:
        return values
    edges = [round(place * len(values) / points) for place in range(points + 1)]
    return [median(values[start:end]) for start, end in pairwise(edges)]

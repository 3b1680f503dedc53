"""Summaries, ratios within a round, and their intervals, in plain Python. Free of torch."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Interval = dict[str, float | int | None]

# With fewer rounds an interval covers less than it says (48% of two, 74% of three), so none is given, and the best of
# several arms is mostly luck.
LEAST_ROUNDS = 6


def summary(values: Sequence[float]) -> Interval:
    """`min`, `max`, `mean`, `stddev`, `median`, `iqr`, `q1`, `q3`, `rounds` of `values`, in their own unit.

    The names are pytest-benchmark's; `rounds` is the number of values. `stddev` (of a sample: n - 1) is None
    for a single value, which says nothing about spread. Raises ValueError on no values or one not finite.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("summary: expected at least one value, got none")
    if not all(map(math.isfinite, ordered)):
        raise ValueError("summary: expected finite values only, got a NaN or an infinity")
    single = len(ordered) == 1
    q1, median, q3 = ordered * 3 if single else statistics.quantiles(ordered, n=4, method="inclusive")
    return {
        "min": ordered[0],
        "max": ordered[-1],
        "mean": statistics.fmean(ordered),
        "stddev": None if single else statistics.stdev(ordered),
        "median": median,
        "iqr": q3 - q1,
        "q1": q1,
        "q3": q3,
        "rounds": len(ordered),
    }


# Key of a tail -> (the share of the values that lie at or below it, the fewest values that tell it).
TAILS = {"p95": (0.95, 100), "p99": (0.99, 1000)}


def tail(values: Sequence[float], key: str) -> float | None:
    """The percentile of `values` that TAILS has under `key`, or their `median`; None where they are too few to tell:
    beyond it lie fewer than five of 100 values, or ten of 1,000."""
    share, least = TAILS.get(key, (0.5, 1))
    return _percentile(sorted(values), share) if len(values) >= least else None


def paired_ratios(
    samples: Iterable[Mapping[str, Any]], case_id: str, reference_id: str, metric: str
) -> list[list[float]]:
    """`metric` of `case_id` / that of `reference_id`: for each process that has some, one ratio for each round that has
    both, in order.

    Void samples are left out. Never across rounds: arms that are not timed together cannot resolve 3%.
    Raises ValueError where a case has two samples in one round of one process, or the reference is not > 0.
    """
    by_case: dict[str, dict[tuple[int, int], float]] = {case_id: {}, reference_id: {}}
    for sample in samples:
        turns = by_case.get(sample["case"])
        if turns is None or sample["void"] is not None:
            continue
        turn = (sample["process"], sample["round"])
        if turn in turns:
            raise ValueError(f"{sample['case']}: two samples in round {turn[1]} of process {turn[0]}")
        turns[turn] = sample[metric]
    references = by_case[reference_id]
    for (process, round_), value in references.items():
        if not value > 0:
            raise ValueError(
                f"{reference_id}: {metric} in round {round_} of process {process}: expected > 0, got {value}"
            )
    processes: dict[int, list[float]] = {}
    for turn in sorted(by_case[case_id].keys() & references.keys()):
        processes.setdefault(turn[0], []).append(by_case[case_id][turn] / references[turn])
    return list(processes.values())


def interval_over_processes(processes: Sequence[Sequence[float]], seed: int = 0, level: float = 0.95) -> Interval:
    """The median `ratio` over the rounds of all `processes`, with its interval as `median_interval` has it, and
    `correlated`: whether the rounds of the only process are, which makes its interval too narrow.

    Several processes have Student's interval over the medians of each, on the log scale: what the rounds of a process
    share, an offset or a drift, is then in it. Resampling three processes covers 71% where this covers 94%. Raises
    ValueError on no ratios, or, of several processes, one not > 0.
    """
    ratios = [ratio for rounds in processes for ratio in rounds]
    if len(processes) < 2:
        return {**median_interval(ratios, seed, level=level), "correlated": is_correlated(ratios)}
    middle, count = statistics.median(ratios), len(processes)
    interval: Interval = {"ratio": middle, "low": None, "high": None, "rounds": len(ratios), "correlated": None}
    if len(ratios) >= LEAST_ROUNDS:
        spread = statistics.stdev(math.log(statistics.median(rounds)) for rounds in processes)
        reach = math.exp(_student(count - 1, level) * spread / math.sqrt(count))
        interval["low"], interval["high"] = middle / reach, middle * reach
    return interval


def is_correlated(ratios: Sequence[float]) -> bool | None:
    """Whether each round is like the one before it: the correlation of neighbours' ranks lies above what chance gives
    in 1%. None below ten rounds, which don't tell."""
    count = len(ratios)
    if count < 10:
        return None
    order = sorted(range(count), key=ratios.__getitem__)
    ranks = [0.0] * count
    for rank, place in enumerate(order):
        ranks[place] = rank - (count - 1) / 2
    lag = sum(one * other for one, other in itertools.pairwise(ranks)) / sum(rank * rank for rank in ranks)
    # Of independent rounds it is about normal, its mean a little below 0.
    return lag > -1 / count + statistics.NormalDist().inv_cdf(0.99) / math.sqrt(count)


def _student(freedom: int, level: float) -> float:
    """How many standard errors hold Student's t with so many degrees of `freedom` at `level`, by halving; the share
    within is a finite sum (Abramowitz and Stegun 26.7.3 and 26.7.4)."""

    def within(angle: float) -> float:
        term, total = (math.cos(angle), 0.0) if freedom % 2 else (1.0, 0.0)
        for power in range(freedom % 2, freedom - 1, 2):
            total += term
            term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
        inside = math.sin(angle) * total
        return 2 / math.pi * (angle + inside) if freedom % 2 else inside

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def median_interval(ratios: Sequence[float], seed: int = 0, resamples: int = 2000, level: float = 0.95) -> Interval:
    """The median `ratio` with `low` and `high`, its percentile bootstrap interval at `level`, and `rounds`.

    The same `seed` gives the same interval. With fewer than LEAST_ROUNDS `low` and `high` are None. Raises ValueError
    on no ratios.
    """
    if not ratios:
        raise ValueError("median_interval: expected at least one ratio, got none")
    rounds = len(ratios)
    interval: Interval = {"ratio": statistics.median(ratios), "low": None, "high": None, "rounds": rounds}
    if rounds >= LEAST_ROUNDS:
        draw, middle = random.Random(seed), rounds // 2
        medians = []
        for _ in range(resamples):
            resample = sorted(draw.choices(ratios, k=rounds))
            medians.append(resample[middle] if rounds % 2 else (resample[middle - 1] + resample[middle]) / 2)
        medians.sort()
        tail = (1 - level) / 2
        interval["low"], interval["high"] = _percentile(medians, tail), _percentile(medians, 1 - tail)
    return interval


def _percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which `share` of the sorted values lie, interpolated between neighbours."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def overlap(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool | None:
    """Whether two intervals share a value; None where either has no interval."""
    bounds = (one["low"], one["high"], other["low"], other["high"])
    if any(bound is None for bound in bounds):
        return None
    return bool(one["low"] <= other["high"] and other["low"] <= one["high"])


def median_bounds(values: Sequence[float], level: float = 0.95) -> tuple[float, float] | None:
    """The interval between two order statistics that holds the median with at least `level`, whatever the
    distribution (the sign test's). None where there are too few values for one: fewer than 6 at 95%."""
    ordered, rounds = sorted(values), len(values)
    # The largest number of values that may be left out at either end.
    tail, probability, left_out = 0.0, 0.5**rounds if rounds < 1000 else 0.0, 0
    if rounds >= 1000:  # 0.5**rounds would lose all its digits; the normal form is exact enough here
        left_out = math.floor(rounds / 2 - statistics.NormalDist().inv_cdf((1 + level) / 2) * math.sqrt(rounds) / 2)
    else:
        while tail + probability <= (1 - level) / 2:
            tail += probability
            probability *= (rounds - left_out) / (left_out + 1)
            left_out += 1
    return (ordered[left_out - 1], ordered[rounds - left_out]) if left_out else None

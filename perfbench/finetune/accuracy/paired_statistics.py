"""Paired statistics over the same test items. Free of torch.

A difference is taken item by item: the score (in [0, 1]) that one arm gives an item, its mean over the seeds, less
that of the other arm. An item that is answered by five seeds is one observation, not five.

The same adapters on two paths differ on other items, and that is all that chance can do to them: `compare`. Two
methods would differ on other items and from other seeds: `compare_methods` draws from both levels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy

LEVEL = 0.95
RESAMPLES = 10_000
# With fewer trainings of a method their spread is as good as unknown, and nothing is said of it.
LEAST_SEEDS = 3
# Resampled means in one go, so that memory stays small whatever the number of items.
_BLOCK = 4_000_000


@dataclass(frozen=True)
class Paired:
    """Mean `difference` in [-1, 1] over `items`, with its interval [low, high]; on how many items the first arm was
    `better` and `worse`; `p_value`: McNemar's exact one, None where items are graded or pooled over seeds."""

    difference: float
    low: float
    high: float
    items: int
    better: int
    worse: int
    p_value: float | None

    def excludes_zero(self) -> bool:
        """Whether the interval says that there is a difference."""
        return self.low > 0 or self.high < 0


def compare(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Paired:
    """The same trained adapters on two paths: scores [items][seeds], on the same items. The interval is over items.

    ValueError where the arms have other numbers of items, none, an item without a score, or a score outside [0, 1].
    """
    return _compare(ours, theirs, (seed, level, resamples), ())


def compare_methods(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    seed: int = 0,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Paired:
    """Two methods on the same items: scores [items][seeds]; they may have other numbers of seeds.

    The interval is over items and seeds: items are resampled, and to each resample comes an error of each method's
    mean over its K seeds, drawn from Student's t with K - 1 degrees of freedom, for resampling three seeds would know
    too little of their spread. With fewer than LEAST_SEEDS on a side the interval is all of [-1, 1]. ValueError as
    `compare`, and where not every seed answered every item.
    """
    for arm in (ours, theirs):
        if len({len(item) for item in arm}) > 1:
            raise ValueError("compare: expected a score of every seed for every item")
    return _compare(ours, theirs, (seed, level, resamples), [_error_of_seeds(arm) for arm in (ours, theirs)])


def _error_of_seeds(scores: Sequence[Sequence[float]]) -> tuple[float, int]:
    """(standard error of an arm's mean over its seeds, degrees of freedom); the error of one seed is infinite."""
    table = numpy.array(scores, dtype=float)
    if table.ndim != 2 or table.shape[1] < 2:
        return math.inf, 0
    items, seeds = table.shape
    # At the least what seeds that answer each item by themselves would show: two that end alike by chance are not sure.
    least = table.var(axis=1, ddof=1).mean() / items
    return math.sqrt(max(float(table.mean(axis=0).var(ddof=1)), float(least)) / seeds), seeds - 1


def _compare(
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
    how: tuple[int, float, int],
    errors: Sequence[tuple[float, int]],
) -> Paired:
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"compare: expected the same items on both sides, got {len(ours)} and {len(theirs)}")
    if not all(item and all(0 <= score <= 1 for score in item) for item in (*ours, *theirs)):
        raise ValueError("compare: expected scores from 0 to 1 for every item")
    differences = [math.fsum(a) / len(a) - math.fsum(b) / len(b) for a, b in zip(ours, theirs, strict=True)]
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    one_seed = all(len(item) == 1 for item in (*ours, *theirs))
    binary = one_seed and all(item[0] in (0, 1) for item in (*ours, *theirs))
    low, high = bounds(differences, *how, errors=errors)
    return Paired(
        difference=math.fsum(differences) / len(differences),
        low=low,
        high=high,
        items=len(differences),
        better=better,
        worse=worse,
        p_value=mcnemar(better, worse) if binary else None,
    )


def mcnemar(better: int, worse: int) -> float:
    """Exact two-sided p-value of McNemar's test: `better` and `worse` items are heads and tails of a fair coin.

    In whole numbers throughout, so that thousands of items lose no digit.
    """
    tosses, fewer = better + worse, min(better, worse)
    ways, term = 0, 1
    for heads in range(fewer + 1):
        ways += term
        term = term * (tosses - heads) // (heads + 1)
    return min(1.0, 2 * ways / 2**tosses)


def bounds(
    differences: Sequence[float],
    seed: int,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    *,
    errors: Sequence[tuple[float, int]] = (),
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `differences`, items resampled with replacement; `errors`:
    (standard error, degrees of freedom) of what else is off in it, each drawn from Student's t.

    Two made-up items are among them, +1 and -1 (as Bonett and Price (2012) add one to each discordant count of paired
    proportions): fifty items that all agree do not show that no item could differ, and their interval must have a
    width. The same seed gives the same interval. Coverage is simulated in the tests.
    """
    if any(freedom < LEAST_SEEDS - 1 for _, freedom in errors):
        return -1.0, 1.0
    values = numpy.array([*differences, 1.0, -1.0])
    found, counts = numpy.unique(values, return_counts=True)
    draw = numpy.random.default_rng(seed)
    means = numpy.empty(resamples)
    block = max(1, _BLOCK // len(found))
    for start in range(0, resamples, block):
        size = min(block, resamples - start)
        drawn = draw.multinomial(len(values), counts / len(values), size=size)
        means[start : start + size] = drawn @ found / len(values)
    for error, freedom in errors:
        means += error * draw.standard_t(freedom, size=resamples)
    tail = (1 - level) / 2
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return max(-1.0, float(low)), min(1.0, float(high))


def non_inferior(paired: Paired, margin: float) -> str:
    """`pass` where the interval lies above -margin, `inferior` where it lies below, else `inconclusive`."""
    if paired.low > -margin:
        return "pass"
    return "inferior" if paired.high < -margin else "inconclusive"

"""Where the level of a series changes: Pettitt's test, which knows nothing but the order of the values, and a second
one for series whose values depend on those before them. Free of torch.

A.N. Pettitt, A Non-Parametric Approach to the Change-Point Problem, Applied Statistics 28 (1979).
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

# With fewer values even a perfect step is what chance does often enough.
FEWEST = 10
# Made-up series without a step, in which each value keeps up to MEMORY of how far the one before it was off, and how
# many of those count which are most like the series in question.
SERIES, MOST_ALIKE, MEMORY = 3000, 300, 0.95


@dataclass(frozen=True)
class Change:
    """The level changes before the value at `index`: its median is `before` and then `after`; `p_value`: how often
    chance alone does as much."""

    index: int
    before: float
    after: float
    p_value: float

    @property
    def ratio(self) -> float:
        """after / before."""
        return self.after / self.before


def largest_change(values: Sequence[float], shuffles: int = 0) -> Change | None:
    """The most likely change of level in `values`; None below FEWEST of them.

    The p-value is Pettitt's approximation, which takes the values to be independent; or, with `shuffles`, the greater
    of two: the share of so many seeded shuffles that do as much, and the share of made-up series without a step, whose
    values depend on each other as these do, that seem to have one as large.
    """
    if len(values) < FEWEST:
        return None
    ranks = _ranks(values)
    index, strength = _split(ranks)
    if shuffles:
        draw, shuffled, as_much = random.Random(0), list(ranks), 0
        for _ in range(shuffles):
            draw.shuffle(shuffled)
            as_much += _split(shuffled)[1] >= strength
        p_value = max((as_much + 1) / (shuffles + 1), _with_memory(values, index))
    else:
        count = len(values)
        p_value = min(1.0, 2 * math.exp(-6 * strength**2 / (count**3 + count**2)))
    return Change(index, statistics.median(values[:index]), statistics.median(values[index:]), p_value)


def changes(values: Sequence[float], least_effect: float, level: float = 0.01, shuffles: int = 999) -> list[Change]:
    """Every change of at least `least_effect` (0.03 is 3%) with a p-value of at most `level`, in order.

    The largest is judged last, between those that its sides have: in the whole series these would look like memory.
    """
    found = largest_change(values)
    if found is None:
        return []
    left = changes(values[: found.index], least_effect, level, shuffles)
    right = [_moved(one, found.index) for one in changes(values[found.index :], least_effect, level, shuffles)]
    start, end = left[-1].index if left else 0, right[0].index if right else len(values)
    between = largest_change(values[start:end], shuffles)
    if between is None or between.p_value > level or not _matters(between, least_effect):
        return [*left, *right]
    # The levels beside a change reach only to the next one.
    return [*left, _moved(between, start), *right]


def _moved(change: Change, places: int) -> Change:
    return replace(change, index=change.index + places)


def _matters(change: Change, least_effect: float) -> bool:
    return change.before > 0 and abs(change.ratio - 1) >= least_effect


def _ranks(values: Sequence[float]) -> list[float]:
    """1 for the least value; equal ones share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end < len(order) and values[order[end]] == values[order[start]]:
            end += 1
        for place in order[start:end]:
            ranks[place] = (start + 1 + end) / 2
        start = end
    return ranks


def _split(ranks: Sequence[float]) -> tuple[int, float]:
    """Where the rank sums of both sides are furthest from what chance gives, and Pettitt's K there."""
    middle, total, index, strength = (len(ranks) + 1) / 2, 0.0, 1, -1.0
    for place, rank in enumerate(ranks[:-1], start=1):
        total += rank - middle
        if abs(2 * total) > strength:
            index, strength = place, abs(2 * total)
    return index, strength


def _with_memory(values: Sequence[float], index: int) -> float:
    """How often a series without a step, whose values depend on each other as these do around their levels, seems to
    have one as large before `index`.

    How much they depend is not known, and what is left around fitted levels tells less than there is. So series of
    every memory are made, and those count whose rest is as correlated as that of the series in question.
    """
    memory, size = _shape(values, index)
    made = _made_up(len(values))
    place = bisect_left(made, (memory, -math.inf))
    start = min(max(0, place - MOST_ALIKE // 2), SERIES - MOST_ALIKE)
    as_much = sum(one >= size for _, one in made[start : start + MOST_ALIKE])
    return (as_much + 1) / (MOST_ALIKE + 1)


@cache
def _made_up(count: int) -> list[tuple[float, float]]:
    """The `_shape` of each of SERIES made-up series of `count` values at its own most likely change, in order."""
    draw, found = random.Random(count), []
    for _ in range(SERIES):
        memory, value, values = draw.uniform(0, MEMORY), draw.gauss(0, 1), []
        fresh = math.sqrt(1 - memory**2)
        for _ in range(count):
            values.append(value)
            value = memory * value + fresh * draw.gauss(0, 1)
        found.append(_shape(values, _split(_ranks(values))[0]))
    return sorted(found)


def _shape(values: Sequence[float], index: int) -> tuple[float, float]:
    """(the correlation of neighbours around the two levels, the step between these in mean distances from them)."""
    levels = statistics.median(values[:index]), statistics.median(values[index:])
    rest = [value - levels[place >= index] for place, value in enumerate(values)]
    squares, spread = sum(one * one for one in rest), statistics.fmean(map(abs, rest))
    memory = sum(one * other for one, other in itertools.pairwise(rest)) / squares if squares else 0.0
    step = abs(levels[1] - levels[0])
    return memory, step / spread if spread else (math.inf if step else 0.0)

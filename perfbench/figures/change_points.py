"""Where the level of a series changes: Pettitt's test, which knows nothing but the order of the values. Free of torch.

A.N. Pettitt, A Non-Parametric Approach to the Change-Point Problem, Applied Statistics 28 (1979).
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# With fewer values even a perfect step is what chance does often enough.
FEWEST = 10


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

    The p-value is Pettitt's approximation, or, with `shuffles`, the share of so many seeded shuffles that do as much:
    slower, and right for short series too. Both take the values to be independent.
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
        p_value = (as_much + 1) / (shuffles + 1)
    else:
        count = len(values)
        p_value = min(1.0, 2 * math.exp(-6 * strength**2 / (count**3 + count**2)))
    return Change(index, statistics.median(values[:index]), statistics.median(values[index:]), p_value)


def changes(values: Sequence[float], least_effect: float, level: float = 0.01, shuffles: int = 999) -> list[Change]:
    """Every change of at least `least_effect` (0.03 is 3%) with a p-value of at most `level`, in order: the largest,
    then those on either side of it."""
    found = largest_change(values, shuffles)
    if found is None or found.p_value > level or not _matters(found, least_effect):
        return []
    left = changes(values[: found.index], least_effect, level, shuffles)
    right = changes(values[found.index :], least_effect, level, shuffles)
    moved = [Change(one.index + found.index, one.before, one.after, one.p_value) for one in right]
    # The levels beside a change reach only to the next one.
    marks = [0, *(one.index for one in left), found.index, *(one.index for one in moved), len(values)]
    place = len(left) + 1
    before, after = values[marks[place - 1] : found.index], values[found.index : marks[place + 1]]
    return [*left, Change(found.index, statistics.median(before), statistics.median(after), found.p_value), *moved]


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

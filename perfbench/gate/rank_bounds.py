"""Hodges-Lehmann centres with exact rank bounds, for pairs and for two independent groups. Free of torch.

Both bounds come from counting every arrangement, so they hold for any number of values and any distribution, which for
pairs has to be symmetric, as the difference of two alike is; no normal approximation is made. Cost grows as the
cube of the number of values: 100 is quick.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Bound:
    """A `centre` with its two-sided bound, in the unit of the values; `low` and `high` are None where so few values
    allow no bound at the asked confidence. `units`: pairs, or values of the smaller group."""

    centre: float
    low: float | None
    high: float | None
    units: int


def signed_rank_bound(differences: Sequence[float], confidence: float) -> Bound:
    """The Hodges-Lehmann centre of paired `differences` (the median of all Walsh averages) and its exact bound.

    Raises ValueError on no differences, one not finite, or a confidence outside (0, 1).
    """
    _check(confidence, differences)
    count = len(differences)
    walsh = sorted((differences[i] + differences[j]) / 2 for i in range(count) for j in range(i, count))
    return _bound(walsh, _signed_rank_counts(count), confidence, count)


def rank_sum_bound(ones: Sequence[float], others: Sequence[float], confidence: float) -> Bound:
    """The Hodges-Lehmann centre of `others` - `ones`, two independent groups, and its exact bound.

    Raises ValueError as `signed_rank_bound`.
    """
    _check(confidence, ones, others)
    shifts = sorted(other - one for one in ones for other in others)
    return _bound(shifts, _rank_sum_counts(len(ones), len(others)), confidence, min(len(ones), len(others)))


def _bound(ordered: Sequence[float], counts: Sequence[int], confidence: float, units: int) -> Bound:
    """The k-th smallest and k-th largest of `ordered`, with the largest k that `counts` (arrangements for each value
    of the rank statistic) allow at `confidence`."""
    tail, total = (1 - confidence) / 2, sum(counts)
    below, depth = 0, 0
    # An integer comparison would need an exact `tail`; the slack is far below any count's share that matters.
    while depth < len(ordered) and (below + counts[depth]) / total <= tail + 1e-12:
        below += counts[depth]
        depth += 1
    centre = statistics.median(ordered)
    if depth == 0:
        return Bound(centre, None, None, units)
    return Bound(centre, ordered[depth - 1], ordered[-depth], units)


@cache
def _signed_rank_counts(count: int) -> tuple[int, ...]:
    """How many of the 2^count sign patterns give each sum of positive ranks, from 0 to count (count + 1) / 2."""
    counts = [1]
    for rank in range(1, count + 1):
        shifted = [0] * rank + counts
        counts = [a + b for a, b in zip(counts + [0] * rank, shifted, strict=True)]
    return tuple(counts)


@cache
def _rank_sum_counts(ones: int, others: int) -> tuple[int, ...]:
    """How many arrangements of two groups give each number of pairs in which `others` is the smaller one."""
    if ones == 0 or others == 0:
        return (1,)
    with_one, with_other = _rank_sum_counts(ones - 1, others), _rank_sum_counts(ones, others - 1)
    counts = [0] * (ones * others + 1)
    # The largest value belongs to one of the groups; if to `ones`, it is above every one of `others`.
    for place, ways in enumerate(with_one):
        counts[place + others] += ways
    for place, ways in enumerate(with_other):
        counts[place] += ways
    return tuple(counts)


def _check(confidence: float, *groups: Sequence[float]) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: expected a share between 0 and 1, got {confidence}")
    for values in groups:
        if not values:
            raise ValueError("expected at least one value, got none")
        if not all(map(math.isfinite, values)):
            raise ValueError("expected finite values only, got a NaN or an infinity")

"""The bounds against brute force over every arrangement, and against values from printed tables."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from perfbench.gate.rank_bounds import Bound, rank_sum_bound, signed_rank_bound


def signed_rank_by_force(differences: list[float], confidence: float) -> tuple[float, float] | None:
    """The shifts that a two-sided signed-rank test does not reject, by its p value over all 2^n sign patterns."""
    count = len(differences)
    sums = [
        sum(rank for rank, sign in zip(range(1, count + 1), signs, strict=True) if sign)
        for signs in itertools.product((0, 1), repeat=count)
    ]

    def rejected(shift: float) -> bool:
        moved = sorted((value - shift for value in differences), key=abs)
        observed = sum(rank for rank, value in enumerate(moved, start=1) if value > 0)
        tail = min(sum(s <= observed for s in sums), sum(s >= observed for s in sums)) / len(sums)
        return tail <= (1 - confidence) / 2 + 1e-12

    walsh = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(differences, 2))
    # The p value changes only at a Walsh average: one point inside each gap decides the gap.
    inside = [(a, b) for a, b in itertools.pairwise(walsh) if not rejected((a + b) / 2)]
    unbounded = not rejected(walsh[0] - 1)
    return None if unbounded else (inside[0][0], inside[-1][1])


def rank_sum_by_force(ones: list[float], others: list[float], confidence: float) -> tuple[float, float] | None:
    """The shifts that a two-sided rank-sum test does not reject, over all ways to split the ranks."""
    size = len(ones) + len(others)
    floor = len(others) * (len(others) + 1) // 2
    counts = [sum(split) - floor for split in itertools.combinations(range(1, size + 1), len(others))]

    def rejected(shift: float) -> bool:
        observed = sum(other - shift > one for one in ones for other in others)
        tail = min(sum(c <= observed for c in counts), sum(c >= observed for c in counts)) / len(counts)
        return tail <= (1 - confidence) / 2 + 1e-12

    shifts = sorted(other - one for one in ones for other in others)
    inside = [(a, b) for a, b in itertools.pairwise(shifts) if not rejected((a + b) / 2)]
    return None if not rejected(shifts[0] - 1) else (inside[0][0], inside[-1][1])


@pytest.mark.parametrize("confidence", [0.8, 0.9, 0.95, 0.99])
@pytest.mark.parametrize("count", [4, 5, 6, 7, 9, 10])
def test_the_signed_rank_bound_is_that_of_every_sign_pattern(count: int, confidence: float) -> None:
    draw = random.Random(count)
    values = [draw.gauss(0.1, 1.0) for _ in range(count)]
    found = signed_rank_bound(values, confidence)
    expected = signed_rank_by_force(values, confidence)
    assert (None if found.low is None else (found.low, found.high)) == (
        expected if expected is None else pytest.approx(expected)
    )
    walsh = [(a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2)]
    assert found.centre == pytest.approx(statistics.median(walsh))


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
@pytest.mark.parametrize("sizes", [(3, 3), (4, 6), (6, 6), (7, 5)])
def test_the_rank_sum_bound_is_that_of_every_split(sizes: tuple[int, int], confidence: float) -> None:
    draw = random.Random(sizes[0])
    ones, others = ([draw.gauss(0, 1) for _ in range(size)] for size in sizes)
    found = rank_sum_bound(ones, others, confidence)
    expected = rank_sum_by_force(ones, others, confidence)
    assert (None if found.low is None else (found.low, found.high)) == (
        expected if expected is None else pytest.approx(expected)
    )


def test_the_depths_are_those_of_the_printed_tables() -> None:
    """Two-sided 5%: W critical is 0 for 6 pairs, 8 for 10, 13 for 12, 52 for 20, 81 for 24; U is 5 for 6 and 6."""
    for count, critical in ((6, 0), (10, 8), (12, 13), (20, 52), (24, 81)):
        values = [float(2**place) for place in range(count)] if count <= 12 else [float(v * v) for v in range(count)]
        walsh = sorted((a + b) / 2 for a, b in itertools.combinations_with_replacement(values, 2))
        found = signed_rank_bound(values, 0.95)
        assert (found.low, found.high) == (walsh[critical], walsh[-critical - 1])
    ones, others = [float(v) for v in range(6)], [100.0 + 7 * v for v in range(6)]
    shifts = sorted(b - a for a in ones for b in others)
    assert rank_sum_bound(ones, others, 0.95).low == shifts[5]


def test_too_few_values_have_no_bound() -> None:
    assert signed_rank_bound([0.1] * 5, 0.95) == Bound(0.1, None, None, 5)
    assert signed_rank_bound([0.1] * 6, 0.95) == Bound(0.1, 0.1, 0.1, 6)
    assert rank_sum_bound([1.0] * 3, [2.0] * 3, 0.95).low is None
    assert rank_sum_bound([1.0] * 4, [2.0] * 4, 0.95).low == 1.0


def test_what_has_no_bound_is_refused() -> None:
    for values, confidence in (([], 0.95), ([float("nan")], 0.95), ([1.0], 1.0), ([1.0], 0.0)):
        with pytest.raises(ValueError, match="expected"):
            signed_rank_bound(values, confidence)
    with pytest.raises(ValueError, match="at least one"):
        rank_sum_bound([1.0], [], 0.95)


def test_the_bound_holds_as_often_as_it_says() -> None:
    """2,000 sets of 8 values of centre 0: a bound at 90% misses it in about 10% of them, never in over 12%."""
    draw = random.Random(3)
    missed = 0
    for _ in range(2000):
        found = signed_rank_bound([draw.gauss(0, 1) for _ in range(8)], 0.9)
        assert found.low is not None
        assert found.high is not None
        missed += not found.low <= 0 <= found.high
    assert 0.07 < missed / 2000 < 0.12

"""Summaries against hand counts, pairing within a round, and intervals that cover what they should."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import pytest

from perfbench.figures.stats import (
    LEAST_ROUNDS,
    Interval,
    interval_over_processes,
    is_correlated,
    median_bounds,
    median_interval,
    overlap,
    paired_ratios,
    summary,
    tail,
)


def sample(case: str, process: int, round_: int, value: float, void: str | None = None) -> dict[str, Any]:
    return {"case": case, "process": process, "round": round_, "tokens_per_s": value, "void": void}


def test_summary_by_hand() -> None:
    assert summary([4.0, 1.0, 3.0, 2.0, 5.0]) == {
        "min": 1.0,
        "max": 5.0,
        "mean": 3.0,
        "stddev": pytest.approx(2.5**0.5),
        "median": 3.0,
        "iqr": 2.0,
        "q1": 2.0,
        "q3": 4.0,
        "rounds": 5,
    }


def test_summary_has_pytest_benchmarks_names() -> None:
    benchmark = pytest.importorskip("pytest_benchmark.stats")
    ours = summary([3.0, 1.0, 2.0])
    theirs = benchmark.Stats()
    for value in (3.0, 1.0, 2.0):
        theirs.update(value)
    for name in ("min", "max", "mean", "stddev", "median", "rounds"):
        assert ours[name] == pytest.approx(getattr(theirs, name)), name
    assert set(ours) <= set(benchmark.Stats.fields)


def test_one_value_has_no_spread() -> None:
    one = summary([7.0])
    assert (one["median"], one["iqr"], one["stddev"], one["rounds"]) == (7.0, 0.0, None, 1)


@pytest.mark.parametrize("values", [[], [1.0, float("nan")], [float("inf")]])
def test_summary_refuses_what_it_cannot_sum_up(values: list[float]) -> None:
    with pytest.raises(ValueError, match="summary: expected"):
        summary(values)


@pytest.mark.parametrize(("key", "least", "value"), [("p95", 100, 95.05), ("p99", 1000, 990.01), ("median", 1, 1.0)])
def test_a_tail_is_told_from_enough_values_on(key: str, least: int, value: float) -> None:
    """Of the numbers from 1 on, in any order."""
    values = [float(number) for number in range(least, 0, -1)]
    assert tail(values, key) == pytest.approx(value)
    assert tail(values[1:], key) is None
    assert tail([5.0] * least, key) == 5.0
    assert tail(values, "p95") != max(values) or least < 100


def test_ratios_pair_within_a_round_of_a_process_only() -> None:
    samples = [
        sample("arm", 0, 0, 80.0),
        sample("none", 0, 0, 100.0),
        sample("arm", 0, 1, 90.0),  # its reference is missing
        sample("none", 0, 2, 100.0),  # its arm is missing
        sample("none", 1, 1, 1.0),  # the same round of another process is another round
        sample("other", 0, 0, 5.0),
        sample("none", 1, 0, 200.0),
        sample("arm", 1, 0, 100.0),
    ]
    assert paired_ratios(samples, "arm", "none", "tokens_per_s") == [[0.8], [0.5]]


@pytest.mark.parametrize("void", ["arm", "none"])
def test_a_void_sample_takes_its_pair_along(void: str) -> None:
    samples = [
        sample("arm", 0, 0, 80.0, "compiled" if void == "arm" else None),
        sample("none", 0, 0, 100.0, "compiled" if void == "none" else None),
        sample("arm", 0, 1, 90.0),
        sample("none", 0, 1, 100.0),
    ]
    assert paired_ratios(samples, "arm", "none", "tokens_per_s") == [[0.9]]


def test_two_samples_in_one_turn_are_refused() -> None:
    samples = [sample("arm", 0, 3, 1.0), sample("arm", 0, 3, 2.0)]
    with pytest.raises(ValueError, match="arm: two samples in round 3 of process 0"):
        paired_ratios(samples, "arm", "none", "tokens_per_s")


def test_a_reference_that_is_not_positive_is_refused() -> None:
    samples = [sample("arm", 0, 0, 1.0), sample("none", 0, 0, 0.0)]
    with pytest.raises(ValueError, match=r"none: tokens_per_s in round 0 of process 0: expected > 0"):
        paired_ratios(samples, "arm", "none", "tokens_per_s")


@pytest.mark.parametrize("rounds", range(1, LEAST_ROUNDS))
def test_few_rounds_give_no_interval(rounds: int) -> None:
    """Two of them had one that held the truth in 48%."""
    ratios = [0.9 + place / 100 for place in range(rounds)]
    nothing = {"ratio": statistics.median(ratios), "low": None, "high": None, "rounds": rounds}
    assert median_interval(ratios) == nothing
    assert interval_over_processes([ratios]) == {**nothing, "correlated": None}
    assert interval_over_processes([[ratio] for ratio in ratios])["low"] is None
    assert median_interval([*ratios, *[0.95] * (LEAST_ROUNDS - rounds)])["low"] is not None


def test_no_round_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one ratio"):
        median_interval([])


def test_the_same_seed_gives_the_same_interval() -> None:
    draw = random.Random(1)
    ratios = [draw.gauss(0.9, 0.05) for _ in range(20)]
    assert median_interval(ratios, seed=4) == median_interval(list(ratios), seed=4)
    assert median_interval(ratios, seed=4) != median_interval(ratios, seed=5)


def test_the_interval_is_the_bootstraps() -> None:
    """For values that are two only, the median of seven is the greater one in 4 or more of seven draws: 10% of 2/7."""
    interval = median_interval([1.0] * 5 + [2.0] * 2, resamples=4000, level=0.50)
    assert (interval["low"], interval["ratio"], interval["high"]) == (1.0, 1.0, 1.0)
    share = sum(math.comb(7, k) * (2 / 7) ** k * (5 / 7) ** (7 - k) for k in range(4, 8))
    assert 0.09 < share < 0.13
    ends = [median_interval([1.0] * 5 + [2.0] * 2, resamples=4000, level=1 - 2 * tail)["high"] for tail in (0.08, 0.14)]
    assert ends == [2.0, 1.0]


def rounds_of(kind: str, draw: random.Random, processes: int, rounds: int) -> list[list[float]]:
    """Ratios about 1: independent ones, ones of which each keeps 60% of the one before, or ones with an offset of
    their process that spreads as wide as they do."""
    found = []
    for _ in range(processes):
        offset = draw.gauss(0, 0.03) if kind == "offsets" else 0.0
        keep = 0.6 if kind == "correlated" else 0.0
        value, own = draw.gauss(0, 0.03), []
        for _ in range(rounds):
            own.append(math.exp(offset + value))
            value = keep * value + math.sqrt(1 - keep**2) * draw.gauss(0, 0.03)
        found.append(own)
    return found


def coverage(kind: str, processes: int, rounds: int, interval: Callable[[list[list[float]]], Interval]) -> float:
    """The share of 200 intervals that hold 1."""
    held = 0
    for seed in range(200):
        found = interval(rounds_of(kind, random.Random(seed), processes, rounds))
        held += (found["low"] or 2.0) <= 1.0 <= (found["high"] or 0.0)
    return held / 200


@pytest.mark.parametrize("kind", ["independent", "correlated", "offsets"])
@pytest.mark.parametrize("processes", [3, 6])
def test_several_processes_cover_the_truth_whatever_their_rounds_share(kind: str, processes: int) -> None:
    """94 to 96% of 400 expected; 91% leaves room for the error of 200."""
    assert coverage(kind, processes, 10, interval_over_processes) >= 0.91


@pytest.mark.parametrize("kind", ["correlated", "offsets"])
def test_rounds_taken_for_independent_would_not(kind: str) -> None:
    """The fault, planted: all the rounds in one pot."""

    def in_one_pot(processes: list[list[float]]) -> Interval:
        return median_interval([ratio for rounds in processes for ratio in rounds], resamples=300)

    assert coverage(kind, 3, 10, in_one_pot) < 0.80


def test_the_reach_of_several_processes_is_students() -> None:
    """Values of printed tables: 4.303 at two degrees of freedom, 2.571 at five."""
    for count, printed in ((3, 4.303), (6, 2.571)):
        medians = [math.exp(place / 100) for place in range(count)]
        interval = interval_over_processes([[value] * 3 for value in medians])
        spread = statistics.stdev(place / 100 for place in range(count))
        expected = statistics.median(medians) * math.exp(printed * spread / math.sqrt(count))
        assert interval["high"] == pytest.approx(expected, rel=1e-4)


def test_correlated_rounds_are_told_and_independent_ones_are_not() -> None:
    told = {
        kind: sum(bool(is_correlated(rounds_of(kind, random.Random(seed), 1, 40)[0])) for seed in range(200))
        for kind in ("independent", "correlated")
    }
    assert told["independent"] <= 6  # 2 expected at 1%
    assert told["correlated"] >= 150
    assert is_correlated([1.0, 1.1] * 4) is None
    assert is_correlated([1.0 + place / 100 for place in range(10)]) is True
    assert interval_over_processes([[1.0 + place / 100 for place in range(10)]])["correlated"] is True


def test_the_interval_narrows_with_rounds_and_covers_the_truth() -> None:
    """Nominal 95% intervals of 25 rounds hold the true median in most of 60 draws, and not in all of them."""
    draw = random.Random(7)
    held = 0
    for seed in range(60):
        interval = median_interval([draw.gauss(0.9, 0.03) for _ in range(25)], seed=seed, resamples=300)
        assert interval["low"] is not None
        assert interval["high"] is not None
        held += interval["low"] <= 0.9 <= interval["high"]
    assert 51 <= held < 60
    few, many = ([draw.gauss(0.9, 0.03) for _ in range(count)] for count in (10, 400))
    assert _width(median_interval(many)) < _width(median_interval(few)) / 2


def _width(interval: dict[str, Any]) -> float:
    return float(interval["high"] - interval["low"])


def test_the_ratio_is_the_median_of_an_even_number_too() -> None:
    ratios = [0.5, 0.9, 0.7, 0.8]
    assert median_interval(ratios)["ratio"] == statistics.median(ratios)


@pytest.mark.parametrize(
    ("one", "other", "expected"),
    [
        ((1, 2), (2, 3), True),
        ((2, 3), (1, 2), True),
        ((1, 4), (2, 3), True),
        ((1, 2), (3, 4), False),
        ((1, 2), (None, None), None),
    ],
)
def test_overlap(one: tuple[Any, Any], other: tuple[Any, Any], expected: bool | None) -> None:
    intervals = [dict(zip(("low", "high"), ends, strict=True)) for ends in (one, other)]
    assert overlap(*intervals) is expected


def test_median_bounds_are_order_statistics_and_hold_the_median_as_often_as_said() -> None:
    assert median_bounds([1, 2, 3, 4, 5]) is None
    assert median_bounds([6, 1, 5, 2, 4, 3]) == (1, 6)
    assert median_bounds(list(range(1, 101))) == (40, 61)  # the textbook's sign test at n = 100
    draw = random.Random(0)
    held = 0
    for _ in range(400):
        low, high = median_bounds([draw.lognormvariate(0, 1) for _ in range(25)]) or (0.0, 0.0)
        held += low <= 1.0 <= high
    assert 375 <= held <= 396  # 95.7% expected
    # The two ways of finding how many values to leave out meet.
    exact, normal = (median_bounds(list(range(count))) or (0.0, 0.0) for count in (999, 1000))
    assert abs(exact[0] - normal[0]) <= 1

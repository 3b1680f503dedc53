"""Change points: a planted step is found where it is, noise is not called a change more often than said."""

from __future__ import annotations

import math
import random
from statistics import median

import pytest

from perfbench.figures import change_points
from perfbench.figures.change_points import FEWEST, changes, largest_change


def noise(seed: int, count: int, level: float = 100.0, spread: float = 1.0) -> list[float]:
    draw = random.Random(seed)
    return [draw.gauss(level, spread) for _ in range(count)]


@pytest.mark.parametrize("shuffles", [0, 499])
def test_a_step_is_found_where_it_is(shuffles):
    found = largest_change(noise(1, 30) + noise(2, 20, level=110), shuffles)
    assert found is not None
    assert (found.index, found.p_value < 0.01) == (30, True)
    assert found.ratio == pytest.approx(1.10, abs=0.01)


def test_too_few_values_say_nothing():
    assert largest_change([1.0] * (FEWEST - 1)) is None
    assert changes([1.0, 2.0, 2.0], least_effect=0.03) == []


def test_a_constant_series_has_no_change():
    found = largest_change([5.0] * 20)
    assert found is not None
    assert found.p_value == 1.0
    assert changes([5.0] * 20, least_effect=0.0) == []


def test_two_steps_and_the_levels_beside_them():
    values = noise(1, 15) + noise(2, 15, level=120) + noise(3, 15, level=90)
    found = changes(values, least_effect=0.03)
    assert [change.index for change in found] == [15, 30]
    assert found[0].before == median(values[:15])
    assert found[0].after == found[1].before == median(values[15:30])
    assert found[1].after == median(values[30:])


def test_what_is_smaller_than_the_least_effect_is_left_out():
    values = noise(1, 30, spread=0.1) + noise(2, 30, level=102, spread=0.1)
    assert changes(values, least_effect=0.03) == []
    assert len(changes(values, least_effect=0.01)) == 1


def test_false_alarms_are_as_rare_as_said():
    alarms = sum(bool(changes(noise(seed, 12), least_effect=0.0, shuffles=199)) for seed in range(300))
    assert alarms <= 10  # 3 expected at 1%


def test_the_fastest_shape_of_a_step_is_found_with_the_fewest_values():
    values = [100.0 + at / 100 for at in range(FEWEST // 2)] + [110.0 + at / 100 for at in range(FEWEST // 2)]
    assert [change.index for change in changes(values, least_effect=0.03)] == [FEWEST // 2]


def with_memory(seed: int, keep: float, *, step: float = 0.0, spread: float = 0.03, count: int = 20) -> list[float]:
    """About 100, each value keeping a share of how far the one before it was off; a step in the middle."""
    draw, off, values = random.Random(seed), 0.0, []
    off = draw.gauss(0, 1)
    for place in range(count):
        values.append(100 * math.exp(spread * off) * (1 + step * (place >= count // 2)))
        off = keep * off + math.sqrt(1 - keep**2) * draw.gauss(0, 1)
    return values


def alarms(keep: float) -> int:
    """Of 100 series without a step."""
    return sum(bool(changes(with_memory(seed, keep), least_effect=0.03, shuffles=199)) for seed in range(100))


def test_a_series_with_memory_does_not_cry_wolf(monkeypatch: pytest.MonkeyPatch) -> None:
    assert alarms(0.0) <= 2
    assert alarms(0.4) <= 3
    assert alarms(0.8) <= 7
    monkeypatch.setattr(change_points, "_with_memory", lambda values, index: 0.0)
    assert alarms(0.8) > 25, "the fault, planted: values taken to be independent"


@pytest.mark.parametrize("keep", [0.0, 0.4, 0.8])
def test_a_real_step_in_a_quiet_series_is_found_with_memory_too(keep: float) -> None:
    for seed in range(20):
        found = changes(with_memory(seed, keep, step=0.10, spread=0.01), least_effect=0.03, shuffles=199)
        assert any(abs(change.index - 10) <= 1 for change in found), seed

"""Change points: a planted step is found where it is, noise is not called a change more often than said."""

from __future__ import annotations

import random
from statistics import median

import pytest

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

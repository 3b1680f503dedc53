"""The clock that times everything: faults of it are seen."""

from __future__ import annotations

import itertools
import time

from perfbench.doctor import machine
from perfbench.machine import timer


def test_this_machine_s_clock_is_good() -> None:
    assert timer.fault() is None
    assert machine.timer().status == "ok"


def test_a_coarse_clock_is_told() -> None:
    def coarse() -> float:
        return int(time.perf_counter() * 64) / 64

    assert "expected steps of at most 100 us, got " in (timer.fault(coarse) or "")
    assert machine.timer(coarse).status == "missing"


def test_a_clock_that_never_moves_is_coarse() -> None:
    assert "expected steps of at most" in (timer.fault(lambda: 1.0) or "")


def test_a_clock_that_goes_backwards_is_told() -> None:
    count = itertools.count()

    def unsteady() -> float:
        return time.perf_counter() - (1e-3 if next(count) % 100 == 50 else 0)

    assert "only goes forward" in (timer.fault(unsteady) or "")


def test_a_clock_of_another_pace_is_told() -> None:
    for pace in (0.9, 1.1):
        assert "as of the machine's raw clock" in (timer.fault(lambda pace=pace: time.perf_counter() * pace) or "")

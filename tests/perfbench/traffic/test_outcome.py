"""What is made of the requests of a measurement, against values worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from perfbench.spec.traffic import Targets
from perfbench.traffic import outcome
from perfbench.traffic.outcome import Answered

TARGETS = Targets(ttft_ms=100, itl_ms=10, share=0.9)
GOOD = Answered(0.0, 0, 5.0, 50.0, 70.0, (10.0, 10.0), loaded=False)


def requests(count: int, **late: int) -> list[Answered]:
    """So many, a second apart; the places in `late` miss that target."""
    made = [replace(GOOD, due_s=float(i), tenant=i % 2) for i in range(count)]
    for target, place in late.items():
        own = {"ttft": {"ttft_ms": 101.0}, "itl": {"itl_ms": (9.0, 12.0)}}[target]
        made[place] = replace(made[place], **own)
    return made


def test_either_target_is_missed_by_a_hair() -> None:
    assert GOOD.keeps(TARGETS)
    assert not replace(GOOD, ttft_ms=100.1).keeps(TARGETS)
    assert not replace(GOOD, itl_ms=(10.0, 10.1)).keeps(TARGETS)
    assert replace(GOOD, itl_ms=()).keeps(TARGETS)


def test_the_first_and_the_last_tenth_are_not_counted() -> None:
    assert list(outcome.counted_places(20)) == list(range(2, 18))
    assert outcome.held(requests(20, ttft=1, itl=18), TARGETS)
    assert outcome.kept_share(requests(20, ttft=1, itl=18), TARGETS) == 1


@pytest.mark.parametrize(("count", "share", "misses"), [(100, 0.99, 1), (99, 0.99, 0), (200, 0.95, 10), (80, 1.0, 0)])
def test_as_many_may_miss_as_the_share_leaves(count: int, share: float, misses: int) -> None:
    assert outcome.most_misses(count, replace(TARGETS, share=share)) == misses


def test_one_miss_more_than_that_is_too_many() -> None:
    assert outcome.held(requests(20, ttft=5), TARGETS)
    assert not outcome.held(requests(20, ttft=5, itl=6), TARGETS)


def test_figures_are_those_of_all_repetitions() -> None:
    slow = [replace(one, ttft_ms=80.0, loaded=True) for one in requests(20)]
    found = outcome.figures([requests(20, ttft=5), slow], TARGETS)
    assert found["counted"] == 32
    assert found["kept_share"] == 31 / 32
    assert found["goodput_per_s"] == pytest.approx(31 / 30)
    assert found["tokens_per_s"] == pytest.approx(32 * 3 / 30)
    assert found["ttft_ms"]["median"] == 80.0
    assert found["ttft_ms"]["p95"] is None
    assert found["loaded_share"] == 0.5
    assert found["tenants_seen"] == 2


def test_the_worst_tenant_and_fairness() -> None:
    made = [replace(one, ttft_ms=30.0 if one.tenant else 90.0) for one in requests(40)]
    found = outcome.figures([made], TARGETS)
    assert found["worst_tenant_ttft_ms"] == 90.0
    assert found["fairness"] == pytest.approx(120**2 / (2 * (30**2 + 90**2)))
    assert outcome.figures([requests(40)], TARGETS)["fairness"] == pytest.approx(1)


def test_a_queue_that_grows_is_seen() -> None:
    growing = [replace(one, wait_ms=3.0 * one.due_s) for one in requests(40)]
    assert outcome.figures([requests(40), growing], TARGETS)["wait_growth_ms"] == pytest.approx(3.0 * 31)
    assert outcome.figures([requests(40)], TARGETS)["wait_growth_ms"] == pytest.approx(0)


def test_requests_that_are_all_due_at_once_have_no_rate() -> None:
    found = outcome.figures([[replace(one, due_s=0.0) for one in requests(20)]], TARGETS)
    assert found["goodput_per_s"] is None
    assert found["wait_growth_ms"] == 0

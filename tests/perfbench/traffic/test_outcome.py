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
    assert found["ttft_ms"]["median"] == 80.0
    assert found["ttft_ms"]["p95"] is None
    assert found["loaded_share"] == 0.5
    assert found["tenants_seen"] == 2


def test_tokens_are_counted_over_the_time_that_it_took_to_make_them() -> None:
    """And not over the time in which they were asked for, which would be the load that was offered."""
    offered = [replace(GOOD, due_s=0.01 * i, total_ms=1e3 * (i + 1), itl_ms=(1.0,) * 15) for i in range(20)]
    found = outcome.figures([offered], replace(TARGETS, ttft_ms=1e6))
    # Of requests 2 to 17, due from 0.02 s on, the last ends 18 s after it was due at 0.17 s.
    assert found["tokens_per_s"] == pytest.approx(16 * 16 / 18.15)
    assert found["goodput_per_s"] == pytest.approx(16 / 18.15)


def test_the_worst_tenant_and_fairness_are_of_tenants_with_enough_requests() -> None:
    made = [replace(one, ttft_ms=30.0 if one.tenant else 90.0) for one in requests(40)]
    made[7] = replace(made[7], tenant=9, ttft_ms=900.0)
    made[8] = replace(made[8], tenant=-1, ttft_ms=900.0)
    found = outcome.figures([made], TARGETS)
    assert found["worst_tenant_ttft_ms"] == 90.0
    assert found["fairness"] == pytest.approx(120**2 / (2 * (30**2 + 90**2)))
    assert found["tenants_seen"] == 3
    few = outcome.figures([[replace(one, tenant=i) for i, one in enumerate(requests(40))]], TARGETS)
    assert (few["worst_tenant_ttft_ms"], few["fairness"]) == (None, None)


def test_a_queue_that_grows_is_not_held_however_few_the_requests() -> None:
    growing = [replace(one, wait_ms=3.0 * one.due_s) for one in requests(40)]
    assert outcome.figures([requests(40), growing], TARGETS)["wait_growth_ms"] == pytest.approx(3.0 * 31)
    assert outcome.kept_share(growing, TARGETS) == 1
    assert not outcome.held(growing, TARGETS)
    assert outcome.held([replace(one, wait_ms=one.due_s) for one in requests(40)], TARGETS)


def test_the_throughput_is_that_of_full_rows() -> None:
    """Two rows, a second for each request: the last one starts after three, by when six have ended."""
    made = [replace(GOOD, due_s=0.0, wait_ms=1e3 * (i // 2), total_ms=1e3 * (i // 2 + 1)) for i in range(8)]
    assert outcome.throughput_per_s(made) == pytest.approx(2)
    assert outcome.figures([made], TARGETS)["wait_growth_ms"] == 0


def test_a_closed_loop_counts_what_came_while_all_were_open() -> None:
    """Two in flight, each for two seconds, with a token every second: a token a second each, whoever has it."""
    made = [
        replace(GOOD, due_s=float(i), tenant=i % 2, ttft_ms=1000.0, itl_ms=(1000.0,), total_ms=2000.0)
        for i in range(20)
    ]
    found = outcome.figures([made], TARGETS, closed=True)
    assert found["tokens_per_s"] == 2.0
    assert found["requests_per_s"] == 1.0
    assert found["goodput_per_s"] == 0.0, "none has its first token within 100 ms"
    assert outcome.figures([made], TARGETS)["tokens_per_s"] < 2.0, "others were in flight at both ends"

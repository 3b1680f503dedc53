"""The requests of a measurement: the same for the same seed, and distributed as was asked for."""

from __future__ import annotations

from collections import Counter
from dataclasses import astuple, replace
from itertools import pairwise
from statistics import fmean, median, pvariance

import pytest

from perfbench.spec.traffic import NOBODY, Lengths, Traffic
from perfbench.traffic.requests import all_at_once, draw

TRAFFIC = Traffic(
    prompt_tokens=Lengths(40, 0.5, 120), new_tokens=Lengths(8, 0.0, 8), tenants=None, rate_per_tenant=1.0, rates=(),
    in_flight=(), in_turn=False,
    zipf_exponent=None, without_adapter=0.0, arrivals="poisson", burstiness=1.0, requests=4000,
)  # fmt: skip


def test_a_seed_gives_the_same_requests_and_another_gives_others() -> None:
    assert draw(TRAFFIC, 9, 5.0, "0/1") == draw(TRAFFIC, 9, 5.0, "0/1")
    assert draw(TRAFFIC, 9, 5.0, "0/1") != draw(TRAFFIC, 9, 5.0, "0/2")


def test_more_tenants_send_the_same_requests_sooner() -> None:
    few, many = draw(TRAFFIC, 10, 5.0, "0"), draw(TRAFFIC, 20, 10.0, "0")
    assert [one[2:] for one in map(astuple, few)] == [one[2:] for one in map(astuple, many)]
    for one, other in zip(few, many, strict=True):
        assert other.due_s == pytest.approx(one.due_s / 2)
        assert one.tenant == other.tenant // 2


@pytest.mark.parametrize(
    ("arrivals", "burstiness", "variance"),
    [("poisson", 1.0, 1.0), ("gamma", 4.0, 4.0), ("gamma", 0.25, 0.25), ("constant", 1.0, 0.0)],
)
def test_pauses_have_the_mean_and_the_variance_that_were_asked_for(
    arrivals: str, burstiness: float, variance: float
) -> None:
    due = draw(replace(TRAFFIC, arrivals=arrivals, burstiness=burstiness), 9, 20.0, "0")
    pauses = [later.due_s - earlier.due_s for earlier, later in pairwise(due)]
    assert min(pauses) >= 0
    assert fmean(pauses) == pytest.approx(1 / 20, rel=0.1)
    assert pvariance(pauses) * 20**2 == pytest.approx(variance, rel=0.2, abs=1e-9)


def test_lengths_have_their_median_and_their_limit() -> None:
    lengths = [one.prompt_tokens for one in draw(TRAFFIC, 9, 5.0, "0")]
    assert median(lengths) == pytest.approx(40, rel=0.05)
    assert max(lengths) == 120
    assert min(lengths) >= 1
    assert {one.new_tokens for one in draw(TRAFFIC, 9, 5.0, "0")} == {8}


def test_tenants_are_alike_or_follow_zipf_and_some_requests_have_none() -> None:
    alike = Counter(one.tenant for one in draw(TRAFFIC, 4, 5.0, "0"))
    assert sorted(alike) == [0, 1, 2, 3]
    assert max(alike.values()) < 1.2 * min(alike.values())
    skewed = Counter(one.tenant for one in draw(replace(TRAFFIC, zipf_exponent=1.0), 4, 5.0, "0"))
    assert skewed[0] / skewed[3] == pytest.approx(4, rel=0.2)
    bare = Counter(one.tenant for one in draw(replace(TRAFFIC, without_adapter=0.25), 4, 5.0, "0"))
    assert bare[NOBODY] == pytest.approx(1000, rel=0.1)


def test_all_at_once_is_as_many_as_are_asked_for() -> None:
    due = all_at_once(replace(TRAFFIC, requests=20), 4, 50, "0")
    assert len(due) == 50
    assert {one.due_s for one in due} == {0.0}
    assert len({(one.tenant, one.prompt_tokens) for one in due}) > 5


def test_tenants_in_turn_are_as_many_as_there_are() -> None:
    traffic = replace(TRAFFIC, in_turn=True)
    drawn = draw(traffic, 4, 0.0, "0")
    assert [one.tenant for one in drawn[:9]] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert {one.due_s for one in drawn} == {0.0}
    lengths = [(one.prompt_tokens, one.new_tokens) for one in draw(TRAFFIC, 4, 7.0, "0")]
    assert [(one.prompt_tokens, one.new_tokens) for one in drawn] == lengths, "all else is as with other mixes"

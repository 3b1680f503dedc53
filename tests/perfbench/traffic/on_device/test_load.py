"""The open loop: requests go when they are due, latency counts from then, and a hopeless measurement ends early."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from perfbench.runtimes import backbone
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.rows import Rows
from perfbench.spec.traffic import NOBODY, Targets
from perfbench.traffic.on_device import load
from perfbench.traffic.on_device.load import Limit, answered, drive, prompts
from perfbench.traffic.requests import Due

DUE = [Due(0.1 * i, NOBODY, 4, 3) for i in range(30)]


class Clock:
    """Seconds that pass only where work is done: a thousandth at each look, and whatever is slept."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        self.now_s += 0.001
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(load.time, "sleep", made.sleep)
    return made


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def engine(base: backbone.Backbone, clock: Clock, rows: int = 2) -> Engine:
    return Engine(Rows(base, None, "eager", rows, 8), None, clock=clock)


def texts(base: backbone.Backbone, due: list[Due]) -> list[torch.Tensor]:
    return prompts(due, base.shape.vocab, 0, base.device)


def test_a_request_goes_when_it_is_due_and_not_before(base: backbone.Backbone, clock: Clock) -> None:
    found, start, given_up = drive(engine(base, clock), DUE, texts(base, DUE))
    assert not given_up
    for one, request in zip(DUE, found, strict=True):
        assert start + one.due_s <= request.began_s < start + one.due_s + 0.02
        assert len(request.tokens) == len(request.token_s) == 3


def test_latency_counts_from_the_moment_a_request_was_due(base: backbone.Backbone, clock: Clock) -> None:
    """One that comes while others hold every row waits, and its wait is part of its time."""
    due = [Due(0.0, NOBODY, 4, 3) for _ in range(6)]
    serving = engine(base, clock, rows=1)
    found, start, _ = drive(serving, due, texts(base, due))
    times = answered(found, due, start)
    assert [one.wait_ms for one in times] == sorted(one.wait_ms for one in times)
    for earlier, later in itertools.pairwise(times):
        assert later.wait_ms >= earlier.total_ms
        assert later.ttft_ms > later.wait_ms
        assert len(later.itl_ms) == 2


def test_the_times_are_those_of_the_tokens(base: backbone.Backbone) -> None:
    request = Request(torch.arange(3), 3, tokens=[1, 2, 3], token_s=[10.5, 10.7, 11.0], began_s=10.2)
    (one,) = answered([request], [Due(0.1, 4, 3, 3)], 10.0)
    assert one.wait_ms == pytest.approx(100)
    assert one.ttft_ms == pytest.approx(400)
    assert one.total_ms == pytest.approx(900)
    assert one.itl_ms == pytest.approx((200, 300))


def test_it_is_given_up_once_too_many_have_missed(base: backbone.Backbone, clock: Clock) -> None:
    due = [replace(one, due_s=0.0) for one in DUE]
    serving = engine(base, clock, rows=1)
    found, _, given_up = drive(serving, due, texts(base, due), Limit(Targets(20.0, 1e6, 0.9), misses=2))
    assert given_up
    assert serving.idle
    assert sum(request.ended for request in found) < 15


def test_a_wait_in_the_queue_is_a_miss_before_the_request_has_begun(base: backbone.Backbone, clock: Clock) -> None:
    due = [replace(one, due_s=0.0, new_tokens=5) for one in DUE]
    serving = engine(base, clock, rows=1)
    found, _, given_up = drive(serving, due, texts(base, due), Limit(Targets(3.0, 1e6, 0.9), misses=20))
    assert given_up
    assert sum(bool(request.tokens) for request in found) < 20


def test_slow_tokens_are_a_miss_too(base: backbone.Backbone, clock: Clock) -> None:
    limit = Limit(Targets(1e6, 1e-6, 0.9), misses=0)
    assert drive(engine(base, clock), DUE, texts(base, DUE), limit)[2]


def test_misses_that_are_not_counted_end_nothing(base: backbone.Backbone, clock: Clock) -> None:
    """The first tenth may be as late as it likes."""
    limit = Limit(Targets(50.0, 1e6, 0.9), misses=0)
    due = [replace(one, due_s=0.0 if i < 3 else one.due_s) for i, one in enumerate(DUE)]
    found, start, given_up = drive(engine(base, clock, rows=1), due, texts(base, due), limit)
    assert not given_up
    assert answered(found, due, start)[2].ttft_ms > 5


def test_a_closed_loop_keeps_so_many_requests_open_and_no_more(base: backbone.Backbone, clock: Clock) -> None:
    due = [Due(0.0, NOBODY, 4, 3) for _ in range(12)]
    found, start, _ = drive(engine(base, clock, rows=4), due, texts(base, due), in_flight=3)
    sent = [start + one.due_s for one in due]
    ended = [request.token_s[-1] for request in found]
    assert sent == sorted(sent)
    for place, moment in enumerate(sent):
        open_before = sum(end > moment for end in ended[:place])
        # The engine works in turns: what ended in the last one has made room by now.
        assert open_before < 3
        assert open_before == min(place, 2) or place >= 3
    assert max(sum(s <= moment < e for s, e in zip(sent, ended, strict=True)) for moment in ended[:-1]) <= 3
    assert len({one.due_s for one in due}) > 3, "they were not all sent at once"

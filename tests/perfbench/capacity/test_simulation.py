"""The simulated server: turns by hand, a closed form, and the scheduler itself on a clock that a test moves."""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

import pytest
import torch

from perfbench.capacity.simulation import Serving, simulate
from perfbench.runtimes.continuous.engine import Engine
from perfbench.spec.traffic import NOBODY, Lengths, Targets, Traffic
from perfbench.traffic.on_device import load
from perfbench.traffic.outcome import Answered
from perfbench.traffic.requests import Due, all_at_once, draw, popularity

TRAFFIC = Traffic(
    prompt_tokens=Lengths(20, 0.8, 90), new_tokens=Lengths(6, 0.6, 20), tenants=None, rate_per_tenant=1.0, rates=(),
    in_flight=(), in_turn=False, zipf_exponent=1.0, without_adapter=0.1, arrivals="poisson", burstiness=1.0,
    requests=300,
)  # fmt: skip
FIXED = Traffic(
    prompt_tokens=Lengths(10, 0.0, 10), new_tokens=Lengths(3, 0.0, 3), tenants=None, rate_per_tenant=1.0, rates=(),
    in_flight=(), in_turn=False, zipf_exponent=1.0, without_adapter=0.0, arrivals="poisson", burstiness=1.0,
    requests=20_000,
)  # fmt: skip


@dataclass(frozen=True)
class Planted:
    """Times that depend on everything that they may depend on."""

    most_rows = None

    def step_s(self, rows: int, tokens: int, adapters: int) -> float:
        return 1e-3 * rows + 1e-6 * tokens + 1e-4 * adapters

    def read_s(self, tokens: int, past: int, adapter: bool) -> float:
        return 2e-3 + 1e-4 * tokens + 1e-6 * past + 1e-3 * adapter

    def load_s(self) -> float:
        return 5e-3


def whole(*arguments: Any, **more: Any) -> list[Answered]:
    found = simulate(*arguments, **more)
    assert found is not None
    return found


def test_two_requests_by_hand() -> None:
    """The second is read in two pieces beside the steps of the first, which it so delays."""
    due = [Due(0.0, 0, 10, 4), Due(0.001, NOBODY, 30, 2)]
    one, other = whole(due, Serving(rows=2, resident=1, chunk_tokens=20), Planted())
    read, first_piece, second_piece = 0.004, 0.004, 0.003020
    step, next_step, both = 0.001110, 0.001111, 0.002142
    assert one.ttft_ms == pytest.approx(1e3 * (0.005 + read))
    assert one.itl_ms == pytest.approx((1e3 * step, 1e3 * (first_piece + next_step), 1e3 * (second_piece + both)))
    assert (one.loaded, other.loaded) == (True, False)
    assert other.wait_ms == pytest.approx(1e3 * (0.005 + read + step - 0.001))
    assert other.itl_ms == pytest.approx((1e3 * both,))
    assert other.total_ms == pytest.approx(1e3 * (0.009 + step + first_piece + next_step + second_piece + both - 0.001))


def test_one_row_is_the_queue_m_d_1() -> None:
    """Pollaczek and Khinchine: a server of one row that takes s for each request, at the load r, has them wait
    r s / (2 (1 - r)) on average."""

    class Constant(Planted):
        def step_s(self, rows: int, tokens: int, adapters: int) -> float:
            return 0.01

        def read_s(self, tokens: int, past: int, adapter: bool) -> float:
            return 0.02

    service, load_of_it = 0.04, 0.6
    due = draw(FIXED, 5, load_of_it / service, "m/d/1")
    found = whole(due, Serving(1, 1, None, adapters=False), Constant())
    expected_ms = 1e3 * load_of_it * service / (2 * (1 - load_of_it))
    assert fmean(one.wait_ms for one in found) == pytest.approx(expected_ms, rel=0.05)
    assert {round(one.total_ms - one.wait_ms, 6) for one in found} == {40.0}


def test_the_share_of_loads_is_ches_approximation() -> None:
    """Che: a least-recently-used cache of C places holds tenant i at the chance 1 - exp(-p_i T), with the T at which
    these come to C together."""
    tenants, places = 500, 40
    weights = popularity(FIXED, tenants)
    parts = [weight / sum(weights) for weight in weights]

    def held(time: float) -> float:
        return sum(1 - math.exp(-part * time) for part in parts)

    low, high = 0.0, 1e6
    for _ in range(60):
        low, high = (middle, high) if held(middle := (low + high) / 2) < places else (low, middle)
    misses = sum(part * math.exp(-part * low) for part in parts)
    found = whole(draw(FIXED, tenants, 1.0, "che"), Serving(4, places, None), Planted())
    assert fmean(bool(one.loaded) for one in found[1000:]) == pytest.approx(misses, rel=0.03)


@dataclass
class Clocked:
    """Rows, a residency and a store of one chunk size, which take the planted time and do nothing else."""

    most: int
    resident: int
    now: float = 0.0
    lengths: list[int] = field(default_factory=list)
    slots: OrderedDict[int, None] = field(default_factory=OrderedDict)
    capacity: int = 1000
    tenants: list[int] = field(default_factory=list)

    class weights:
        device = torch.device("cpu")

    def take(self, tenant: int) -> tuple[int, bool]:
        loaded = tenant not in self.slots
        if loaded:
            if len(self.slots) == self.resident:
                self.slots.popitem(last=False)
            self.slots[tenant] = None
            self.now += Planted().load_s()
        self.slots.move_to_end(tenant)
        return tenant, loaded

    def of(self, tenant: int) -> Any:
        return type("Stored", (), {"whole": False})

    @property
    def store(self) -> Clocked:
        return self

    def enter(self, slot: int) -> int:
        self.lengths.append(0)
        self.tenants = [*self.tenants[: len(self.lengths) - 1], slot]
        return len(self.lengths) - 1

    def read(self, row: int, ids: torch.Tensor) -> torch.Tensor:
        self.now += Planted().read_s(len(ids), self.lengths[row], self.tenants[row] != NOBODY)
        self.lengths[row] += len(ids)
        return torch.zeros(2)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        count = len(tokens)
        adapters = len(set(self.tenants[:count]) - {NOBODY})
        self.now += Planted().step_s(count, sum(self.lengths[:count]), adapters)
        self.lengths[:count] = [length + 1 for length in self.lengths[:count]]
        return torch.zeros(count, 2)

    def move(self, source: int, to: int) -> None:
        self.lengths[to], self.tenants[to] = self.lengths[source], self.tenants[source]


@pytest.mark.parametrize("rate", [10.0, 45.0])
@pytest.mark.parametrize("chunk", [16, None])
def test_it_goes_as_the_scheduler_does(monkeypatch: pytest.MonkeyPatch, rate: float, chunk: int | None) -> None:
    """`perfbench.runtimes.continuous.engine` with the same requests, on rows that take the planted times."""
    rows: Any = Clocked(most=4, resident=6)
    engine = Engine(rows, rows, chunk, clock=lambda: rows.now)
    monkeypatch.setattr(load.time, "sleep", lambda seconds: setattr(rows, "now", rows.now + seconds + 1e-12))
    due = draw(TRAFFIC, 30, rate, "engine")
    requests, start, _ = load.drive(engine, list(due), [torch.zeros(one.prompt_tokens) for one in due])
    expected = load.answered(requests, due, start)
    found = whole(due, Serving(4, 6, chunk), Planted())
    assert [one.loaded for one in found] == [one.loaded for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert (one.wait_ms, one.ttft_ms, *one.itl_ms) == pytest.approx(
            (other.wait_ms, other.ttft_ms, *other.itl_ms), abs=1e-3
        )


def test_it_is_given_up_once_too_many_have_missed() -> None:
    due = all_at_once(TRAFFIC, 30, 100, "late")
    assert simulate(due, Serving(4, 6, 16), Planted(), Targets(1.0, 1.0, 0.99), 1) is None
    assert simulate(due, Serving(4, 6, 16), Planted(), Targets(1e6, 1e6, 0.99), 1) is not None


def test_adapters_that_are_there_are_not_loaded() -> None:
    due = all_at_once(replace(FIXED, requests=40), 8, 40, "there")
    assert not any(one.loaded for one in whole(due, Serving(4, 8, None), Planted(), resident=range(8)))
    assert any(one.loaded for one in whole(due, Serving(4, 8, None), Planted()))

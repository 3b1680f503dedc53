"""Dealing tenants to devices, what fits, and the smallest number of devices that holds the targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from perfbench.capacity import fit
from perfbench.capacity.answer import bound_by
from perfbench.capacity.fit import Memory
from perfbench.capacity.fleet import Fleet, Found, Missed, busiest, plan
from perfbench.capacity.question import Asked
from perfbench.capacity.times import MeasuredTimes, RoofTimes
from perfbench.figures.roof import DEVICES
from perfbench.methods import parameters
from perfbench.methods.registry import METHODS
from perfbench.spec.arms import Arm
from perfbench.spec.backbone_config import find_config, parameter_count, shape_of
from perfbench.spec.traffic import Lengths, Targets, Traffic
from perfbench.traffic import outcome

CONFIG = find_config("llama2-7b")
TRAFFIC = Traffic(
    prompt_tokens=Lengths(128, 0.7, 512), new_tokens=Lengths(16, 0.5, 64), tenants=None, rate_per_tenant=None,
    rates=(50.0,), in_flight=(), in_turn=False, zipf_exponent=1.0, without_adapter=0.0, arrivals="poisson",
    burstiness=1.0, requests=200,
)  # fmt: skip
TIMES = MeasuredTimes({1: 0.004, 32: 0.010}, 0.005, 2e-5, 0.002, "planted")


def lora(rank: int) -> tuple[Any, int]:
    """(plan, bytes of a tenant)"""
    options = METHODS["lora"].options(rank=rank)
    found = fit.plan_of("lora", options, CONFIG)
    return found, fit.bytes_of(found, "bf16")


def asked(
    times: Any, *, device: float = 80 * 2**30, adapter: int = 40_000_000, rate: float = 50.0, **more: Any
) -> Fleet:
    memory = Memory.of(CONFIG, "bf16", TRAFFIC, int(device), adapter)
    return replace(Fleet(TRAFFIC, 1000, rate, Targets(500.0, 40.0, 0.99), times, memory, 256), **more)


@pytest.mark.parametrize("devices", [1, 2, 7, 40])
def test_every_device_gets_the_same_part_of_the_requests(devices: int) -> None:
    found = busiest(TRAFFIC, 1000, 60.0, devices)
    assert found.rate == pytest.approx(60.0 / devices, rel=0.01)
    assert len(found.weights) == pytest.approx(1000 / devices, rel=0.5)


def test_one_device_gets_all_tenants_as_they_are() -> None:
    found = busiest(TRAFFIC, 3, 60.0, 1)
    assert sorted(found.weights, reverse=True) == pytest.approx([1, 1 / 2, 1 / 3])
    assert found.rate == pytest.approx(60.0)


def test_a_tenant_who_sends_more_than_a_device_serves_is_on_several() -> None:
    """The first of 3 with an exponent of 8 sends nearly everything."""
    found = busiest(replace(TRAFFIC, zipf_exponent=8.0), 3, 60.0, 4)
    assert found.rate == pytest.approx(60.0 / 4, rel=0.02)


def test_what_fits_is_what_the_shapes_say() -> None:
    adapter = lora(64)[1]
    memory = Memory.of(CONFIG, "bf16", TRAFFIC, 24 * 2**30, adapter)
    cache = 2 * 32 * 32 * 128 * 2 * (512 + 64 - 1)
    left = 24 * 2**30 - 2 * parameter_count(CONFIG) - 8 * (cache + adapter)
    assert memory.resident(8) == left // adapter - 1 > 0
    assert memory.resident(1000) < 0


def fits(found: Found, rank: int, device: int) -> bool:
    """Counted by another way than `Memory`: of `perfbench params` what a tenant takes."""
    served = parameters.served_count("lora", shape_of("llama2-7b"), METHODS["lora"].options(rank=rank))
    cache = 2 * 32 * 32 * 128 * 2 * (512 + 64 - 1) * found.rows
    return 2 * parameter_count(CONFIG) + cache + 2 * served * (found.resident + 1 + found.rows) <= device


@pytest.mark.parametrize("planted", [False, True])
def test_adapters_left_out_of_the_fit_are_seen(monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    """Planted: an adapter takes a byte. More of them and more rows are then planned than there is room for."""
    if planted:
        monkeypatch.setattr(fit, "bytes_of", lambda plan, dtype: 1)
    adapter = fit.bytes_of(lora(64)[0], "bf16")
    found = plan(asked(TIMES, device=24 * 2**30, adapter=adapter))
    assert isinstance(found, Found)
    assert fits(found, 64, 24 * 2**30) is not planted


def test_one_device_less_misses_the_targets() -> None:
    found = plan(asked(TIMES, rate=150.0))
    assert isinstance(found, Found)
    assert found.devices > 2
    targets = asked(TIMES).targets
    assert all(outcome.held(answered, targets) for answered in found.simulated)
    assert found.fewer is not None
    assert not all(outcome.held(answered, targets) for answered in found.fewer)


def test_more_requests_need_more_devices_and_quicker_steps_fewer() -> None:
    slow = MeasuredTimes({rows: 2 * seconds for rows, seconds in TIMES.steps.items()}, 0.010, 4e-5, 0.002, "")
    few, many, slower = (plan(one) for one in (asked(TIMES), asked(TIMES, rate=200.0), asked(slow)))
    assert few.devices < slower.devices < many.devices  # type: ignore[union-attr]


def test_with_little_memory_adapters_come_and_go() -> None:
    much, little = plan(asked(TIMES)), plan(asked(TIMES, device=20 * 2**30))
    assert isinstance(much, Found)
    assert isinstance(little, Found)
    assert much.loaded_share == 0
    assert little.loaded_share > 0.05


@pytest.mark.parametrize(
    ("targets", "what", "least"),
    [(Targets(8.0, 40.0, 0.99), "ttft", 8.0), (Targets(500.0, 3.0, 0.99), "itl", 3.0)],
)
def test_what_a_request_alone_misses_no_fleet_mends(targets: Targets, what: str, least: float) -> None:
    found = plan(asked(TIMES, targets=targets))
    assert isinstance(found, Missed)
    assert (found.what, found.limit) == (what, least)
    assert found.by > least


def test_what_does_not_fit_is_named() -> None:
    found = plan(asked(TIMES, device=12.7 * 2**30))
    assert isinstance(found, Missed)
    assert (found.what, found.limit) == ("memory", int(12.7 * 2**30))


def test_no_more_rows_than_were_measured() -> None:
    found = plan(asked(TIMES))
    assert isinstance(found, Found)
    assert found.rows <= 32
    assert plan(asked(TIMES, rows=4)).rows == 4


def test_the_roof_needs_no_more_devices_than_slower_steps() -> None:
    """Of any server with these rows, whose steps can't be shorter."""
    plan_of_it, adapter = lora(4)
    roof = RoofTimes(CONFIG, "bf16", DEVICES["a40"], plan_of_it, adapter, 32e9)

    class Slower(RoofTimes):
        def step_s(self, rows: int, tokens: int, adapters: int) -> float:
            return 1.3 * super().step_s(rows, tokens, adapters)

    slower = Slower(CONFIG, "bf16", DEVICES["a40"], plan_of_it, adapter, 32e9)
    least, more = (plan(asked(times, device=48 * 2**30, adapter=adapter, rate=300.0)) for times in (roof, slower))
    assert least.devices < more.devices  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"device": 14.2 * 2**30, "rate": 100.0}, "memory"),
        ({"rows": 2}, "rows"),
        ({"rate": 200.0, "targets": Targets(40.0, 40.0, 0.99)}, "ttft"),
        ({"rate": 200.0, "targets": Targets(5000.0, 13.0, 0.99)}, "itl"),
        ({"rate": 1.0}, None),
    ],
)
def test_what_one_device_less_would_miss_is_named(more: dict[str, Any], expected: str | None) -> None:
    one = Asked(Arm("lora", "lora", METHODS["lora"].options()), asked(TIMES, **more), "measured")
    found = plan(one.fleet)
    assert isinstance(found, Found)
    assert bound_by(one, found) == expected


def test_a_target_far_off_hides_no_queue_that_grows() -> None:
    """Reading alone takes 5 ms of a prompt, and 20 us more of each token: one device reads fewer than 150 a second."""
    found = plan(asked(TIMES, rate=150.0, targets=Targets(2000.0, 40.0, 0.99)))
    assert isinstance(found, Found)
    assert found.devices > 1

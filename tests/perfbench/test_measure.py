"""One repetition: its figures, what voids it, and the garbage collector's state around it."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench import backbone, measure
from perfbench.runtimes.generation import Batch, Generation
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def arm() -> PlanArm:
    return PlanArm(backbone.load("llama-tiny", "fp32", "cpu", seed=0), None, "eager")


def make_batch(new_tokens: int, beams: int = 1) -> Batch:
    ids = torch.arange(3, 11).view(2, 4)
    return Batch(ids, torch.ones_like(ids), (-1, -1), beams, new_tokens)


class Wrapped:
    """An arm with something more inside its generate call."""

    def __init__(self, arm: PlanArm, inside: Any):
        self.arm, self.model, self.inside = arm, arm.model, inside

    def generate(self, batch: Batch, **observers: Any) -> Generation:
        self.inside()
        return self.arm.generate(batch, **observers)

    def close(self) -> None:
        self.arm.close()


@pytest.mark.parametrize("beams", [1, 3])
def test_a_sample_has_one_latency_for_each_later_token(arm: PlanArm, beams: int) -> None:
    sample = measure.repetition(arm, make_batch(5, beams), CPU, nvml=None)
    assert len(sample["itl_ms"]) == 5 - 1
    assert all(value > 0 for value in sample["itl_ms"])
    assert 0 < sample["ttft_ms"] < sample["total_ms"]
    assert sample["ttft_ms"] + sum(sample["itl_ms"]) <= sample["total_ms"] * (1 + 1e-9)
    assert sample["void"] is None
    assert sample["energy_mj"] is sample["sm_clock_mhz"] is sample["throttle_reasons"] is None


def test_a_compilation_in_the_window_voids_the_sample(arm: PlanArm) -> None:
    def compile_something() -> None:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))

    sample = measure.repetition(Wrapped(arm, compile_something), make_batch(2), CPU, nvml=None)
    assert sample["void"] == "1 compilation(s) inside the window"
    assert measure.repetition(arm, make_batch(2), CPU, nvml=None)["void"] is None


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_before_and_not_within(arm: PlanArm, enabled: bool) -> None:
    within: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        measure.repetition(Wrapped(arm, lambda: within.append(gc.isenabled())), make_batch(2), CPU, nvml=None)
        assert within == [False]
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_comes_back_after_an_error(arm: PlanArm) -> None:
    def fail() -> None:
        raise MemoryError("planted")

    assert gc.isenabled()
    with pytest.raises(MemoryError, match="planted"):
        measure.repetition(Wrapped(arm, fail), make_batch(2), CPU, nvml=None)
    assert gc.isenabled()


def test_a_second_turn_is_timed_beside_the_first() -> None:
    static = StaticArm(backbone.load("llama-tiny", "fp32", "cpu", seed=0), None, "eager")
    batch = make_batch(3)
    assert "follow_up_ttft_ms" not in measure.repetition(static, batch, CPU, nvml=None)
    sample = measure.repetition(static, replace(batch, follow_up=batch.input_ids), CPU, nvml=None)
    assert sample["follow_up_ttft_ms"] > 0
    assert len(sample["itl_ms"]) == 2


def test_a_second_turn_on_another_runtime_is_no_figure(arm: PlanArm) -> None:
    batch = make_batch(3)
    with pytest.raises(TypeError, match="a second turn needs runtime static, got PlanArm"):
        measure.repetition(arm, replace(batch, follow_up=batch.input_ids), CPU, nvml=None)

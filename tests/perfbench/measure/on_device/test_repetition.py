"""One repetition: its figures, what voids it, and the garbage collector's state around it."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.measure.on_device import repetition
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch, Generation
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[4]


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
    sample = repetition.repetition(arm, make_batch(5, beams), CPU, nvml=None).sample
    assert len(sample["itl_ms"]) == 5 - 1
    assert all(value > 0 for value in sample["itl_ms"])
    assert 0 < sample["ttft_ms"] < sample["total_ms"]
    assert sample["ttft_ms"] + sum(sample["itl_ms"]) <= sample["total_ms"] * (1 + 1e-9)
    assert sample["void"] is None
    assert sample["energy_mj"] is sample["sm_clock_mhz"] is sample["throttle_reasons"] is None


def test_a_compilation_in_the_window_voids_the_sample(arm: PlanArm) -> None:
    def compile_something() -> None:
        torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))

    sample = repetition.repetition(Wrapped(arm, compile_something), make_batch(2), CPU, nvml=None).sample
    assert sample["void"] == "1 compilation(s) inside the window: torch.compile"
    assert repetition.repetition(arm, make_batch(2), CPU, nvml=None).sample["void"] is None


# Compiles a real Triton kernel for a GPU that need not be there: before the first window, in the second, in none, in
# the fourth from the cache on the disk. Prints each sample's reason and what somebody else's listener has heard.
TRITON_SCRIPT = """
import json

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from perfbench.measure.on_device import repetition
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm


@triton.jit
def double(x, SIZE: tl.constexpr):
    places = x + tl.arange(0, SIZE)
    tl.store(places, tl.load(places) * 2)


def compile_it(size):
    source = ASTSource(double, {"x": "*fp32", "SIZE": "constexpr"}, {"SIZE": size})
    triton.compile(source, target=GPUTarget("cuda", 86, 32))


class Wrapped:
    def __init__(self, arm, inside):
        self.arm, self.model, self.inside = arm, arm.model, inside

    def generate(self, batch, **observers):
        self.inside()
        return self.arm.generate(batch, **observers)


heard = []


def other(*, src, cache_hit, **_):
    heard.append([src.name, cache_hit])


arm = PlanArm(backbone.load("llama-tiny", "fp32", "cpu", seed=0), None, "eager")
ids = torch.arange(3, 11).view(2, 4)
batch = Batch(ids, torch.ones_like(ids), (-1, -1), 1, 2)



# Nothing of `size` or half of it has been compiled before.
def heard_and_voided(listener, size):
    triton.knobs.compilation.listener = listener
    heard.clear()
    compile_it(size // 2)
    voids = []
    for inside in (lambda: None, lambda: compile_it(size), lambda: None, lambda: compile_it(size)):
        sample = repetition.repetition(Wrapped(arm, inside), batch, torch.device("cpu"), nvml=None).sample
        voids.append(sample["void"])
    assert triton.knobs.compilation.listener is listener, "it has its place back"
    return [voids, list(heard)]


print(json.dumps({"alone": heard_and_voided(None, 16), "with-another": heard_and_voided(other, 64)}))
"""


@pytest.fixture(scope="module")
def compiled_in_the_window(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What TRITON_SCRIPT prints, in a process of its own, where Triton is not interpreted."""
    pytest.importorskip("triton", reason="triton is not there for this platform")
    tmp_path = tmp_path_factory.mktemp("compiled")
    script = tmp_path / "compile_in_window.py"
    script.write_text(TRITON_SCRIPT, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path / "cache"), "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("listener", ["alone", "with-another"])
def test_a_triton_kernel_that_is_compiled_in_the_window_voids_the_sample(
    listener: str, compiled_in_the_window: dict[str, Any]
) -> None:
    voids, heard = compiled_in_the_window[listener]
    found = "1 compilation(s) inside the window: Triton's double"
    assert voids == [None, found, None, f"{found} from its cache"]
    expected = [["double", False], ["double", False], ["double", True]]
    assert heard == (expected if listener == "with-another" else [])


def test_without_triton_torch_s_compilations_are_seen_still(arm: PlanArm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    compiled = Wrapped(arm, lambda: torch.compile(lambda x: x + 2, backend="eager")(torch.ones(3)))
    sample = repetition.repetition(compiled, make_batch(2), CPU, nvml=None).sample
    assert sample["void"] == "1 compilation(s) inside the window: torch.compile"


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_before_and_not_within(arm: PlanArm, enabled: bool) -> None:
    within: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        repetition.repetition(Wrapped(arm, lambda: within.append(gc.isenabled())), make_batch(2), CPU, nvml=None)
        assert within == [False]
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()


def test_the_collector_comes_back_after_an_error(arm: PlanArm) -> None:
    def fail() -> None:
        raise MemoryError("planted")

    assert gc.isenabled()
    with pytest.raises(MemoryError, match="planted"):
        repetition.repetition(Wrapped(arm, fail), make_batch(2), CPU, nvml=None)
    assert gc.isenabled()


def test_a_second_turn_is_timed_beside_the_first() -> None:
    static = StaticArm(backbone.load("llama-tiny", "fp32", "cpu", seed=0), None, "eager")
    batch = make_batch(3)
    assert "follow_up_ttft_ms" not in repetition.repetition(static, batch, CPU, nvml=None).sample
    sample = repetition.repetition(static, replace(batch, follow_up=batch.input_ids), CPU, nvml=None).sample
    assert sample["follow_up_ttft_ms"] > 0
    assert len(sample["itl_ms"]) == 2


def test_a_second_turn_on_another_runtime_is_no_figure(arm: PlanArm) -> None:
    batch = make_batch(3)
    with pytest.raises(TypeError, match="a second turn needs runtime static, got PlanArm"):
        repetition.repetition(arm, replace(batch, follow_up=batch.input_ids), CPU, nvml=None)


def test_a_repetition_gives_the_tokens_that_it_timed(arm: PlanArm) -> None:
    batch = make_batch(4)
    assert torch.equal(repetition.repetition(arm, batch, CPU, nvml=None).tokens, arm.generate(batch).tokens)


def test_the_clock_s_fault_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert repetition.clock_fault() is None
    fine = time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: int(fine() * 64) / 64)
    assert (repetition.clock_fault() or "").startswith("expected steps of at most 100 us, got ")

"""What the benchmarks share: the device, its roof, and a timed call that waits for the device.

    python -m pytest -n 0 tests/benchmarks --benchmark-only

-n 0 because nothing is timed in several processes at once. In an ordinary test run each benchmark is called once and
not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from perfbench.figures.roof import Device
from perfbench.measure.on_device.measured_roof import device_roof
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPE = "bf16" if DEVICE.type == "cuda" else "fp32"
REQUESTS = 8
SERVED = [name for name, method in METHODS.items() if method.served_by == "plan"]
KERNELS = ["eager", pytest.param("triton", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session")
def base() -> backbone.Backbone:
    """A small Llama on a CPU, LLaMA-2 7B's shape on a GPU."""
    return backbone.load("llama2-7b" if DEVICE.type == "cuda" else "llama-256x8", DTYPE, DEVICE.type, seed=0)


@pytest.fixture(scope="session")
def roof(request: pytest.FixtureRequest) -> Device | None:
    """The device's roof; None where nothing is timed, since it is measured on a device that the table lacks."""
    return device_roof(DEVICE, DTYPE) if request.config.getoption("benchmark_only") else None


@pytest.fixture
def timed(benchmark: Any, roof: Device | None) -> Callable[..., None]:
    """`timed(call, bytes, **extra)`: calls and waits for the device, and notes what it must read, `bytes`, with the
    least time that this takes, beside the measured one."""

    def run(
        call: Callable[[], object], least_bytes: int, setup: Callable[[], None] | None = None, **extra: Any
    ) -> None:
        def waiting() -> None:
            with torch.inference_mode():
                call()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize()

        if setup is None:
            benchmark(waiting)
        else:
            benchmark.pedantic(waiting, setup=setup, rounds=30, warmup_rounds=2)
        benchmark.extra_info.update({"bytes": least_bytes, **extra})
        if roof is not None:
            benchmark.extra_info["least_us"] = round(least_bytes / roof.bytes_per_s * 1e6, 2)
            benchmark.extra_info["roof_share"] = round(least_bytes / roof.bytes_per_s / benchmark.stats["median"], 3)

    return run


def make_bank(base: backbone.Backbone, method: str, residents: int = REQUESTS) -> Bank | None:
    """A bank of random adapters; None for the bare backbone."""
    if method == "none":
        return None
    options, module = METHODS[method].options(), parameters.implementation(method)
    bank = Bank(parameters.meta_plan(method, base.shape, options), residents, base.dtype, base.device, base.linear)
    for seed in range(residents):
        bank.admit(module.plan(parameters.make(method, base.shape, options, seed=seed), base.shape, options))
    return bank


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """All bytes of these tensors."""
    return sum(t.nbytes for t in tensors)

"""One timed repetition: what is kept out of the window, and what makes a sample void."""

from __future__ import annotations

import gc
import time
from typing import Any

import torch

from perfbench.metrics import sample_metrics
from perfbench.nvml import Nvml
from perfbench.runtimes.generation import Arm, Batch, Generation, StepClock
from perfbench.runtimes.static.arm import StaticArm


class CompilationWatch:
    """Counts the compilations that torch begins while the window is open; the first call registers it for good."""

    count = 0
    _registered = False

    @classmethod
    def register(cls) -> None:
        """Begins to count. torch.compile's start is the event; eager code never raises it."""
        if not cls._registered:
            from torch._dynamo.callback import callback_handler

            callback_handler.register_start_callback(cls._note)
            cls._registered = True

    @classmethod
    def _note(cls, *_: Any) -> None:
        cls.count += 1


def repetition(arm: Arm, batch: Batch, device: torch.device, nvml: Nvml | None) -> dict[str, Any]:
    """Generates once and returns the sample: the figures of `metrics.sample_metrics`, `void` (None or the reason),
    and, where NVML gives them, `sm_clock_mhz`, `throttle_reasons` and `energy_mj`.

    Garbage is collected before and not within. A compilation inside the window voids the sample.
    """
    CompilationWatch.register()
    clock = StepClock(device)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        if device.type == "cuda":
            torch.cuda.synchronize()
        energy_before = nvml.total_energy_mj() if nvml else None
        compilations = CompilationWatch.count
        clock.mark()
        generated = arm.generate(batch, clock=clock)
        clock.mark()
        *token_times_ms, total_ms = clock.elapsed_ms()
        energy_after = nvml.total_energy_mj() if nvml else None
        second = {} if batch.follow_up is None else _second_turn(arm, generated, device)
    finally:
        if enabled:
            gc.enable()
    compiled = CompilationWatch.count - compilations
    sample = sample_metrics(token_times_ms, batch.input_ids.shape[0], total_ms)
    energy = None if energy_before is None or energy_after is None else energy_after - energy_before
    return sample | second | {
        "void": f"{compiled} compilation(s) inside the window" if compiled else None,
        "sm_clock_mhz": nvml.sm_clock_mhz() if nvml else None,
        "throttle_reasons": nvml.throttle_reasons() if nvml else None,
        "energy_mj": energy,
        "unix_time_s": time.time(),
    }


def _second_turn(arm: Arm, first: Generation, device: torch.device) -> dict[str, float]:
    """`follow_up_ttft_ms` of the turn that follows the generation `first`."""
    if not isinstance(arm, StaticArm):
        raise TypeError(f"a second turn needs runtime static, got {type(arm).__name__}")
    clock = StepClock(device)
    clock.mark()
    arm.follow_up(first.tokens, clock=clock)
    return {"follow_up_ttft_ms": clock.elapsed_ms()[0]}

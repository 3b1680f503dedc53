"""One timed repetition: what is kept out of the window, and what makes a sample void."""

from __future__ import annotations

import gc
import time
from typing import Any, NamedTuple

import torch

from perfbench.figures.metrics import contradiction, sample_metrics
from perfbench.machine import timer
from perfbench.machine.nvml import Nvml
from perfbench.runtimes.generation import Arm, Batch, Generation, StepClock
from perfbench.runtimes.static.arm import StaticArm


class CompilationWatch:
    """While it is open, notes what torch.compile and Triton compile; `reason` says it as a sample's `void`.

    Triton's one listener may be somebody else's: that one goes on hearing everything, and has its place back after.
    A kernel that Triton finds in its cache on the disk counts too: to load it takes milliseconds once.
    """

    def __init__(self) -> None:
        self._found: list[str] = []

    def __enter__(self) -> CompilationWatch:
        from torch._dynamo.callback import callback_handler

        callback_handler.register_start_callback(self._by_torch)
        if (triton := _triton_compilation()) is not None:
            self._before = triton.listener
            triton.listener = self._listener = self._by_triton
        return self

    def __exit__(self, *_: object) -> None:
        from torch._dynamo.callback import callback_handler

        callback_handler.remove_start_callback(self._by_torch)
        if (triton := _triton_compilation()) is not None and triton.listener is self._listener:
            triton.listener = self._before

    @property
    def reason(self) -> str | None:
        """How many compilations there were and what was compiled, or None where there was nothing."""
        if not self._found:
            return None
        return f"{len(self._found)} compilation(s) inside the window: {', '.join(dict.fromkeys(self._found))}"

    def _by_torch(self, *_: Any) -> None:
        self._found.append("torch.compile")

    def _by_triton(self, *, src: Any, cache_hit: bool, **others: Any) -> None:
        self._found.append(f"Triton's {src.name}{' from its cache' if cache_hit else ''}")
        if self._before is not None:
            self._before(src=src, cache_hit=cache_hit, **others)


def _triton_compilation() -> Any:
    """Triton's settings of compilation, with the `listener` that hears of each; None without Triton."""
    try:
        from triton import knobs
    except ImportError:
        return None
    return knobs.compilation


class Repetition(NamedTuple):
    """One timed call. sample: the figures of `metrics.sample_metrics`, `void` (None or the reason), and, where NVML
    gives them, `sm_clock_mhz`, `throttle_reasons` and `energy_mj`; tokens: int64 [Q, N] on the CPU, what it made."""

    sample: dict[str, Any]
    tokens: torch.Tensor


def repetition(arm: Arm, batch: Batch, device: torch.device, nvml: Nvml | None) -> Repetition:
    """Generates once. Garbage is collected before and not within. A compilation inside the window voids the sample.

    RuntimeError where the marks and the figures made of them contradict each other: a fault of ours.
    """
    clock = StepClock(device)
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        with CompilationWatch() as compilations:
            if device.type == "cuda":
                torch.cuda.synchronize()
            energy_before = nvml.total_energy_mj() if nvml else None
            clock.mark()
            generated = arm.generate(batch, clock=clock)
            clock.mark()
            *token_times_ms, total_ms = clock.elapsed_ms()
            energy_after = nvml.total_energy_mj() if nvml else None
            second = {} if batch.follow_up is None else _second_turn(arm, generated, device)
    finally:
        if enabled:
            gc.enable()
    sample = sample_metrics(token_times_ms, batch.input_ids.shape[0], total_ms)
    energy = None if energy_before is None or energy_after is None else energy_after - energy_before
    if (wrong := contradiction(sample, batch.input_ids.shape[0], batch.new_tokens)) is not None:
        raise RuntimeError(f"a sample contradicts itself: {wrong}")
    sample = (
        sample
        | second
        | {
            "void": compilations.reason,
            "sm_clock_mhz": nvml.sm_clock_mhz() if nvml else None,
            "throttle_reasons": nvml.throttle_reasons() if nvml else None,
            "energy_mj": energy,
            "unix_time_s": time.time(),
        }
    )
    return Repetition(sample, generated.tokens.cpu())


def clock_fault() -> str | None:
    """Why the clock that times a CPU can't be trusted, in a line; None where it can."""
    clock = StepClock(torch.device("cpu"))
    clock.mark()

    def now() -> float:
        clock.mark()
        return clock.elapsed_ms()[-1] / 1e3

    return timer.fault(now)


def _second_turn(arm: Arm, first: Generation, device: torch.device) -> dict[str, float]:
    """`follow_up_ttft_ms` of the turn that follows the generation `first`."""
    if not isinstance(arm, StaticArm):
        raise TypeError(f"a second turn needs runtime static, got {type(arm).__name__}")
    clock = StepClock(device)
    clock.mark()
    arm.follow_up(first.tokens, clock=clock)
    return {"follow_up_ttft_ms": clock.elapsed_ms()[0]}

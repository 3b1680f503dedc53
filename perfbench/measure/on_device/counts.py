"""Figures without noise: operations, launches, FLOPs and instructions of one decode step."""

from __future__ import annotations

import gc
from dataclasses import replace
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from perfbench.machine.instructions import Counter
from perfbench.runtimes.generation import Arm, Batch, StepClock

# So often is a step's work counted in instructions.
CALLS = 3


class _OperationCounter(TorchDispatchMode):
    """Counts every ATen operation that reaches the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def decode_step(arm: Arm, batch: Batch, device: torch.device) -> dict[str, int | None]:
    """What the last decode step adds: counts of a call with it less those of a call that ends before."""
    with_step = _last_step(batch)
    without = replace(with_step, new_tokens=1)
    arm.generate(without)  # what an arm makes once, such as room for its adapters, is no part of a step
    operations, flops = (a - b for a, b in zip(_operations(arm, with_step), _operations(arm, without), strict=True))
    launches = None
    if device.type == "cuda":
        launches = _launches(arm, with_step) - _launches(arm, without)
    return {
        "aten_ops_per_decode_step": operations,
        "kernel_launches_per_decode_step": launches,
        "flops_per_decode_step": flops,
    }


def instructions(arm: Arm, batch: Batch, counter: Counter) -> int:
    """Of the last decode step, from one token chosen to the next: the least of some calls, since what disturbs a count
    adds to it."""
    step, found = _last_step(batch), []
    arm.generate(step)
    gc.collect()
    gc.disable()
    try:
        for _ in range(CALLS):
            clock = _StepCounter(counter)
            arm.generate(step, clock=clock)
            found.append(clock.instructions)
    finally:
        gc.enable()
    return min(found)


class _StepCounter(StepClock):
    """`instructions` from its first mark to its last one."""

    def __init__(self, counter: Counter):
        super().__init__(torch.device("cpu"))
        self._counter = counter

    def mark(self) -> None:
        """Starts to count, and then ends it."""
        if self._marks:
            self.instructions = self._counter.stop()
        super().mark()
        if len(self._marks) == 1:
            self._counter.start()


def _last_step(batch: Batch) -> Batch:
    """A batch of 2 tokens, on prompts made longer so that the second token sees the context that the batch's last one
    sees."""
    filler = torch.ones_like(batch.input_ids[:, :1]).expand(-1, batch.new_tokens - 2)
    return replace(
        batch,
        input_ids=torch.cat([batch.input_ids, filler], dim=1),
        attention_mask=torch.cat([batch.attention_mask, filler], dim=1),
        new_tokens=2,
        follow_up=None,
    )


def _operations(arm: Arm, batch: Batch) -> tuple[int, int]:
    """(ATen operations, FLOPs) of one call. The inner counter sees an operation before the outer one splits it up."""
    with FlopCounterMode(display=False) as flops, _OperationCounter() as operations:
        arm.generate(batch)
    return operations.count, flops.get_total_flops()


def _launches(arm: Arm, batch: Batch) -> int:
    arm.generate(batch)  # what is captured or compiled once does not count
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        arm.generate(batch)
        torch.cuda.synchronize()
    on_device = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return sum(1 for e in on_device if not e.name.startswith("Mem"))

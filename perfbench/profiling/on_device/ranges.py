"""Named ranges in a profile: phase, layer, module kind and method.

A range is `METHOD / PHASE` (`lora / decode step 2`), `layer 3`, `layer 3 / q` or, where no layer is known, the kind
alone (`head`). `perfbench.profiling.on_device.probes` puts them around what a runtime calls.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch

# The public `record_function` costs 12 microseconds, as much as a small operation, and there are about 12 ranges in
# each layer; this one costs 1. It marks ranges as operators, which `trace.mark_ranges` puts right in the file.
from torch._C._profiler import _RecordFunctionFast
from torch.profiler import record_function

from perfbench.runtimes.generation import StepClock

BIND = "bind adapters"
KV_CACHE = "kv cache"
VECTORS = "prompt vectors"
MODEL = "model"


class Ranges:
    """The names of the ranges of one arm, and what makes them; `method` is the arm's label."""

    def __init__(self, method: str):
        self.method = method
        self.names: set[str] = set()

    def phase(self, step: int) -> str:
        """The name of the phase that chooses token `step`, counted from 0."""
        return f"{self.method} / {'prefill' if step == 0 else f'decode step {step}'}"

    def fast(self, name: str) -> Any:
        """A context of that name; one object may be entered again and again, not inside itself."""
        self.names.add(name)
        return _RecordFunctionFast(name)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` inside a range."""
        context = self.fast(name)

        def inside(*args: Any, **kwargs: Any) -> Any:
            with context:
                return function(*args, **kwargs)

        return inside


class PhaseClock(StepClock):
    """Opens the range of each phase as the one before it ends; what follows the last token has none."""

    def __init__(self, device: torch.device, ranges: Ranges, new_tokens: int):
        super().__init__(device)
        self._names = iter([ranges.phase(step) for step in range(new_tokens)])
        self._open: Any = None

    def mark(self) -> None:
        """The end of a phase, and before the first call of `generate` the start of one."""
        super().mark()
        if self._open is not None:
            self._open.__exit__(None, None, None)
        name = next(self._names, None)
        self._open = None if name is None else record_function(name)
        if self._open is not None:
            self._open.__enter__()


def replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """owner.name becomes make(owner.name) until the stack is closed. AttributeError where there is no such name."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    stack.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))

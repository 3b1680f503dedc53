"""A stand-in for a CUDA graph where there is no GPU: a tape of ATen operations.

A CUDA graph replays kernels on the addresses that they were captured with. The tape does the same with ATen operations:
it runs them again on the very tensors of the first run, and writes the results where the first ones went. What would
go wrong in a graph goes wrong here: a length or a tenant that the host has baked in, a tensor that was made anew.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from perfbench.runtimes.static.capture import Step

# What a capture refuses: the host learns what is on the device.
WAITS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.is_nonzero.default}


class Tape(TorchDispatchMode):
    """Notes every operation with the tensors that it was given and gave."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in WAITS, f"{func} waits for the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        with torch.inference_mode():
            for func, args, kwargs, out in self.calls:
                again = func(*args, **kwargs)
                for place, made in zip(tree_leaves(out), tree_leaves(again), strict=True):
                    # A view, and what was written in place, is where it was.
                    if isinstance(place, torch.Tensor) and place.data_ptr() != made.data_ptr():
                        place.copy_(made)


def taped(step: Step) -> Step:
    """A capture: runs the step once, then once more onto the tape that is replayed from then on."""
    step()
    tape = Tape()
    with tape:
        step()
    return tape.replay

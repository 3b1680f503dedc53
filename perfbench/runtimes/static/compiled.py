"""The decode step through torch.compile: one compilation for each decoder, that is for each size of batch."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

from perfbench.runtimes.static.product import computing_threads

# What the step of a decoder does, given the decoder.
Compute = Callable[[Any], None]

BACKEND = "inductor"
_OPTIONS: dict[str, Any] = {"guard_filter_fn": lambda guards: [False] * len(guards)}
_ON_A_CPU: dict[str, Any] = {
    # The calls too in C++: in Python they take 0.1 of the step of a small model.
    "cpp_wrapper": True,
    # Else it replaces calls of oneDNN's product by its own, for which it must have packed the weight itself.
    "pattern_matcher": False,
    # Values for each thread; the same as torch's operations have.
    "cpp.min_chunk_size": 32768,
}


def as_it_is(compute: Compute, device: torch.device) -> Compute:
    """The step operation by operation."""
    return compute


def compiled(compute: Compute, device: torch.device) -> Compute:
    """`compute` as one graph of Inductor's: C++ on a CPU, Triton on a GPU. Its first call compiles, and keeps how long
    that took, with the call itself, as `compile_ms` of the decoder.

    torch would look at every call whether each of hundreds of tensors is still what was compiled for, as it must for
    calls that may differ. A decoder's do not: its tensors stay where they are and keep their sizes, and what changes
    from step to step lies in them, as it must for a CUDA graph. A batch of another size has another decoder, which
    compiles its own.
    """
    torch.compiler.assume_constant_result(computing_threads)
    graph = torch.compile(
        _copy(compute),
        backend=BACKEND,
        fullgraph=True,
        dynamic=False,
        options=_OPTIONS | (_ON_A_CPU if device.type == "cpu" else {}),
    )

    def run(decoder: Any) -> None:
        if _get_current_dispatch_mode() is not None:
            compute(decoder)  # somebody counts operations, which what is compiled does not show
            return
        if decoder.compile_ms is not None:
            graph(decoder)
            return
        started = time.perf_counter()
        graph(decoder)
        decoder.compile_ms = (time.perf_counter() - started) * 1e3

    return run


def _copy(compute: Any) -> Compute:
    """The same function with code of its own: torch keeps what it compiled with the code, and without guards would take
    one decoder's for another's."""
    return FunctionType(compute.__code__.replace(), compute.__globals__)


# By the kernel set.
STEPS: dict[str, Callable[[Compute, torch.device], Compute]] = {
    "eager": as_it_is,
    "triton": as_it_is,
    "compiled": compiled,
}

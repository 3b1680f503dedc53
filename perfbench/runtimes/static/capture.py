"""The decode step as a CUDA graph: one launch from the host replays all of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from weakref import WeakMethod

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode

Step = Callable[[], None]


def weak(step: Step) -> Step:
    """The bound method `step` without a hold on the object that it belongs to.

    A capture may hand back the very step that it was given. A decoder that held itself by it would stay, and with it
    the cache, until Python next looks for circles.
    """
    method = WeakMethod(step)

    def run() -> None:
        found = method()
        assert found is not None, "whoever replays the step has it"
        found()

    return run


@cache
def _warm_up_stream() -> torch.cuda.Stream:
    """One for the process: torch keeps a cuBLAS workspace for every stream that made a product, for good."""
    return torch.cuda.Stream()


def run_again(step: Step) -> Step:
    """`step` as it is, which does the same work on the same tensors whenever it is called."""
    return step


def cuda_graph(step: Step) -> Step:
    """`step` captured: what it returns does the same work on the same tensors, whatever they hold by then.

    `step` must read and write fixed tensors only, not wait for the device, and be free to run twice. It runs once
    here, so that kernels are compiled and libraries set up before the capture.

    A captured product keeps reading and writing the cuBLAS workspace that it was captured with. torch would hand the
    first graph's to every later one; each gets its own instead, inside the memory that the graph itself keeps.
    """
    if _get_current_dispatch_mode() is not None:
        return step  # somebody counts operations, of which a replay has none
    stream = _warm_up_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    torch._C._cuda_clearCublasWorkspaces()
    with torch.cuda.graph(graph):
        step()
    torch._C._cuda_clearCublasWorkspaces()
    return graph.replay

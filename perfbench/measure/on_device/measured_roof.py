"""The roof of a device that the table lacks: its bandwidth by a copy, its arithmetic by a matrix product."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from perfbench.figures.roof import Device, known_device
from perfbench.runtimes.backbone import DTYPES

COPY_BYTES = {"cpu": 2**28, "cuda": 2**30}
PRODUCT_SIZE = {"cpu": 1024, "cuda": 8192}
TURNS = 5


def device_roof(device: torch.device, dtype: str) -> Device:
    """The roof of `device` in `dtype`: from the table where it has the driver's name, else measured."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if (known := known_device(name)) is not None:
            return known
    else:
        name = "this CPU"
    flops = {dtype: _flops_per_s(device, DTYPES[dtype])}
    return Device(name, _bytes_per_s(device), flops, None, "measured by a copy and a product")


def measure_here(dtype: str) -> Device:
    """The roof of the device that a scenario with device: auto would take."""
    return device_roof(torch.device("cuda" if torch.cuda.is_available() else "cpu"), dtype)


def _bytes_per_s(device: torch.device) -> float:
    source = torch.ones(COPY_BYTES[device.type] // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best_s(lambda: target.copy_(source), device)


def _flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    n = PRODUCT_SIZE[device.type]
    left = torch.ones(n, n, device=device, dtype=dtype)
    right, out = left.clone(), torch.empty_like(left)
    return 2 * n**3 / _best_s(lambda: torch.mm(left, right, out=out), device)


def _best_s(action: Callable[[], object], device: torch.device) -> float:
    """The shortest of TURNS turns after one that is not counted: a roof is the best case."""
    times = []
    for _ in range(TURNS + 1):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])

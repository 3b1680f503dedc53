"""What lies in a device's memory during one call, by category, from the profiler's memory events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._C._profiler import RecordScope, _EventType
from torch.profiler import ProfilerActivity, profile

from perfbench.profiling.on_device.ranges import BIND, KV_CACHE, VECTORS

# Range -> the category of what is allocated in it; the innermost of these ranges decides.
CATEGORY_OF_RANGE = {KV_CACHE: "kv", BIND: "adapters", VECTORS: "adapters"}
CATEGORIES = ("weights", "adapters", "kv", "activations", "other")


def record(call: Any, device: torch.device, resident: dict[str, int], names: set[str], opening: str) -> dict[str, Any]:
    """The timeline of `call()`, which makes the ranges `names` and the phases that begin with `opening`.

    resident: category -> bytes that are there before the call. Returns `categories`; `times_us` from the first
    event; `bytes`: category -> bytes after each event; `phases`: [name, time_us]; `peak_bytes`, `peak_at_us`.
    What is allocated inside a range of the model is an activation, unless its range says otherwise; outside: other.
    """
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    with profile(activities=activities, profile_memory=True) as profiler:
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
    assert profiler.profiler is not None
    results: Any = profiler.profiler.kineto_results
    events = sorted(_events(results.experimental_event_tree(), names, opening, None), key=lambda event: event[0])
    return timeline(events, device.type, resident)


# (time in ns, phase name or None, device type, address, bytes (negative when freed), category)
MemoryEvent = tuple[int, str | None, str, int, int, str]


def _events(nodes: Sequence[Any], names: set[str], opening: str, category: str | None) -> Iterator[MemoryEvent]:
    """The allocations and the beginnings of phases under these nodes; `category`: of the ranges around them."""
    for node in nodes:
        inside = category
        if node.tag == _EventType.Allocation:
            about = node.typed[1]
            if about.ptr is not None:
                yield (node.start_time_ns, None, about.device.type, about.ptr, about.alloc_size, category or "other")
        elif node.tag == _EventType.TorchOp:
            if node.name.startswith(opening) and node.typed[1].scope == RecordScope.USER_SCOPE:
                yield node.start_time_ns, node.name.removeprefix(opening), "", 0, 0, ""
            elif node.name in CATEGORY_OF_RANGE:
                inside = CATEGORY_OF_RANGE[node.name]
            elif node.name in names and category is None:
                inside = "activations"
        yield from _events(node.children, names, opening, inside)


def timeline(events: Sequence[MemoryEvent], device_type: str, resident: dict[str, int]) -> dict[str, Any]:
    """The timeline that `record` returns, from memory events in the order of time."""
    now = {category: resident.get(category, 0) for category in CATEGORIES}
    live: dict[int, tuple[int, str]] = {}
    times: list[float] = [0.0]
    bytes_after: dict[str, list[int]] = {category: [now[category]] for category in CATEGORIES}
    phases: list[list[Any]] = []
    peak, peak_at = sum(now.values()), 0.0
    first = events[0][0] if events else 0
    for time_ns, phase, kind, address, size, category in events:
        time_us = (time_ns - first) / 1e3
        if phase is not None:
            phases.append([phase, time_us])
            continue
        if kind != device_type:
            continue
        if size > 0:
            live[address] = (size, category)
            now[category] += size
        else:
            # What was there before the call and is freed in it: its category is not known, its bytes are.
            freed, category = live.pop(address, (-size, "other"))
            now[category] -= freed
        times.append(time_us)
        for name in CATEGORIES:
            bytes_after[name].append(now[name])
        if sum(now.values()) > peak:
            peak, peak_at = sum(now.values()), time_us
    return {
        "categories": list(CATEGORIES),
        "times_us": times,
        "bytes": bytes_after,
        "phases": phases,
        "peak_bytes": peak,
        "peak_at_us": peak_at,
    }

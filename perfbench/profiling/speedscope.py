"""A Chrome trace as speedscope's own file: one flame chart for each thread and each stream. Free of torch.

https://www.speedscope.app/file-format-schema.json, evented profiles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from perfbench.profiling.breakdown import RANGE

Event = Mapping[str, Any]

# What a chart shows, in torch's categories; the rest (profiler overhead, spans of the recording) would lie across it.
HOST = ("user_annotation", "cpu_op", "python_function", "cuda_runtime", "cuda_driver")
DEVICE = ("gpu_user_annotation", "kernel", "gpu_memcpy", "gpu_memset")


def convert(events: Sequence[Event], name: str) -> dict[str, Any]:
    """The file's content. Charts in the order: threads with ranges, other threads, streams of the device.

    Arguments of events are dropped, and a child that ends after its parent ends with it, as the format demands.
    """
    tracks: dict[tuple[bool, str, str], list[Event]] = defaultdict(list)
    for event in events:
        category = event.get("cat", "")
        if category in HOST or category in DEVICE or not category:
            tracks[category in DEVICE, str(event.get("pid")), str(event.get("tid"))].append(event)
    frames: dict[str, int] = {}
    begin = min((event["ts"] for track in tracks.values() for event in track), default=0)
    ordered = sorted(tracks.items(), key=lambda item: (item[0][0], -_ranges(item[1]), -len(item[1])))
    charts = [_chart(f"{name}, {_title(key, track)}", track, begin, frames) for key, track in ordered if track]
    return {
        "$schema": "https://www.speedscope.app/file-format-schema.json",
        "exporter": "perfbench",
        "name": name,
        "activeProfileIndex": 0,
        "shared": {"frames": [{"name": frame} for frame in frames]},
        "profiles": charts,
    }


def _ranges(track: Sequence[Event]) -> int:
    return sum(event.get("cat") == RANGE for event in track)


def _title(key: tuple[bool, str, str], track: Sequence[Event]) -> str:
    on_device, process, thread = key
    return f"device {process}, stream {thread}" if on_device else f"host thread {thread}"


def _chart(title: str, track: Sequence[Event], begin: float, frames: dict[str, int]) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    open_until: list[tuple[float, int]] = []

    def close_until(time: float) -> None:
        while open_until and open_until[-1][0] <= time:
            end, frame = open_until.pop()
            found.append({"type": "C", "frame": frame, "at": end})

    for event in sorted(track, key=lambda event: (event["ts"], -event.get("dur", 0))):
        start = round(event["ts"] - begin, 3)
        end = round(start + max(0.0, event.get("dur", 0)), 3)
        close_until(start)
        if open_until:
            end = min(end, open_until[-1][0])
        frame = frames.setdefault(str(event["name"]), len(frames))
        found.append({"type": "O", "frame": frame, "at": start})
        open_until.append((end, frame))
    close_until(float("inf"))
    return {
        "type": "evented",
        "name": title,
        "unit": "microseconds",
        "startValue": 0,
        "endValue": max(event["at"] for event in found),
        "events": found,
    }

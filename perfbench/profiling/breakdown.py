"""Where the time of one profiled call went: by phase and module kind, from the events of its trace. Free of torch.

Every instant of the host belongs to the innermost range that is open, every kernel to the range that launched it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import median, quantiles
from typing import Any

Event = Mapping[str, Any]

RANGE, OPERATION = "user_annotation", "cpu_op"
LAUNCHERS = ("cuda_runtime", "cuda_driver")
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
# A device that waits for the host for more than this share of a phase is bound by it.
HOST_BOUND_SHARE = 0.1
# The kind of what a phase does outside of every other range: choosing tokens, and the loop itself.
LOOP = "token loop"
# What a range's own time is, where that is not said by its name: the residual sums and Python between modules.
OWN_TIME = {"layer": "residual", "model": "model, rest", "mlp": "mlp, rest", "self attention": "attention, rest"}


@dataclass
class Figures:
    """What one kind took in one phase; times in milliseconds.

    host_ms: on the host; outside_ms: the part of it outside of every operation (Python, or waiting); operations:
    ATen operations, those within others not counted; launches: kernels; device_ms: kernels and copies; gap_ms: the
    device idle before them.
    """

    host_ms: float = 0.0
    outside_ms: float = 0.0
    operations: float = 0
    launches: float = 0
    device_ms: float = 0.0
    gap_ms: float = 0.0

    def plus(self, other: Figures) -> Figures:
        """The sum of both."""
        return Figures(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(Figures)))


# Phase ("prefill", "decode step 1", ...) -> kind -> figures.
Phases = dict[str, dict[str, Figures]]


def kind_of(name: str) -> str:
    """The kind that a range's own time counts for."""
    parts = name.split(" / ")
    if parts[0].startswith("layer "):
        return parts[1] if len(parts) > 1 else "layer"
    return parts[0]


def of_call(events: Sequence[Event], names: Iterable[str], method: str) -> Phases:
    """The phases of one call of the arm `method`; `names`: its ranges. A phase is a range `METHOD / PHASE`."""
    known = set(names)
    opening = f"{method} / "
    host = [e for e in events if e.get("cat") in (RANGE, OPERATION, *LAUNCHERS)]
    phase_events = [e for e in host if e["cat"] == RANGE and e["name"].startswith(opening)]
    threads = {(e.get("pid"), e.get("tid")) for e in phase_events}
    host = [e for e in host if (e.get("pid"), e.get("tid")) in threads]
    sweep = _Sweep(known | {e["name"] for e in phase_events}, opening)
    for event in sorted(host, key=lambda e: (e["ts"], -e.get("dur", 0))):
        sweep.take(event)
    sweep.close()
    _device_work(events, sweep)
    return {
        phase: {OWN_TIME.get(kind, kind): found for kind, found in kinds.items()}
        for phase, kinds in sweep.phases.items()
    }


@dataclass
class _Frame:
    """One open event. inner: milliseconds of the ranges in it; covered: of the outermost operations in it."""

    end: float
    duration_ms: float
    kind: str | None
    inner: float = 0.0
    covered: float = 0.0


class _Sweep:
    """Reads the host's events in the order of time, as a stack of what is open."""

    def __init__(self, names: set[str], opening: str):
        self.names, self.opening = names, opening
        self.phases: Phases = {}
        self.launched_by: dict[Any, tuple[str, str]] = {}
        self._stack: list[_Frame] = []
        self._phase: str | None = None

    def take(self, event: Event) -> None:
        """The next event."""
        start, duration = event["ts"], event.get("dur", 0)
        while self._stack and start >= self._stack[-1].end:
            self._pop()
        name, is_range = event["name"], event["name"] in self.names
        if is_range and name.startswith(self.opening) and not self._stack:
            self._phase = name.removeprefix(self.opening)
            self.phases[self._phase] = defaultdict(Figures)
        if self._phase is None:
            return
        inside = next((frame for frame in reversed(self._stack) if frame.kind is not None), None)
        if event["cat"] in LAUNCHERS:
            if inside is not None and "correlation" in event.get("args", {}):
                assert inside.kind is not None
                self.launched_by[event["args"]["correlation"]] = (self._phase, inside.kind)
            return
        ms = duration / 1e3
        if is_range:
            kind = LOOP if name.startswith(self.opening) else kind_of(name)
            if inside is not None:
                inside.inner += ms
            self._stack.append(_Frame(start + duration, ms, kind))
        else:
            if inside is not None and self._stack[-1].kind is not None:
                assert inside.kind is not None
                inside.covered += ms
                self.phases[self._phase][inside.kind].operations += 1
            self._stack.append(_Frame(start + duration, ms, None))

    def close(self) -> None:
        """No more events."""
        while self._stack:
            self._pop()

    def _pop(self) -> None:
        frame = self._stack.pop()
        if frame.kind is not None and self._phase is not None:
            figures = self.phases[self._phase][frame.kind]
            own = max(0.0, frame.duration_ms - frame.inner)
            figures.host_ms += own
            figures.outside_ms += max(0.0, own - frame.covered)
        if not self._stack:
            self._phase = None


def _device_work(events: Sequence[Event], sweep: _Sweep) -> None:
    """Adds kernels, their time, and the device's idle time before each, to what launched them."""
    work = [e for e in events if e.get("cat") in DEVICE_WORK]
    busy_until: float | None = None
    for event in sorted(work, key=lambda e: e["ts"]):
        at = sweep.launched_by.get(event.get("args", {}).get("correlation"))
        end = event["ts"] + event.get("dur", 0)
        if at is not None:
            figures = sweep.phases[at[0]][at[1]]
            figures.launches += event["cat"] == "kernel"
            figures.device_ms += event.get("dur", 0) / 1e3
            figures.gap_ms += 0.0 if busy_until is None else max(0.0, event["ts"] - busy_until) / 1e3
        busy_until = end if busy_until is None else max(busy_until, end)


def total(kinds: Mapping[str, Figures]) -> Figures:
    """The sum over all kinds of one phase."""
    found = Figures()
    for figures in kinds.values():
        found = found.plus(figures)
    return found


def typical(calls: Sequence[Phases]) -> dict[str, dict[str, dict[str, float]]]:
    """`prefill` and `decode step`: kind, and `total`, -> the median of each figure over the calls and steps, and
    `low_ms` and `high_ms`, between which the middle half of its times lies (the device's where there is one). The
    total is the sum of the medians, which one step that was held up in one kind moves less than a median of sums."""
    found = {}
    for title in ("prefill", "decode step"):
        phases = [kinds for call in calls for phase, kinds in call.items() if phase.startswith(title)]
        if not phases:
            continue
        with_total = [{**kinds, "total": total(kinds)} for kinds in phases]
        kinds = dict.fromkeys(kind for phase in with_total for kind in phase)
        medians = {kind: _median([phase.get(kind, Figures()) for phase in with_total]) for kind in kinds}
        for name in (field.name for field in fields(Figures)):
            medians["total"][name] = sum(figures[name] for kind, figures in medians.items() if kind != "total")
        found[title] = medians
    return found


def spread(calls: Sequence[Phases]) -> float:
    """How far the decode steps of the calls lie apart: the interquartile range of their host time over its median."""
    times = [total(kinds).host_ms for call in calls for phase, kinds in call.items() if phase.startswith("decode")]
    lower, middle, upper = quantiles(times, n=4, method="inclusive")
    return (upper - lower) / middle if middle else 0.0


def _median(figures: Sequence[Figures]) -> dict[str, float]:
    values = [asdict(one) for one in figures]
    time = "device_ms" if any(one.device_ms for one in figures) else "host_ms"
    times = [one[time] for one in values]
    low, _, high = quantiles(times, n=4, method="inclusive") if len(times) > 1 else [times[0]] * 3
    return {name: median(one[name] for one in values) for name in values[0]} | {"low_ms": low, "high_ms": high}


def bound(device_ms: float, step_ms: float) -> tuple[str, float]:
    """(`host` or `device`, the share of a step that the device idles) for a step that takes `step_ms` without the
    profiler and in which the device works for `device_ms`: the profiler slows the host down, kernels it does not."""
    idle = max(0.0, 1 - device_ms / step_ms) if step_ms else 0.0
    return ("host" if idle > HOST_BOUND_SHARE else "device"), idle

"""Whether the clock that times everything can be trusted. Free of torch."""

from __future__ import annotations

import time
from collections.abc import Callable

# A coarser clock can't tell a token from the next.
COARSEST_S = 1e-4
# A clock that is put right while it runs is off by 0.05% at most.
MOST_DRIFT = 5e-3
_OVER_S = 0.05


def fault(now: Callable[[], float] = time.perf_counter) -> str | None:
    """Why times read from `now`, in seconds, say little, in a line: too coarse, backwards, or at another pace than the
    machine's raw clock. None for a good one. Takes a tenth of a second."""
    earliest, started, before = _raw(), now(), _raw()
    steps, last = [], started
    end = before + _OVER_S
    while _raw() < end:
        instant = now()
        steps.append(instant - last)
        last = instant
    if steps and min(steps) < 0:
        return f"expected a clock that only goes forward, got a step of {min(steps) * 1e3:.3g} ms"
    forward = [step for step in steps if step > 0]
    resolution_s = min(forward, default=_OVER_S)
    if resolution_s > COARSEST_S:
        return (
            f"expected steps of at most {COARSEST_S * 1e6:.0f} us, got {resolution_s * 1e3:.1f} ms; times of this "
            f"machine would be made of steps"
        )
    least = _raw()
    elapsed_s = now() - started
    most = _raw()
    # Another process may have had the core between two readings: more than the time within them, less than that around.
    if not (least - before) * (1 - MOST_DRIFT) <= elapsed_s <= (most - earliest) * (1 + MOST_DRIFT):
        return f"expected {(least - before) * 1e3:.1f} ms as of the machine's raw clock, got {elapsed_s * 1e3:.1f} ms"
    return None


def _raw() -> float:
    """Seconds of the clock that nothing puts right, where the system has one."""
    raw = getattr(time, "CLOCK_MONOTONIC_RAW", None)
    return time.monotonic() if raw is None else time.clock_gettime(raw)

"""Pairs that a GPU's clock spoils: which are dropped, and how many may be. Free of torch.

A GPU lowers its clock for heat and for power, and a process whose clock was lower is slower whatever its code is. The
rules are fixed beforehand and look at clocks alone, never at what was timed, so that a dropped pair favours no side.
They were tried on processes that pretend to have a GPU, and on no real one.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perfbench.gate.figures import trimmed_mean

# The reasons, as perfbench.machine.nvml names them, that a GPU is held below what it was set to. A power cap is none of
# them: a card at its limit has it all the time, and if that costs one side more than the other the clocks tell.
SLOWING = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
# A pair is dropped where one of its arms was slowed in more of its blocks than this,
THROTTLED_SHARE = 0.1
# or where the clock of one of its arms, in any case, is so much higher or lower than the baseline's.
CLOCK_SHARE = 0.01
# Of a batch so many pairs may be dropped, rounded up; each is measured anew. One more makes the session void.
DROPPED_SHARE = 0.25


class ClocksMoved(Exception):
    """More pairs of one batch were dropped than may be; says why, and what to do."""


def allowed(pairs: int) -> int:
    """How many pairs of a batch of so many may be dropped."""
    return math.ceil(pairs * DROPPED_SHARE)


def of_block(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """{"sm_clock_mhz": the median over the samples that have one, or None, "slowed_by": the reasons of SLOWING that any
    sample has}; None where no sample says anything of a clock, as on a CPU."""
    clocks = [one["sm_clock_mhz"] for one in samples if one["sm_clock_mhz"]]
    reasons = [one["throttle_reasons"] for one in samples if one["throttle_reasons"] is not None]
    if not clocks and not reasons:
        return None
    slowed_by = sorted(SLOWING.intersection(*[set().union(*reasons)]))
    return {"sm_clock_mhz": statistics.median(clocks) if clocks else None, "slowed_by": slowed_by}


def why_dropped(pair: Mapping[str, Any], arms: Sequence[str]) -> str | None:
    """Why a pair is no evidence, in words; None where its clocks were sound or are not known. `arms`: of whose blocks
    the `clocks` may be there, the baseline first."""
    for arm in arms:
        known = [block["clocks"][arm] for block in pair["blocks"] if arm in block.get("clocks", {})]
        slowed = [block for block in known if block["slowed_by"]]
        if known and len(slowed) > THROTTLED_SHARE * len(known):
            reasons = sorted({reason for block in slowed for reason in block["slowed_by"]})
            return f"{arm}: {', '.join(reasons)} in {len(slowed)} of {len(known)} blocks"
    for arm in arms[1:]:
        for case, shift in shifts(pair, arm).items():
            if not -CLOCK_SHARE <= shift <= CLOCK_SHARE:
                return f"{arm}: SM clock {shift:+.1%} against the baseline's in {case}"
    return None


def shifts(pair: Mapping[str, Any], arm: str) -> dict[str, float]:
    """{case: how much higher the SM clock of `arm` was than the baseline's, as a share}, for every case in which both
    are known. Over the blocks of a case it is taken as a slow-down is: what counts here counts there."""
    logs: dict[str, list[float]] = {}
    for block in pair["blocks"]:
        clocks = block.get("clocks", {})
        if (ours := _clock(clocks, "baseline")) and (theirs := _clock(clocks, arm)):
            logs.setdefault(block["case"], []).append(math.log(theirs / ours))
    return {case: math.expm1(trimmed_mean(values)) for case, values in logs.items()}


def _clock(clocks: Mapping[str, Any], arm: str) -> float | None:
    return clocks[arm]["sm_clock_mhz"] if arm in clocks else None


def told(pairs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """The notes of a session on all the `pairs` that it measured, in whole sentences' worth: which were dropped, and a
    candidate that has the lower clock all the time."""
    reasons = [pair["dropped"] for pair in pairs if "dropped" in pair]
    if reasons:
        yield f"the GPU's clock: {len(reasons)} of {len(pairs)} pairs dropped ({'; '.join(dict.fromkeys(reasons))})"
    if lower := _steadily_lower(pairs):
        yield lower


def void(pairs: Sequence[Mapping[str, Any]]) -> ClocksMoved:
    """What ends a session whose batch so far is `pairs`."""
    remedy = "lock the clocks (nvidia-smi -lgc MHZ) below what the card can hold, cool it, and run again"
    return ClocksMoved("; ".join([*told(pairs), f"this run is void: {remedy}"]))


def _steadily_lower(pairs: Sequence[Mapping[str, Any]]) -> str | None:
    """Where the candidate's clock was lower than the baseline's in each of the pairs; None where it was not."""
    found = [statistics.fmean(by_case.values()) for pair in pairs if (by_case := shifts(pair, "candidate"))]
    if len(found) < 2 or max(found) >= 0:
        return None
    return (
        f"the candidate's SM clock was lower than the baseline's in each of {len(found)} pairs "
        f"({statistics.median(found):+.1%}): it may draw more power"
    )

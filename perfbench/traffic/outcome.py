"""What the requests of one measurement say together: tails, the share that kept the targets, fairness, and whether the
queue grew. Free of torch.

The first and the last tenth of the requests are sent and not counted: the server fills with the first ones, and empties
with the last. Latency counts from the moment a request was due, whenever it could be taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from perfbench.figures.stats import tail
from perfbench.spec.traffic import Targets

# Of the requests, at the start and at the end, that are not counted.
CUT = 0.1


@dataclass(frozen=True)
class Answered:
    """One request as it went: when it was due, the milliseconds from then until it had a row, its first token and its
    last, those between its tokens, and whether its adapter had to be loaded."""

    due_s: float
    tenant: int
    wait_ms: float
    ttft_ms: float
    total_ms: float
    itl_ms: tuple[float, ...]
    loaded: bool

    def keeps(self, targets: Targets) -> bool:
        """Whether it met both targets."""
        return self.ttft_ms <= targets.ttft_ms and (not self.itl_ms or fmean(self.itl_ms) <= targets.itl_ms)


def counted_places(count: int) -> range:
    """Which of so many requests, in the order in which they are due, are counted."""
    cut = int(count * CUT)
    return range(cut, count - cut)


def most_misses(count: int, targets: Targets) -> int:
    """How many of so many counted requests may miss the targets."""
    # As an integer product it would lose the request that 0.99 of 100 allows.
    return int(count * (1 - targets.share) + 1e-9)


def figures(answered: Sequence[Answered], targets: Targets) -> dict[str, Any]:
    """Of all requests of a measurement, in the order in which they were due: what is counted of them.

    held: whether enough kept the targets; kept_share; goodput_per_s: requests a second that kept them; ttft_ms, itl_ms,
    total_ms, wait_ms: median, p95 and p99 (None where there are too few); tenants_seen; worst_tenant_ttft_ms: the
    largest of the tenants' median times to the first token; fairness: Jain's index of these, 1 where all are alike;
    wait_growth: milliseconds by which the wait grew from the first request counted to the last.
    """
    counted = [answered[place] for place in counted_places(len(answered))]
    kept = sum(one.keeps(targets) for one in counted)
    seconds = counted[-1].due_s - counted[0].due_s
    between = [gap for one in counted for gap in one.itl_ms]
    of_tenants = _by_tenant(counted)
    return {
        "counted": len(counted),
        "held": len(counted) - kept <= most_misses(len(counted), targets),
        "kept_share": kept / len(counted),
        "goodput_per_s": kept / seconds if seconds else None,
        "tokens_per_s": sum(len(one.itl_ms) + 1 for one in counted) / seconds if seconds else None,
        "ttft_ms": _tails([one.ttft_ms for one in counted]),
        "itl_ms": _tails(between),
        "total_ms": _tails([one.total_ms for one in counted]),
        "wait_ms": _tails([one.wait_ms for one in counted]),
        "tenants_seen": len({one.tenant for one in counted}),
        "worst_tenant_ttft_ms": max(of_tenants),
        "fairness": sum(of_tenants) ** 2 / (len(of_tenants) * sum(value**2 for value in of_tenants)),
        "loads": sum(one.loaded for one in counted),
        "wait_growth_ms": _growth(counted) * seconds,
    }


def _by_tenant(counted: Sequence[Answered]) -> list[float]:
    """Each tenant's median time to the first token."""
    of: dict[int, list[float]] = {}
    for one in counted:
        of.setdefault(one.tenant, []).append(one.ttft_ms)
    return [median(values) for values in of.values()]


def _tails(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None, "p99": None}
    return {"median": median(values), "p95": tail(values, "p95"), "p99": tail(values, "p99")}


def _growth(counted: Sequence[Answered]) -> float:
    """Milliseconds a second by which the wait for a row grows, by least squares."""
    at, wait = [one.due_s for one in counted], [one.wait_ms for one in counted]
    middle, level = fmean(at), fmean(wait)
    spread = sum((x - middle) ** 2 for x in at)
    return sum((x - middle) * (y - level) for x, y in zip(at, wait, strict=True)) / spread if spread else 0.0

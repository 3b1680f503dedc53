"""What the requests of one measurement say together: tails, the share that kept the targets, fairness, and whether the
queue grew. Free of torch.

The first and the last tenth of the requests are sent and not counted: the server fills with the first ones, and empties
with the last. Latency counts from the moment a request was due, whenever it could be taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, median
from typing import Any

from perfbench.figures.stats import tail
from perfbench.spec.traffic import NOBODY, Targets

# Of the requests, at the start and at the end, that are not counted.
CUT = 0.1
# By how much of the target for the first token the wait for a row may grow during a measurement: where it grows more,
# the server is given more than it can serve, and would miss the targets had there only been more requests.
MOST_GROWTH = 0.5
# Of the target for the first token, so late may the client send a request (p99) for its measurements to count.
MOST_LAG = 0.1
# Tenants with fewer requests say nothing about how a tenant is served.
LEAST_OF_TENANT = 5


@dataclass(frozen=True)
class Answered:
    """One request as it went: when it was due, the milliseconds from then until it had a row, its first token and its
    last, those between its tokens, and whether its adapter had to be loaded. Of a server over HTTP nobody sees the row,
    in whose place its first token stands, nor, as `loaded` None says, the adapter."""

    due_s: float
    tenant: int
    wait_ms: float
    ttft_ms: float
    total_ms: float
    itl_ms: tuple[float, ...]
    loaded: bool | None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Answered:
        """Of its fields as JSON has them."""
        return cls(**{**values, "itl_ms": tuple(values["itl_ms"])})

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


def counted(answered: Sequence[Answered]) -> list[Answered]:
    """Of all requests of a measurement, in the order in which they were due, those that count."""
    return [answered[place] for place in counted_places(len(answered))]


def kept_share(answered: Sequence[Answered], targets: Targets, failed: int = 0) -> float:
    """The share of the requests that count which kept the targets; one that failed kept none, wherever it stood."""
    own = counted(answered)
    return sum(one.keeps(targets) for one in own) / (len(own) + failed)


def held(answered: Sequence[Answered], targets: Targets, failed: int = 0) -> bool:
    """Whether enough requests of a measurement kept the targets, the queue did not grow beyond MOST_GROWTH, and none
    failed."""
    if failed:
        return False
    own = counted(answered)
    enough = sum(not one.keeps(targets) for one in own) <= most_misses(len(own), targets)
    return enough and wait_growth_ms(own) <= MOST_GROWTH * targets.ttft_ms


def late_client(lag_ms: float, targets: Targets) -> str | None:
    """Why a client that sent its requests so late (p99) measured itself and not the server; None where it did not."""
    most = MOST_LAG * targets.ttft_ms
    if lag_ms <= most:
        return None
    return f"the client sent requests {lag_ms:.3g} ms late, more than {most:.3g} ms: send fewer, or free the machine"


def high(values: Sequence[float]) -> float:
    """The 99th percentile, of however few."""
    return sorted(values)[math.ceil(0.99 * len(values)) - 1]


def figures(
    repetitions: Sequence[Sequence[Answered]], targets: Targets, failed: int = 0, *, closed: bool = False
) -> dict[str, Any]:
    """What the requests of all repetitions of a point say together, of which `failed` more got no answer.

    counted; kept_share; goodput_per_s: requests a second that kept the targets, and tokens_per_s, both over the time
    from when the first was due to the last token; of a `closed` loop, where others are in flight at both ends of that,
    over the time between the first and the last moment at which one that counts was sent, and requests_per_s; ttft_ms,
    itl_ms, total_ms, wait_ms: median, p95 and p99 (None where there are too few); tenants_seen; of the tenants with
    LEAST_OF_TENANT requests, None without any: worst_tenant_ttft_ms, the largest of their median times to the first
    token, and fairness, Jain's index of these, 1 where all are alike; loaded_share: of the requests whose adapter had
    to be loaded; wait_growth_ms: by how much the wait for a row grew from the first request to the last, the largest of
    the repetitions.
    """
    apart = [counted(answered) for answered in repetitions]
    together = [one for own in apart for one in own]
    kept = sum(one.keeps(targets) for one in together)
    seconds = sum(max(one.due_s + one.total_ms / 1e3 for one in own) - own[0].due_s for own in apart)
    tokens_per_s = sum(len(one.itl_ms) + 1 for one in together) / seconds
    rates = {"goodput_per_s": kept / seconds, "tokens_per_s": tokens_per_s}
    if closed:
        rates = _closed_rates(repetitions, kept / (len(together) + failed))
    of_tenants = _by_tenant(together)
    squares = sum(value**2 for value in of_tenants)
    return {
        "counted": len(together),
        "kept_share": kept / (len(together) + failed),
        **rates,
        "ttft_ms": _tails([one.ttft_ms for one in together]),
        "itl_ms": _tails([gap for one in together for gap in one.itl_ms]),
        "total_ms": _tails([one.total_ms for one in together]),
        "wait_ms": _tails([one.wait_ms for one in together]),
        "tenants_seen": len({one.tenant for one in together} - {NOBODY}),
        "worst_tenant_ttft_ms": max(of_tenants, default=None),
        "fairness": sum(of_tenants) ** 2 / (len(of_tenants) * squares) if of_tenants else None,
        "loaded_share": _loaded_share(together),
        "wait_growth_ms": max(map(wait_growth_ms, apart)),
    }


def _closed_rates(repetitions: Sequence[Sequence[Answered]], kept_share: float) -> dict[str, float]:
    """What came in the time in which all of a closed loop's requests were open, whoever got it."""
    seconds, tokens, ended = 0.0, 0, 0
    for answered in repetitions:
        own = counted(answered)
        start, end = own[0].due_s, own[-1].due_s
        for one in answered:
            moments = list(accumulate(one.itl_ms, initial=one.ttft_ms))
            tokens += sum(start <= one.due_s + moment / 1e3 < end for moment in moments)
            ended += start <= one.due_s + one.total_ms / 1e3 < end
        seconds += end - start
    per_s = ended / seconds if seconds else 0.0
    of_all = tokens / seconds if seconds else 0.0
    return {"goodput_per_s": per_s * kept_share, "tokens_per_s": of_all, "requests_per_s": per_s}


def throughput_per_s(answered: Sequence[Answered]) -> float:
    """Requests a second of a server whose rows are all busy, from requests that were all due at once: those that had
    ended by the time when the last one got a row."""
    full_ms = max(one.wait_ms for one in answered)
    return sum(one.total_ms <= full_ms for one in answered) / full_ms * 1e3


def _by_tenant(answered: Sequence[Answered]) -> list[float]:
    """The median time to the first token of each tenant with enough requests."""
    of: dict[int, list[float]] = {}
    for one in answered:
        of.setdefault(one.tenant, []).append(one.ttft_ms)
    of.pop(NOBODY, None)
    return [median(values) for values in of.values() if len(values) >= LEAST_OF_TENANT]


def _loaded_share(answered: Sequence[Answered]) -> float | None:
    """None where somebody else served them."""
    known = [one.loaded for one in answered if one.loaded is not None]
    return sum(known) / len(known) if known else None


def _tails(values: Sequence[float]) -> dict[str, float | None]:
    if not values:
        return {"median": None, "p95": None, "p99": None}
    return {"median": median(values), "p95": tail(values, "p95"), "p99": tail(values, "p99")}


def wait_growth_ms(answered: Sequence[Answered]) -> float:
    """By how many milliseconds the wait for a row grows from the first of them to the last, by least squares."""
    at, wait = [one.due_s for one in answered], [one.wait_ms for one in answered]
    middle, level = fmean(at), fmean(wait)
    spread = sum((x - middle) ** 2 for x in at)
    if not spread:
        return 0.0
    return sum((x - middle) * (y - level) for x, y in zip(at, wait, strict=True)) / spread * (at[-1] - at[0])

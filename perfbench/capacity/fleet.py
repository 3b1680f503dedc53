"""How many devices hold the targets: tenants are dealt to devices, the busiest of which is simulated. Free of torch."""

from __future__ import annotations

import heapq
import math
import random
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from perfbench.capacity.fit import Memory
from perfbench.capacity.simulation import Serving, Times, simulate
from perfbench.spec.traffic import Targets, Traffic
from perfbench.traffic import outcome
from perfbench.traffic.outcome import Answered
from perfbench.traffic.requests import Due, all_at_once, draw, popularity

# More would be another kind of fleet; a search ends there.
MOST_DEVICES = 100_000
MOST_ROWS = 256
# Of a simulated request alone on its device: so long after the one before, in seconds, that nothing of that is left.
_ALONE_S = 1e4
# Uses of adapters before the first request, for each tenant, so that the device holds those that it holds in the long
# run; and how many of them at most.
_WARM, _MOST_WARM = 10, 100_000
# A measurement has so many requests at least for each row that can be busy, and lasts so many times the target for the
# first token: in a shorter one rows that are free at the start, or a target far off, would hide a queue that grows.
_ROUNDS = 20
# Of a device's requests may be one tenant's, so that all devices can be as busy as each other.
LARGEST_PART = 0.25
# A device with this share of the busiest one's requests is as busy.
_AS_BUSY = 0.99


@dataclass(frozen=True)
class Fleet:
    """What is asked of one method: `rate` requests a second of `tenants` together, within `targets`. chunk_tokens None:
    a prompt is read at once. rows: requests in flight of a device, None: those with which fewest devices are needed."""

    traffic: Traffic
    tenants: int
    rate: float
    targets: Targets
    times: Times
    memory: Memory
    chunk_tokens: int | None
    rows: int | None = None
    repetitions: int = 2

    @property
    def adapters(self) -> bool:
        """Whether the requests have any."""
        return self.memory.adapter > 0


@dataclass(frozen=True)
class Load:
    """What the busiest device gets. weights: of its tenants; rate: requests a second."""

    weights: tuple[float, ...]
    rate: float


@dataclass(frozen=True)
class Found:
    """An answer: `devices` with `rows` requests in flight each. simulated: every request of the repetitions; resident:
    adapters that a device holds; fewer: the requests with one device less, None where that would be none, and the
    largest number of rows, `fewer_rows`."""

    devices: int
    rows: int
    load: Load
    resident: int
    simulated: list[list[Answered]]
    fewer: list[list[Answered]] | None = None
    fewer_rows: int = 0

    @property
    def loaded_share(self) -> float:
        """Of the requests that count those whose adapter had to be loaded."""
        counted = [one for answered in self.simulated for one in outcome.counted(answered)]
        return sum(bool(one.loaded) for one in counted) / len(counted)


@dataclass(frozen=True)
class Missed:
    """Why no number of devices will do. what: ttft, itl or memory; by: what a request alone takes, in ms, at the share
    of the targets, or the bytes that so many rows need; limit: of the target or the device."""

    what: str
    by: float
    limit: float
    rows: int = 1


@lru_cache(maxsize=32)
def busiest(traffic: Traffic, tenants: int, rate: float, devices: int) -> Load:
    """Deals the tenants, the most popular first, each to the device with the fewest requests so far; one who sends more
    than LARGEST_PART of a device's requests is dealt to as many as that takes. Of devices as busy as each other it is
    the one with most tenants."""
    weights = popularity(traffic, tenants)
    total = sum(weights)
    homes = [max(1, math.ceil(weight * devices / total / LARGEST_PART)) for weight in weights]
    parts = ((weight / count, tenant) for tenant, (weight, count) in enumerate(zip(weights, homes, strict=True)))
    own: list[dict[int, float]] = [{} for _ in range(devices)]
    by_load = [(0.0, device) for device in range(devices)]
    for part, tenant in sorted(parts, key=lambda one: -one[0]):
        for _ in range(homes[tenant]):
            load, device = by_load[0]
            own[device][tenant] = own[device].get(tenant, 0.0) + part
            heapq.heapreplace(by_load, (load + part, device))
    most = max(load for load, _ in by_load)
    load, device = max(
        ((load, device) for load, device in by_load if load >= _AS_BUSY * most), key=lambda one: len(own[one[1]])
    )
    return Load(tuple(own[device].values()), rate * load / total)


def plan(fleet: Fleet) -> Found | Missed:
    """The fewest devices; of the numbers of rows with which so few do, the largest of those with the fewest loads."""
    sizes = list(_sizes(fleet))
    if not sizes:
        rows = fleet.rows or 1
        return Missed("memory", fleet.memory.of_rows(rows) + 2 * fleet.memory.adapter, fleet.memory.device, rows)
    if (missed := _alone(fleet)) is not None:
        return missed
    best: Found | None = None
    fewer_rows = 0
    for rows in sizes:
        most = MOST_DEVICES if best is None else best.devices - (not best.loaded_share)
        if not most or (best and not _holds(_simulated(fleet, rows, most), fleet.targets)):
            continue
        found = _fewest(fleet, rows, most)
        if found is None or (best and (found.devices, found.loaded_share) >= (best.devices, best.loaded_share)):
            continue
        if best is None or found.devices < best.devices:
            fewer_rows = rows
        best = found
    if best is None:
        return Missed("devices", MOST_DEVICES + 1, MOST_DEVICES)
    fewer = _simulated(fleet, fewer_rows, best.devices - 1, whole=True) if best.devices > 1 else None
    return replace(best, fewer=fewer, fewer_rows=fewer_rows)


def _sizes(fleet: Fleet) -> Iterator[int]:
    """Numbers of rows to be tried, the largest first: as many as fit, and powers of two, whose step, all being busy, is
    not longer than the target between two tokens; one at least."""
    tried = [fleet.rows] if fleet.rows else range(1, (fleet.times.most_rows or MOST_ROWS) + 1)
    fit = [rows for rows in tried if fleet.memory.resident(rows) >= (1 if fleet.adapters else 0)]
    fit = [rows for rows in fit if rows & (rows - 1) == 0 or rows == fit[-1]]
    tokens = fleet.traffic.prompt_tokens.median + fleet.traffic.new_tokens.median // 2
    quick = [rows for rows in fit if fleet.times.step_s(rows, rows * tokens, rows) * 1e3 <= fleet.targets.itl_ms]
    yield from reversed(quick or fit[:1])


def _serving(fleet: Fleet, rows: int, tenants: int) -> Serving:
    resident = min(tenants, fleet.memory.resident(rows))
    return Serving(rows, resident, fleet.chunk_tokens, fleet.adapters)


def _alone(fleet: Fleet) -> Missed | None:
    """Why a request misses the targets that has a device to itself, where it does, whose adapter has to be loaded."""
    simulated = []
    for repetition in range(fleet.repetitions):
        due = draw(fleet.traffic, 1, 1.0, str(repetition))
        apart = [replace(one, due_s=place * _ALONE_S, tenant=place) for place, one in enumerate(due)]
        simulated.append(_answered(apart, Serving(1, 1, fleet.chunk_tokens, fleet.adapters), fleet.times))
    if _holds(simulated, fleet.targets):
        return None
    ttft, itl = (at_share(simulated, fleet.targets, of) for of in ("ttft", "itl"))
    if ttft / fleet.targets.ttft_ms >= itl / fleet.targets.itl_ms:
        return Missed("ttft", ttft, fleet.targets.ttft_ms)
    return Missed("itl", itl, fleet.targets.itl_ms)


def _fewest(fleet: Fleet, rows: int, most: int) -> Found | None:
    """By doubling and then by halves; None where not even `most` hold."""
    tried: dict[int, list[list[Answered]] | None] = {}

    def holds(devices: int) -> bool:
        if devices not in tried:
            tried[devices] = _simulated(fleet, rows, devices)
        return _holds(tried[devices], fleet.targets)

    failed, held = 0, min(most, _start(fleet, rows))
    while not holds(held):
        if held == most:
            return None
        failed, held = held, min(2 * held, most)
    while held - failed > 1:
        middle = (held + failed) // 2
        failed, held = (failed, middle) if holds(middle) else (middle, held)
    load = busiest(fleet.traffic, fleet.tenants, fleet.rate, held)
    simulated = tried[held]
    assert simulated is not None
    return Found(held, rows, load, _serving(fleet, rows, len(load.weights)).resident, simulated)


def _start(fleet: Fleet, rows: int) -> int:
    """As many devices as their throughput with every row busy says, at which a search begins."""
    load = busiest(fleet.traffic, fleet.tenants, fleet.rate, 1)
    due = all_at_once(fleet.traffic, fleet.tenants, _ROUNDS * rows, "full")
    full = _answered(due, _serving(fleet, rows, len(load.weights)), fleet.times)
    return max(1, math.ceil(fleet.rate / outcome.throughput_per_s(full)))


def _simulated(fleet: Fleet, rows: int, devices: int, *, whole: bool = False) -> list[list[Answered]] | None:
    """The requests of the busiest of so many devices, in each repetition; None as soon as it is known that they miss
    the targets, unless the `whole` is wanted."""
    load = busiest(fleet.traffic, fleet.tenants, fleet.rate, devices)
    tenants, found = len(load.weights), []
    serving = _serving(fleet, rows, tenants)
    traffic = replace(fleet.traffic, requests=_enough(fleet, rows, load.rate))
    misses = outcome.most_misses(len(outcome.counted_places(traffic.requests)), fleet.targets)
    limit = (None, 0) if whole else (fleet.targets, misses)
    before = _used_before(load.weights, serving.resident) if fleet.adapters else OrderedDict()
    for repetition in range(fleet.repetitions):
        due = draw(traffic, tenants, load.rate, str(repetition), load.weights)
        answered = simulate(due, serving, fleet.times, *limit, resident=before)
        if answered is None or not (whole or outcome.held(answered, fleet.targets)):
            return None
        found.append(answered)
    return found


def _enough(fleet: Fleet, rows: int, rate: float) -> int:
    """How many requests a measurement has with so many of them a second."""
    first_s = fleet.targets.ttft_ms / 1e3
    # So many are in flight where each takes as long as it may.
    busy = rate * (first_s + fleet.traffic.new_tokens.median * fleet.targets.itl_ms / 1e3)
    return max(fleet.traffic.requests, math.ceil(_ROUNDS * max(rate * first_s, min(rows, busy))))


def _used_before(weights: Sequence[float], resident: int) -> OrderedDict[int, None]:
    """The adapters that a device holds which has served these tenants for long, the last used at the end."""
    found: OrderedDict[int, None] = OrderedDict()
    if resident >= len(weights):
        return OrderedDict.fromkeys(range(len(weights)))
    chance = random.Random("before")
    for tenant in chance.choices(range(len(weights)), weights, k=min(_MOST_WARM, _WARM * len(weights))):
        found[tenant] = None
        found.move_to_end(tenant)
        if len(found) > resident:
            found.popitem(last=False)
    return found


def _answered(due: Sequence[Due], serving: Serving, times: Times) -> list[Answered]:
    found = simulate(due, serving, times)
    assert found is not None
    return found


def _holds(simulated: list[list[Answered]] | None, targets: Targets) -> bool:
    return simulated is not None and all(outcome.held(answered, targets) for answered in simulated)


def at_share(simulated: Sequence[Sequence[Answered]], targets: Targets, of: str) -> float:
    """Milliseconds within which the share that the targets name, of the requests that count, got the first token
    (`ttft`), or the others on average (`itl`)."""
    counted = [one for answered in simulated for one in outcome.counted(answered)]
    values = sorted(one.ttft_ms if of == "ttft" else _mean(one.itl_ms) for one in counted)
    return values[math.ceil(targets.share * len(values)) - 1]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0

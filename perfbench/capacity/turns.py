"""The turns of a measured traffic run, made out from when each request got its tokens. Free of torch.

Every gap between two tokens of a request is one turn of the server, and its first gap is the decode step alone, because
a turn reads before it steps. The requests themselves are drawn again with the run's seed: how long a prompt was stands
nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from statistics import fmean, median
from typing import Any

from perfbench.capacity.times import MeasuredTimes, reading_line
from perfbench.errors import PerfbenchError
from perfbench.spec.traffic import Lengths, Server, Targets, Traffic
from perfbench.traffic.outcome import Answered
from perfbench.traffic.requests import Due, all_at_once, draw
from perfbench.traffic.traffic_folder import Key, Measured

# Of a usual gap between two tokens: rows of one step get theirs closer to each other than this.
_ONE_STEP = 0.2
# To which the moments of a request are rounded, added up.
_ROUNDED_S = 1e-6


@dataclass(frozen=True)
class Asked:
    """What a traffic run asked for."""

    traffic: Traffic
    server: Server
    targets: Targets
    seed: int
    repetitions: int

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Asked:
        """Of a traffic.json, of an older version too, which knew of open loops alone."""
        found = manifest["scenario"]
        lengths = {name: Lengths(**found["traffic"][name]) for name in ("prompt_tokens", "new_tokens")}
        traffic = Traffic(**{"in_flight": (), "in_turn": False, **found["traffic"], **lengths})
        return cls(traffic, Server(**found["server"]), Targets(**found["targets"]), found["seed"], found["repetitions"])

    def requests(self, key: Key, count: int) -> list[Due]:
        """The requests of a measurement, as `perfbench.traffic.traffic_run` drew them."""
        if key.rate == 0:
            return all_at_once(self.traffic, key.tenants, count, f"{self.seed}/full")
        return draw(self.traffic, key.tenants, key.rate, f"{self.seed}/{key.repetition}")


@dataclass
class Turns:
    """Seconds, by what happened. steps: (rows, of a decode step); reads: (tokens, of the piece of a prompt that ended
    it); starts: (whether an adapter was loaded, until a request that could begin had begun)."""

    steps: list[tuple[int, float]] = field(default_factory=list)
    reads: list[tuple[int, float]] = field(default_factory=list)
    starts: list[tuple[bool, float]] = field(default_factory=list)

    def times(self, source: str, chunk_tokens: int | None) -> MeasuredTimes:
        """Their means; chunk_tokens: as the server had it. PerfbenchError where there are none."""
        of_rows: dict[int, list[float]] = defaultdict(list)
        for rows, seconds in self.steps:
            of_rows[rows].append(seconds)
        if not of_rows or not self.reads:
            raise PerfbenchError(f"{source}: expected requests of several tokens that were answered, got none")
        steps = {rows: fmean(seconds) for rows, seconds in of_rows.items()}
        least, slope = reading_line(self.reads, steps)
        bare = [seconds for loaded, seconds in self.starts if not loaded]
        loads = [seconds for loaded, seconds in self.starts if loaded]
        begin = fmean(bare) if bare else 0.0
        load = max(0.0, fmean(loads) - begin) if loads else 0.0
        return MeasuredTimes(steps, least + begin, slope, load, source, chunk_tokens)


def of_run(manifest: Mapping[str, Any], measured: Mapping[Key, Measured], keys: Iterable[Key], folder: Path) -> Turns:
    """The turns of these measurements, all of one arm. PerfbenchError where the requests can't be drawn again."""
    asked, found = Asked.of(manifest), Turns()
    for key in keys:
        answered = measured[key].answered
        if answered is None:
            continue
        due = asked.requests(key, len(answered))
        if [(one.tenant, len(one.itl_ms) + 1) for one in answered] != [(one.tenant, one.new_tokens) for one in due]:
            raise PerfbenchError(
                f"{folder}: the requests of {key.arm} with {key.tenants:,} tenants are others than its seed gives today"
            )
        _add(found, answered, due, asked.server.chunk_tokens)
    return found


@dataclass
class _Step:
    """When the first and the last row of a decode step got their tokens, and which requests these were."""

    start: float
    end: float
    rows: set[int]


def _add(found: Turns, answered: Sequence[Answered], due: Sequence[Due], chunk: int | None) -> None:
    began = [one.due_s + one.wait_ms / 1e3 for one in answered]
    first = [one.due_s + one.ttft_ms / 1e3 for one in answered]
    order = sorted(range(len(answered)), key=first.__getitem__)
    place, before = 0, None
    for step in _steps(answered, first):
        goes_on = before is not None and bool(step.rows & before.rows)
        start = before.end if before is not None else -1.0
        while place < len(order) and first[order[place]] < start:
            place += 1
        # Requests are read one after the other, so that those of a turn stand next to each other.
        reading = [one for one in order[place : place + 3] if began[one] < step.end and first[one] > start]
        joined = [one for one in reading if first[one] < step.end]
        if joined:
            one = joined[-1]
            found.steps.append((len(step.rows), step.end - first[one]))
            if goes_on and began[one] >= start - _ROUNDED_S:
                found.starts.append((bool(answered[one].loaded), began[one] - max(start, answered[one].due_s)))
            tokens = due[one].prompt_tokens
            # A long prompt comes in pieces, and where others decode, its row began in an earlier turn then.
            if began[one] >= start - _ROUNDED_S and (goes_on or chunk is None or tokens <= chunk):
                found.reads.append((tokens, first[one] - began[one]))
            elif began[one] < start and goes_on and chunk is not None:
                found.reads.append((tokens % chunk or chunk, first[one] - start))
        elif goes_on and not reading:
            found.steps.append((len(step.rows), step.end - start))
        before = step


def _steps(answered: Sequence[Answered], first: Sequence[float]) -> list[_Step]:
    """The decode steps in order: tokens of different requests at one moment."""
    gaps = [gap for one in answered for gap in one.itl_ms]
    near = _ONE_STEP * median(gaps) / 1e3 if gaps else 0.0
    got = sorted(
        (moment, place)
        for place, one in enumerate(answered)
        for moment in list(accumulate((gap / 1e3 for gap in one.itl_ms), initial=first[place]))[1:]
    )
    found: list[_Step] = []
    for moment, place in got:
        if found and moment - found[-1].start < near and place not in found[-1].rows:
            found[-1].end = moment
            found[-1].rows.add(place)
        else:
            found.append(_Step(moment, moment, {place}))
    return found

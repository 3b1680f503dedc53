"""The continuous server in virtual time: the turns of `perfbench.runtimes.continuous.engine`, each as long as `Times`
says. Free of torch.

A turn reads one piece of one prompt, of the first request that waits, and then takes one decode step of all rows that
have been read; adapters beyond the resident ones are loaded when a request begins, the one used longest ago makes room.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from perfbench.spec.traffic import NOBODY, Targets
from perfbench.traffic.outcome import Answered, counted_places
from perfbench.traffic.requests import Due


class Times(Protocol):
    """How long the parts of a turn take, in seconds. most_rows: more are not known of, None: any number is."""

    @property
    def most_rows(self) -> int | None: ...

    def step_s(self, rows: int, tokens: int, adapters: int) -> float:
        """A decode step of `rows` requests of so many different `adapters` that have `tokens` in the cache together."""

    def read_s(self, tokens: int, past: int, adapter: bool) -> float:
        """Reading a piece of `tokens` of a prompt of which `past` are read already."""

    def load_s(self) -> float:
        """Bringing an adapter from the host."""


@dataclass(frozen=True)
class Serving:
    """One device's server. rows: requests in flight at most; resident: adapters that it holds at most; chunk_tokens:
    of a piece of a prompt, None: a prompt is read at once; adapters: whether its requests have any."""

    rows: int
    resident: int
    chunk_tokens: int | None
    adapters: bool = True


@dataclass(slots=True)
class _Open:
    """A request that has a row. first_step: number of the step that gave its second token."""

    place: int
    adapter: bool
    loaded: bool
    began_s: float
    read: int = 0
    first_s: float = 0.0
    first_step: int = 0


def simulate(
    due: Sequence[Due],
    serving: Serving,
    times: Times,
    targets: Targets | None = None,
    misses: int = 0,
    *,
    resident: Iterable[int] = (),
) -> list[Answered] | None:
    """How each request goes, in the order in which they are due. With `targets`, None as soon as more than `misses` of
    those that count have missed them, as `perfbench.traffic` gives a measurement up. resident: the tenants whose
    adapters are there at the start, the last used at the end."""
    return _Run(due, serving, times, targets, misses, resident).answered()


class _Run:
    def __init__(
        self, due: Sequence[Due], serving: Serving, times: Times, targets: Targets | None, misses: int,
        resident: Iterable[int],
    ) -> None:  # fmt: skip
        self.due, self.serving, self.times = due, serving, times
        self.targets, self.misses = targets, misses
        self.counted = counted_places(len(due))
        self.now = 0.0
        self.begun = 0  # so many requests have got a row, in the order in which they came
        self.reading: _Open | None = None
        self.decoding: list[tuple[int, int, _Open]] = []  # a heap by the number of the step that gives the last token
        self.tokens = 0  # in the cache, of the rows that decode
        self.tenants: Counter[int] = Counter()  # of the rows that decode
        self.resident: OrderedDict[int, None] = OrderedDict.fromkeys(resident)  # the last used at the end
        self.steps: list[float] = []  # when each ended
        self.gaps_ms: list[float] = []  # how long after the one before
        self.ended: list[Answered | None] = [None] * len(due)
        self.late = 0

    def answered(self) -> list[Answered] | None:
        """All turns; None where it is given up."""
        while self.begun < len(self.due) or self.reading is not None or self.decoding:
            if self.reading is None and not self.decoding:
                self.now = max(self.now, self.due[self.begun].due_s)
            self._read()
            self._step()
            if self.targets is not None and self.late > self.misses:
                return None
        return [one for one in self.ended if one is not None]

    def _read(self) -> None:
        one = self.reading or self._start()
        if one is None:
            return
        due, chunk = self.due[one.place], self.serving.chunk_tokens
        piece = min(chunk or due.prompt_tokens, due.prompt_tokens - one.read)
        self.now += self.times.read_s(piece, one.read, one.adapter)
        one.read += piece
        self.reading = one
        if one.read < due.prompt_tokens:
            return
        self.reading, one.first_s, one.first_step = None, self.now, len(self.steps)
        if due.new_tokens == 1:
            self._end(one)
            return
        heapq.heappush(self.decoding, (one.first_step + due.new_tokens - 1, one.place, one))
        self.tokens += due.prompt_tokens
        if one.adapter:
            self.tenants[due.tenant] += 1

    def _start(self) -> _Open | None:
        """The next request with a row and its adapter, where it is due and there is a row."""
        if self.begun == len(self.due) or len(self.decoding) == self.serving.rows:
            return None
        due = self.due[self.begun]
        if due.due_s > self.now:
            return None
        adapter, loaded = self.serving.adapters and due.tenant != NOBODY, False
        if adapter:
            loaded = due.tenant not in self.resident
            if loaded:
                if len(self.resident) == self.serving.resident:
                    self.resident.popitem(last=False)
                self.resident[due.tenant] = None
                self.now += self.times.load_s()
            self.resident.move_to_end(due.tenant)
        self.begun += 1
        return _Open(self.begun - 1, adapter, loaded, self.now)

    def _step(self) -> None:
        rows = len(self.decoding)
        if not rows:
            return
        self.now += self.times.step_s(rows, self.tokens, len(self.tenants))
        self.gaps_ms.append((self.now - self.steps[-1]) * 1e3 if self.steps else 0.0)
        self.steps.append(self.now)
        self.tokens += rows
        while self.decoding and self.decoding[0][0] == len(self.steps):
            *_, one = heapq.heappop(self.decoding)
            due = self.due[one.place]
            self.tokens -= due.prompt_tokens + due.new_tokens - 1
            if one.adapter:
                self.tenants[due.tenant] -= 1
                if not self.tenants[due.tenant]:
                    del self.tenants[due.tenant]
            self._end(one)

    def _end(self, one: _Open) -> None:
        due = self.due[one.place]
        # Its first gap is what was left of the turn in which it was read; while it decodes no turn is without a step.
        start, end = one.first_step, one.first_step + due.new_tokens - 1
        first = ((self.steps[start] - one.first_s) * 1e3,) if end > start else ()
        last_s = self.steps[end - 1] if end > start else one.first_s
        found = Answered(
            due_s=due.due_s,
            tenant=due.tenant,
            wait_ms=(one.began_s - due.due_s) * 1e3,
            ttft_ms=(one.first_s - due.due_s) * 1e3,
            total_ms=(last_s - due.due_s) * 1e3,
            itl_ms=(*first, *self.gaps_ms[start + 1 : end]),
            loaded=one.loaded,
        )
        self.ended[one.place] = found
        if self.targets is not None and one.place in self.counted and not found.keeps(self.targets):
            self.late += 1

"""The scheduler: which request is read, and which rows take a step, in every turn.

A turn reads one piece of one prompt, of the first that waits, and then takes one decode step of all rows that have been
read. So a long prompt delays the others by one piece at a time, at most `chunk` tokens; a prompt whose adapter makes
scales from its last token is read in one piece. Requests start in the order in which they came.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from perfbench.runtimes.continuous.residency import Residency
from perfbench.runtimes.continuous.rows import Rows
from perfbench.runtimes.continuous.sampling import Sampling
from perfbench.spec.traffic import NOBODY


@dataclass(eq=False)
class Request:
    """What is asked: `prompt` int64 [S], at most `new_tokens` tokens after it, the adapter of `tenant`; a token of
    `eos` ends it.

    `sampling`: how its tokens are drawn, the likeliest always where it is None. `tokens`: what it has got so far,
    `token_s`: when the host had each, by the engine's clock; `began_s`: when it got a row; `loaded`: whether its
    adapter was loaded for it.
    """

    prompt: torch.Tensor
    new_tokens: int
    tenant: int = NOBODY
    eos: frozenset[int] = frozenset()
    sampling: Sampling | None = None
    tokens: list[int] = field(default_factory=list)
    token_s: list[float] = field(default_factory=list)
    began_s: float = math.nan
    loaded: bool = False

    @property
    def ended(self) -> bool:
        """Whether it has all that it gets."""
        return len(self.tokens) >= self.new_tokens or bool(self.tokens and self.tokens[-1] in self.eos)


class Engine:
    """Generation for requests that come at any time, over rows and, where there are adapters, a residency."""

    def __init__(
        self,
        rows: Rows,
        residency: Residency | None,
        chunk: int | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ):
        """chunk: how many tokens of a prompt are read at a time; None: all of them. clock: seconds."""
        self.rows, self.residency, self.chunk, self.clock = rows, residency, chunk, clock
        self.waiting: deque[Request] = deque()
        self.decoding: list[Request] = []  # of row 0, 1, ...
        self.reading: Request | None = None  # in the row after those
        rows.lengths.clear()

    @property
    def in_flight(self) -> int:
        """How many requests have a row."""
        return len(self.decoding) + (self.reading is not None)

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.in_flight)

    def submit(self, request: Request) -> None:
        """Puts it at the end of those that wait. ValueError where no row could hold it."""
        length = len(request.prompt) + request.new_tokens - 1
        if length > self.rows.capacity:
            raise ValueError(f"a request of {length} tokens, where a row holds {self.rows.capacity}")
        if request.tenant != NOBODY and self.residency is None:
            raise ValueError(f"a request of tenant {request.tenant}, where there are no adapters")
        self.waiting.append(request)

    def abandon(self) -> None:
        """Forgets all requests."""
        self.waiting.clear()
        self.decoding.clear()
        self.reading = None
        self.rows.lengths.clear()

    def cancel(self, request: Request) -> None:
        """Takes one out that nobody wants any longer, and gives its row back; does nothing where it has left."""
        if request in self.waiting:
            self.waiting.remove(request)
        elif request is self.reading:
            self.reading = None
            self.rows.lengths.pop()
        elif request in self.decoding:
            with torch.inference_mode():
                self._leave(request)

    def turn(self) -> list[Request]:
        """One turn; the requests that got a token, once for each, in the order in which they did. All tokens are on the
        host then."""
        with torch.inference_mode():
            read = self._read()
            self._leave_ended(read)
            stepped = self._step()
            self._leave_ended(stepped)
        return read + stepped

    def _read(self) -> list[Request]:
        if self.reading is None and not self._start():
            return []
        request, row = self.reading, len(self.decoding)
        assert request is not None
        done = self.rows.lengths[row]
        piece = request.prompt[done : done + self._piece_of(request)]
        logits = self.rows.read(row, piece)
        if done + len(piece) < len(request.prompt):
            return []
        self._give(request, int(logits.argmax()) if request.sampling is None else request.sampling.draw(logits))
        self.decoding.append(request)
        self.reading = None
        return [request]

    def _start(self) -> bool:
        """Gives the first that waits a row with its adapter; False where none waits, or there is no row."""
        if not self.waiting or self.in_flight == self.rows.most:
            return False
        request, slot = self.waiting[0], NOBODY
        if request.tenant != NOBODY:
            assert self.residency is not None
            slot, request.loaded = self.residency.take(request.tenant)
        self.rows.enter(slot)
        request.began_s = self.clock()
        self.reading = self.waiting.popleft()
        return True

    def _piece_of(self, request: Request) -> int:
        """How many tokens of its prompt are read at a time."""
        if self.chunk is None:
            return len(request.prompt)
        if request.tenant != NOBODY and self.residency is not None and self.residency.store.of(request.tenant).whole:
            return len(request.prompt)
        return self.chunk

    def _step(self) -> list[Request]:
        """A decode step of all that have been read."""
        if not self.decoding:
            return []
        last = torch.tensor([request.tokens[-1] for request in self.decoding], device=self.rows.weights.device)
        logits = self.rows.step(last)
        likeliest: Sequence[int] = logits.argmax(dim=-1).tolist()
        for row, (request, token) in enumerate(zip(self.decoding, likeliest, strict=True)):
            self._give(request, token if request.sampling is None else request.sampling.draw(logits[row]))
        return list(self.decoding)

    def _give(self, request: Request, token: int) -> None:
        request.tokens.append(token)
        request.token_s.append(self.clock())

    def _leave_ended(self, requests: list[Request]) -> None:
        for request in requests:
            if request.ended:
                self._leave(request)

    def _leave(self, request: Request) -> None:
        """Takes one out that decodes. The last row that decodes moves to its place, and the row that is being read
        follows."""
        row, last = self.decoding.index(request), len(self.decoding) - 1
        self.rows.move(last, row)
        self.decoding[row] = self.decoding[last]
        self.decoding.pop()
        if self.reading is not None:
            self.rows.move(last + 1, last)
        self.rows.lengths.pop()

"""The engine in a thread of its own: requests come in through a queue, and tokens go out to the loop that serves HTTP.

The loop's side is `open`, `close` and the counts; what it knows of a request it is told through `call_soon_threadsafe`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import NamedTuple

from perfbench.crash_report import in_one_line
from perfbench.errors import PerfbenchError
from perfbench.runtimes.continuous.engine import Engine, Request


class News(NamedTuple):
    """What the loop is told of a request: tokens that it got, or why it gets no more."""

    tokens: list[int]
    ended: bool
    failure: str | None = None


Told = Callable[[News], None]


class EngineThread:
    """One engine, its thread, and what it has done so far: tokens, loads and loaded_bytes of adapters. `fault`: why it
    has ended, None while it serves."""

    def __init__(self, engine: Engine, loop: asyncio.AbstractEventLoop, where: ThreadPoolExecutor | None = None):
        """where: the one thread in which the engine was made, too. Had another one computed anything before, the
        process would have two teams of OpenMP threads, more than processors, which then sleep at every barrier."""
        self.engine, self._loop = engine, loop
        self._inbox: SimpleQueue[tuple[str, Request | None]] = SimpleQueue()
        self._told: dict[Request, Told] = {}  # of the requests that are open; the loop's
        self._seen: dict[Request, int] = {}  # how many tokens of each were passed on; the thread's
        self.tokens, self.loads = 0, 0
        self.fault: str | None = None
        self._where = where or ThreadPoolExecutor(1, "engine")
        self._running: Future[None] | None = None

    @property
    def open_requests(self) -> int:
        """How many requests have neither ended nor been cancelled, whether or not they have a row."""
        return len(self._told)

    @property
    def waiting(self) -> int:
        """How many of these have no row yet."""
        return max(0, self.open_requests - self.engine.in_flight)

    @property
    def loaded_bytes(self) -> int:
        """Of adapters, from the host."""
        return 0 if self.engine.residency is None else self.engine.residency.loaded_bytes

    def start(self) -> None:
        """Begins to serve."""
        self._running = self._where.submit(self._run)

    def stop(self) -> None:
        """Ends after the turn that it is in; requests that are open get nothing more."""
        self._inbox.put(("stop", None))
        if self._running is not None:
            self._running.result()

    def open(self, request: Request, told: Told) -> None:
        """Submits a request; `told` is called in the loop with all that happens to it."""
        self._told[request] = told
        self._inbox.put(("open", request))

    def close(self, request: Request) -> None:
        """Nobody wants it any longer: its row is for others. Nothing where it has ended."""
        if self._told.pop(request, None) is not None:
            self._inbox.put(("close", request))

    def _run(self) -> None:
        try:
            while self._take_in():
                self._turn()
        except Exception as error:
            self.fault = in_one_line(error)
            self._loop.call_soon_threadsafe(self._fail_all, self.fault)

    def _take_in(self) -> bool:
        """All that has come, after waiting for something where there is nothing to do; False at the end."""
        wait = self.engine.idle
        while True:
            try:
                what, request = self._inbox.get(block=wait)
            except Empty:
                return True
            wait = False
            if what == "stop":
                return False
            assert request is not None
            if what == "open":
                self._seen[request] = 0
                self.engine.submit(request)
            else:
                self._seen.pop(request, None)
                self.engine.cancel(request)

    def _turn(self) -> None:
        try:
            got = self.engine.turn()
        except PerfbenchError as error:  # an adapter that can't be had fails its own request alone
            request = self.engine.waiting.popleft()
            self._seen.pop(request, None)
            self._loop.call_soon_threadsafe(self._tell, [(request, News([], True, str(error)))])
            return
        news = []
        for request in dict.fromkeys(got):
            seen = self._seen[request]
            self.loads += request.loaded and not seen
            self.tokens += len(request.tokens) - seen
            self._seen[request] = len(request.tokens)
            news.append((request, News(request.tokens[seen:], request.ended)))
            if request.ended:
                del self._seen[request]
        if news:
            self._loop.call_soon_threadsafe(self._tell, news)

    def _tell(self, news: list[tuple[Request, News]]) -> None:
        for request, own in news:
            told = self._told.pop(request, None) if own.ended else self._told.get(request)
            if told is not None:
                told(own)

    def _fail_all(self, why: str) -> None:
        self._tell([(request, News([], True, why)) for request in list(self._told)])

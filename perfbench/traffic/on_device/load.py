"""Requests go to the engine when they are due, whether or not it keeps up: an open loop. In a closed one a request is
due when one before it has ended."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import torch

from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.spec.traffic import Targets
from perfbench.traffic.outcome import Answered, counted_places
from perfbench.traffic.requests import Due


@dataclass
class Limit:
    """When a measurement is given up: more than `misses` of its counted requests have missed the targets."""

    targets: Targets
    misses: int


def prompts(due: Sequence[Due], vocabulary: int, seed: int, device: torch.device) -> list[torch.Tensor]:
    """int64 [S] on the device, random, for each request."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, vocabulary, (one.prompt_tokens,), generator=generator).to(device) for one in due]


def drive(
    engine: Engine, due: list[Due], texts: Sequence[torch.Tensor], limit: Limit | None = None, in_flight: int = 0
) -> tuple[list[Request], float, bool]:
    """Sends the requests, which are in the order in which they are due, and waits for all answers. in_flight: at most
    so many at once, where it is not 0; `due` then gets the moment when each was sent.

    (the requests with what they got, when the first moment was by the engine's clock, whether it was given up).
    """
    requests = [Request(text, one.new_tokens, one.tenant) for one, text in zip(due, texts, strict=True)]
    counted = set(counted_places(len(due)))
    place = {request: i for i, request in enumerate(requests)}
    late: set[Request] = set()
    sent, ended, start = 0, 0, engine.clock()
    while sent < len(due) or not engine.idle:
        while sent < len(due) and start + due[sent].due_s <= (now := engine.clock()):
            if in_flight:
                if sent - ended == in_flight:
                    break
                due[sent] = replace(due[sent], due_s=now - start)
            engine.submit(requests[sent])
            sent += 1
        if engine.idle:
            time.sleep(max(0.0, due[sent].due_s - (engine.clock() - start)))
            continue
        got = engine.turn()
        ended += sum(one.ended for one in dict.fromkeys(got))
        if limit is not None:
            now_s = engine.clock()
            looked_at = (*got, *engine.waiting)
            late |= {one for one in looked_at if misses(one, start + due[place[one]].due_s, now_s, limit)}
            if sum(place[one] in counted for one in late) > limit.misses:
                engine.abandon()
                return requests[:sent], start, True
    return requests, start, False


def misses(request: Request, due_s: float, now_s: float, limit: Limit) -> bool:
    """Whether it is known by now that a request misses the targets."""
    first = request.token_s[0] if request.token_s else now_s
    if (first - due_s) * 1e3 > limit.targets.ttft_ms:
        return True
    return request.ended and bool(gaps := _gaps(request)) and fmean(gaps) > limit.targets.itl_ms


def _gaps(request: Request) -> list[float]:
    """Milliseconds between its tokens."""
    return [(later - earlier) * 1e3 for earlier, later in zip(request.token_s, request.token_s[1:], strict=False)]


def answered(requests: Sequence[Request], due: Sequence[Due], start: float) -> list[Answered]:
    """How each request went, all of them having ended; to a ten-millionth of a second, so that files stay small."""

    def since_due(moment: float, one: Due) -> float:
        return round((moment - start - one.due_s) * 1e3, 4)

    return [
        Answered(
            due_s=round(one.due_s, 7),
            tenant=one.tenant,
            wait_ms=since_due(request.began_s, one),
            ttft_ms=since_due(request.token_s[0], one),
            total_ms=since_due(request.token_s[-1], one),
            itl_ms=tuple(round(gap, 4) for gap in _gaps(request)),
            loaded=request.loaded,
        )
        for request, one in zip(requests, due, strict=True)
    ]

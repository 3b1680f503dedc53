"""How late the client of `perfbench traffic` sends its requests to a server that answers at once.

    python -m tests.benchmarks.client_lag --rate 200 --seconds 20

The server is another process on the loopback, which streams every token of an answer without computing anything. So
what is late is the client's own doing, with that of the machine. Needs the extra `serve`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import torch
from aiohttp import web

from perfbench.spec.traffic import Target
from perfbench.traffic.on_device.over_http import OverHttp
from perfbench.traffic.requests import Due

PROMPT_TOKENS, NEW_TOKENS, MODEL = 32, 16, "of-nobody"


async def _models(request: web.Request) -> web.Response:
    return web.json_response({"data": [{"id": MODEL}]})


async def _completions(request: web.Request) -> web.StreamResponse:
    asked = await request.json()
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    chunks: list[dict[str, Any]] = [{"choices": [{"text": "a", "token_ids": [5]}]} for _ in range(asked["max_tokens"])]
    usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": asked["max_tokens"]}
    for chunk in [*chunks, {"choices": [], "usage": usage}]:
        await response.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    return response


def _serve(told: Connection) -> None:
    """Answers on a free port, which it tells, until it is ended."""
    import asyncio

    async def run() -> None:
        app = web.Application()
        app.add_routes([web.get("/v1/models", _models), web.post("/v1/completions", _completions)])
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        told.send(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(run())


def lags_ms(rate_per_s: float, seconds: float) -> list[float]:
    """Of each request: how late it was sent, in milliseconds; arrivals are Poisson. RuntimeError where one failed."""
    draw, due, now = random.Random(0), [], 0.0
    while (now := now + draw.expovariate(rate_per_s)) < seconds:
        due.append(Due(now, 0, PROMPT_TOKENS, NEW_TOKENS))
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_serve, args=(theirs,), daemon=True)
    server.start()
    try:
        url = f"http://127.0.0.1:{ours.recv()}/v1"
        client = OverHttp(Target(url, MODEL, MODEL, "scenario", 30.0), 100, bare=True)
        driven = client.drive(due, [torch.full((PROMPT_TOKENS,), 7) for _ in due], None)
    finally:
        server.terminate()
        server.join()
    if driven.failures:
        raise RuntimeError(f"{len(driven.failures)} requests failed: {next(iter(driven.failures.values()))}")
    return driven.lag_ms or []


def main() -> None:
    """Prints p50, p99 and the largest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long")
    arguments = parser.parse_args()
    began = time.perf_counter()
    found = lags_ms(arguments.rate, arguments.seconds)
    cuts = statistics.quantiles(found, n=100)
    print(
        f"{len(found)} requests in {time.perf_counter() - began:.1f} s at {arguments.rate:g}/s of {NEW_TOKENS} tokens "
        f"each: sent late by p50 {statistics.median(found):.2f}, p99 {cuts[98]:.2f}, at most {max(found):.2f} ms"
    )


if __name__ == "__main__":
    main()

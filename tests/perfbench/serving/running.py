"""Our server in this process, on a free port of the loopback, and a client of the standard library for it."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from aiohttp import web

from perfbench.serving.choice import chosen
from perfbench.serving.on_device import launch
from perfbench.serving.on_device.server import Served, Server
from perfbench.spec.traffic import NOBODY, TrafficScenario, load

TENANTS = 5
VALUES: dict[str, Any] = {
    "backbone": "llama-tiny",
    "dtype": "fp32",
    "device": "cpu",
    "methods": ["lora"],
    "traffic": {
        "prompt_tokens": {"median": 8, "sigma": 0.5, "most": 16},
        "new_tokens": {"median": 6, "sigma": 0.3, "most": 400},
        "tenants": TENANTS, "rate": 100, "requests": 30,
    },
    "server": {"rows": 3, "resident": 2, "chunk_tokens": 5},
    "targets": {"ttft_ms": 60000, "itl_ms": 60000},
    "repetitions": 1,
}  # fmt: skip


def scenario(**changes: Any) -> TrafficScenario:
    """The tiny scenario, laid over with `changes`."""
    return load({**VALUES, **changes}, [], lambda _: ("cpu", ""))


@dataclass
class Running:
    """A server that is up."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def ask(self, path: str, body: Any = None) -> tuple[int, bytes]:
        """(status, what came). body: None for a GET, bytes as they are, else as JSON."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            if body is None:
                connection.request("GET", path)
            else:
                connection.request("POST", path, body if isinstance(body, bytes) else json.dumps(body).encode())
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def complete(self, model: str, prompt: list[int], new_tokens: int, **more: Any) -> tuple[int, dict[str, Any]]:
        """(status, the JSON) of a completion."""
        body = {"model": model, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "return_token_ids": True}
        status, came = self.ask("/v1/completions", body | more)
        return status, json.loads(came)

    def metric(self, name: str) -> float:
        """A value of /metrics."""
        lines = self.ask("/metrics")[1].decode().splitlines()
        return float(next(line for line in lines if line.startswith(f"perfbench_{name} ")).split()[-1])


def served(*, tenants: int = TENANTS, most_waiting: int = 100, shift: int = 0) -> Served:
    """What is served. shift: a fault, each tenant is answered with the adapter of the one so many after it."""
    given = scenario()
    made = launch.open_served(given, chosen(given, None), tenants, most_waiting)
    models = {name: (tenant + shift) % tenants if tenant != NOBODY else NOBODY for name, tenant in made.models.items()}
    return replace(made, models=models)


@contextmanager
def running(what: Served, kind: type[Server] = Server) -> Iterator[Running]:
    """The server, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def up() -> tuple[Server, web.AppRunner]:
        server = kind(what, loop)
        runner = web.AppRunner(server.application(), handler_cancellation=True, shutdown_timeout=0.1, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        server.thread.start()
        return server, runner

    server, runner = asyncio.run_coroutine_threadsafe(up(), loop).result(60)
    try:
        yield Running(server, runner.addresses[0][1])
    finally:
        server.thread.stop()
        asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(60)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()

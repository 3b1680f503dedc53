"""`perfbench serve`: opens a scenario's backbone and one method's adapters, and serves until it is told to end."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import transformers
from aiohttp import web

from perfbench.errors import BackboneError, PerfbenchError
from perfbench.machine import environment
from perfbench.measure.on_device import arms
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone
from perfbench.serving.choice import chosen, most_tenants
from perfbench.serving.on_device.server import Served, Server
from perfbench.spec.cases import Case
from perfbench.spec.traffic import DEFAULT_TENANT_MODEL, NOBODY, TrafficScenario
from perfbench.traffic.on_device.answering import OnEngine

Say = Callable[[str], None]
# Python's own, 5 ms, would keep a token from the network while the engine computes the next one.
SWITCH_S = 2e-4
ENDING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


def open_served(scenario: TrafficScenario, case: Case, tenants: int, most_waiting: int) -> Served:
    """The engine with all adapters made, and the names of its models. BackboneError, AdapterError."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(environment.threads())
    sys.setswitchinterval(SWITCH_S)
    wanted, seed = scenario.comparison, scenario.common.seed
    backbone = backbones.load(wanted.backbone, wanted.dtype, wanted.device, seed)
    plan_of = partial(arms.plan_of_tenant, case, backbone, tenants, seed)
    server = {
        "rows": scenario.server.rows, "resident": scenario.server.resident,
        "capacity": scenario.server.capacity(scenario.traffic), "chunk": scenario.server.chunk_tokens,
    }  # fmt: skip
    own = OnEngine(case, backbone, plan_of, tenants, server)
    models = {wanted.backbone: NOBODY}
    if own.residency is not None:
        own.residency.store.keep(range(tenants))
        models |= {DEFAULT_TENANT_MODEL.replace("{tenant}", str(tenant)): tenant for tenant in range(tenants)}
    tokenizer, eos = _words(backbone)
    return Served(own.engine(), models, backbone.shape.vocab, tokenizer, eos, most_waiting)


def _words(backbone: Backbone) -> tuple[Any, frozenset[int]]:
    """The tokenizer and the tokens that end an answer; (None, none) where the weights are random."""
    try:
        tokenizer = backbone.tokenizer()
    except BackboneError:
        return None, frozenset()
    configured = backbone.model.config.eos_token_id
    ends = configured if isinstance(configured, list) else [configured]
    return tokenizer, frozenset(token for token in (*ends, tokenizer.eos_token_id) if token is not None)


async def _serve(served: Served, where: ThreadPoolExecutor, host: str, port: int, say: Say) -> str | None:
    """Until a signal comes, or the engine ends by a fault, which is returned."""
    loop, told = asyncio.get_running_loop(), asyncio.Event()
    for one in ENDING:
        loop.add_signal_handler(one, told.set)
    server = Server(served, loop, where)
    runner = web.AppRunner(server.application(), handler_cancellation=True, shutdown_timeout=0.5, access_log=None)
    await runner.setup()
    try:
        await _listen(runner, host, port)
        server.thread.start()
        say(f"serving on http://{_address(runner)}/v1; Ctrl-C ends it")
        while not told.is_set() and server.thread.fault is None:
            with suppress(TimeoutError):
                async with asyncio.timeout(1):
                    await told.wait()
        server.thread.stop()
    finally:
        await runner.cleanup()
    say(", ".join(f"{count:,} {end}" for end, count in server.ends.items()))
    return server.thread.fault


async def _listen(runner: web.AppRunner, host: str, port: int) -> None:
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise PerfbenchError(f"--host {host} --port {port}: can't be listened on ({error.strerror})") from None


def _address(runner: web.AppRunner) -> str:
    host, port = runner.addresses[0][:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def serve(
    scenario: TrafficScenario,
    *,
    host: str,
    port: int,
    method: str | None,
    tenants: int | None,
    most_waiting: int,
    say: Say,
) -> None:
    """Serves one method of a scenario until Ctrl-C. tenants: how many have a model; None: `most_tenants`.
    KeyboardInterrupt at the end; PerfbenchError
    where it can't be served; RuntimeError where the engine ended by a fault."""
    case = chosen(scenario, method)
    count = tenants or most_tenants(scenario)
    say(f"loading {scenario.comparison.backbone}, {case.arm}, {count:,} tenants")
    with ThreadPoolExecutor(1, "engine") as where:
        served = where.submit(open_served, scenario, case, count, most_waiting).result()
        fault = asyncio.run(_serve(served, where, host, port, say))
    if fault is not None:
        raise RuntimeError(f"the engine ended: {fault}")
    raise KeyboardInterrupt

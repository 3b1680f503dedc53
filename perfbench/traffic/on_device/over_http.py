"""A server as the target: streaming completions over HTTP, in an open loop. Needs aiohttp, of the extra `serve`.

A request is sent when it is due, whatever has come back of the others, and how late it was sent is measured too. When
it got a row nobody sees from outside: its wait is the time to its first token. Whether its adapter was loaded nobody
sees either.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import aiohttp
import torch

from perfbench.errors import PerfbenchError, nearest
from perfbench.files import strict_json
from perfbench.files.plain_text import printable, shown
from perfbench.runtimes.continuous.engine import Request
from perfbench.spec.traffic import NOBODY, Target
from perfbench.traffic.on_device import load
from perfbench.traffic.on_device.answering import Driven
from perfbench.traffic.outcome import counted_places
from perfbench.traffic.requests import Due

# A key for servers that want one; it goes to the target alone, and into no file and no message.
KEY_VARIABLE = "PERFBENCH_TARGET_KEY"
# How often is looked whether a measurement can still hold, in seconds.
LOOK_S = 0.02
# What is quoted of a server's complaint, in bytes.
MOST_SAID = 2000
# Shorter than servers keep a connection that nobody uses: a request on one that is just being closed would fail.
KEEPALIVE_S = 2.0


class RequestError(Exception):
    """A request that failed, in one line."""


class OverHttp:
    """One arm of a target: the bare backbone's model, or those of the tenants."""

    def __init__(self, target: Target, vocabulary: int, *, bare: bool):
        """PerfbenchError where nobody answers there, or it is no such server."""
        self.target, self.bare, self._vocabulary = target, bare, vocabulary
        self._key = os.environ.get(KEY_VARIABLE, "").strip()
        self._models = asyncio.run(self._listed())

    def sizes(self) -> dict[str, int | None]:
        """What a server takes nobody can say from outside."""
        return dict.fromkeys(("bytes_per_tenant", "bank_bytes", "rows_bytes", "cache_bytes"))

    def drive(
        self, due: list[Due], texts: Sequence[torch.Tensor], limit: load.Limit | None, in_flight: int = 0
    ) -> Driven:
        """As `Answering` says. PerfbenchError where the server lacks a model."""
        for one in due:
            if (name := self._model(one.tenant)) not in self._models:
                raise PerfbenchError(
                    f"target.models: {self.target.openai} has no model {shown(name)}; {nearest(name, self._models)}"
                )
        requests = [Request(text, one.new_tokens, NOBODY if self.bare else one.tenant)
                    for one, text in zip(due, texts, strict=True)]  # fmt: skip
        return asyncio.run(self._drive(due, requests, limit, in_flight or len(due)))

    def _model(self, tenant: int) -> str:
        if self.bare or tenant == NOBODY:
            return self.target.base
        return self.target.tenant.replace("{tenant}", str(tenant))

    def _session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEPALIVE_S),
            timeout=aiohttp.ClientTimeout(total=self.target.timeout_s),
            headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
        )

    async def _listed(self) -> set[str]:
        """The models that the server has."""
        url = f"{self.target.openai}/models"
        try:
            async with self._session() as session, session.get(url, allow_redirects=False) as response:
                if response.status != 200:
                    raise RequestError(f"status {response.status}: {await self._said(response)}")
                found: Any = strict_json.parse(await response.read())
                return {str(model["id"]) for model in found["data"]}
        except (RequestError, aiohttp.ClientError, TimeoutError, OSError) as error:
            raise PerfbenchError(f"target.openai: GET {url}: {self._why(error)}") from None
        except (ValueError, KeyError, TypeError):
            raise PerfbenchError(f"target.openai: GET {url}: expected a list of models, got something else") from None

    async def _drive(self, due: list[Due], requests: list[Request], limit: load.Limit | None, in_flight: int) -> Driven:
        bodies = [self._body(request, one) for request, one in zip(requests, due, strict=True)]
        lag_ms: list[float] = []
        failures: dict[int, str] = {}
        free = asyncio.Semaphore(in_flight)
        async with self._session() as session:
            start = time.perf_counter()

            async def ask(place: int) -> None:
                now = time.perf_counter() - start
                lag_ms.append(round((now - due[place].due_s) * 1e3, 4))
                try:
                    await self._ask(session, bodies[place], requests[place])
                except (RequestError, aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
                    failures[place] = printable(f"model {self._model(due[place].tenant)}: {self._why(error)}")
                finally:
                    free.release()

            async def send() -> None:
                async with asyncio.TaskGroup() as open_ones:
                    for place, one in enumerate(due):
                        pause = start + one.due_s - time.perf_counter()
                        if pause > 0:
                            await asyncio.sleep(pause)
                        await free.acquire()
                        if in_flight < len(due):
                            due[place] = replace(one, due_s=time.perf_counter() - start)
                        open_ones.create_task(ask(place))

            sending = asyncio.create_task(send())
            given_up = limit is not None and await _hopeless(sending, limit, requests, due, start, failures)
            if given_up:
                sending.cancel()
                await asyncio.wait([sending])
            else:
                await sending
        return Driven(requests[: len(lag_ms)], due, start, given_up, None, lag_ms, failures)

    def _body(self, request: Request, one: Due) -> bytes:
        return json.dumps({
            "model": self._model(one.tenant), "prompt": request.prompt.tolist(), "max_tokens": request.new_tokens,
            "temperature": 0, "stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True,
            "return_token_ids": True,
        }).encode()  # fmt: skip

    async def _ask(self, session: aiohttp.ClientSession, body: bytes, request: Request) -> None:
        """Sends one, and fills in its tokens and when they came. RequestError and others where it fails."""
        moments: list[float] = []
        usage: dict[str, Any] | None = None
        done = False
        url, kind = f"{self.target.openai}/completions", {"Content-Type": "application/json"}
        async with session.post(url, data=body, headers=kind, allow_redirects=False) as response:
            if response.status != 200:
                raise RequestError(f"status {response.status}: {await self._said(response)}")
            async for line in response.content:
                now, data = time.perf_counter(), line.removeprefix(b"data:").strip()
                if not line.startswith(b"data:"):
                    continue
                if data == b"[DONE]":
                    done = True
                    break
                chunk = _chunk(data)
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    self._take(choice, request, moments, now)
        if not done:
            raise RequestError(f"the stream ended after {len(moments)} of {request.new_tokens} tokens")
        _close(request, moments, usage)

    def _take(self, choice: dict[str, Any], request: Request, moments: list[float], now: float) -> None:
        """The tokens of one chunk. Where a server does not say which they are, a chunk with text is a moment."""
        tokens = choice.get("token_ids")
        if tokens is None:
            count = int(bool(choice.get("text")))
        else:
            known = range(self._vocabulary)
            if not isinstance(tokens, list) or not all(type(token) is int and token in known for token in tokens):
                raise RequestError(f"token_ids: expected ids from 0 to {self._vocabulary - 1}, got {shown(tokens)}")
            request.tokens += tokens
            count = len(tokens)
        moments += [now] * count
        if moments and not request.token_s:
            request.token_s.append(moments[0])  # is seen while it is on its way

    async def _said(self, response: aiohttp.ClientResponse) -> str:
        """What a server complains of, in its own words."""
        text = (await response.content.read(MOST_SAID)).decode(errors="replace")
        try:
            error = json.loads(text)["error"]
            text = str(error["message"] if isinstance(error, dict) else error)
        except (ValueError, KeyError, TypeError):
            pass
        return text or "without a word"

    def _why(self, error: BaseException) -> str:
        """In one line, without the key, which some servers send back."""
        if isinstance(error, TimeoutError):
            return f"no end of the answer within {self.target.timeout_s:g} s (target.timeout_s)"
        if isinstance(error, aiohttp.ClientConnectorError):
            return f"nobody answers there ({error.os_error.strerror or error.os_error}); start the server first"
        text = str(error) or type(error).__name__
        return printable(text.replace(self._key, "(the key)") if self._key else text)[:400]


def _chunk(data: bytes) -> dict[str, Any]:
    """One server-sent event. RequestError where it is no chunk of a completion, or says what went wrong."""
    try:
        chunk = strict_json.parse(data)
    except ValueError as error:
        raise RequestError(f"a chunk of the stream is no JSON ({error})") from None
    choices = chunk.get("choices", []) if isinstance(chunk, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise RequestError(f"a chunk of the stream is no completion: {shown(chunk)}")
    if "error" in chunk:
        said = chunk["error"]
        raise RequestError(f"in the stream: {said.get('message') if isinstance(said, dict) else said}")
    return chunk


def _close(request: Request, moments: list[float], usage: dict[str, Any] | None) -> None:
    """Sets the moments of all tokens, as many as the server counted. Those that came together with others, in one
    chunk, have its moment. RequestError where it is not what was asked for."""
    if not isinstance(usage, dict):
        raise RequestError("no usage at the end of the stream, so that nobody knows how many tokens there were")
    for what, name, expected in (("prompt", "prompt_tokens", len(request.prompt)),
                                 ("new", "completion_tokens", request.new_tokens)):  # fmt: skip
        if usage.get(name) != expected:
            raise RequestError(f"expected {expected} {what} tokens, the server counted {shown(usage.get(name))}")
    if not moments or len(moments) > request.new_tokens or (request.tokens and len(request.tokens) != len(moments)):
        raise RequestError(f"expected {request.new_tokens} tokens, got {len(moments)} in the stream")
    moments += [moments[-1]] * (request.new_tokens - len(moments))
    request.token_s, request.began_s = moments, moments[0]


async def _hopeless(
    sending: asyncio.Task[None], limit: load.Limit, requests: Sequence[Request], due: Sequence[Due], start: float,
    failures: dict[int, str],
) -> bool:  # fmt: skip
    """Waits for all, or until more requests that count have missed the targets than may; whether that was it."""
    counted = counted_places(len(due))
    late: set[int] = set()
    while not (await asyncio.wait([sending], timeout=LOOK_S))[0]:
        now = time.perf_counter()
        for place in counted:
            due_s = start + due[place].due_s
            if due_s < now and (place in failures or load.misses(requests[place], due_s, now, limit)):
                late.add(place)
        if len(late) > limit.misses:
            return True
    return False

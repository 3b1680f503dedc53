"""The HTTP side: OpenAI's completions over an engine thread, with counts for Prometheus. Needs aiohttp, of the extra
`serve`.

A client that goes away cancels its handler, which gives the row back.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from aiohttp import web
from jinja2 import TemplateError

from perfbench.files import strict_json
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.sampling import Sampling
from perfbench.serving.on_device.engine_thread import EngineThread, News
from perfbench.serving.protocol import Answer, Asked, RefusedError, asked_for, model_list

# A prompt of a hundred thousand token ids in JSON.
LARGEST_BODY = 1 << 20


@dataclass
class Served:
    """What is served: `engine`; `models`: the name of each -> its tenant; tokenizer: None for a named shape; eos: the
    tokens that end an answer; most_waiting: how many requests may wait for a row."""

    engine: Engine
    models: Mapping[str, int]
    vocabulary: int
    tokenizer: Any
    eos: frozenset[int]
    most_waiting: int
    started: int = field(default_factory=lambda: int(time.time()))


class Server:
    """The handlers, and how many requests came to which end."""

    def __init__(self, served: Served, loop: asyncio.AbstractEventLoop, where: ThreadPoolExecutor | None = None):
        """where: as EngineThread has it."""
        self.served = served
        self.thread = EngineThread(served.engine, loop, where)
        self.ends: Counter[str] = Counter(dict.fromkeys(("answered", "refused", "failed", "cancelled"), 0))
        self.prompt_tokens, self._number = 0, 0

    def application(self) -> web.Application:
        """All routes."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[web.middleware(partial(_in_json, self.ends))])
        app.add_routes([
            web.get("/health", self.health), web.get("/metrics", self.metrics), web.get("/v1/models", self.models),
            web.post("/v1/completions", self.completions), web.post("/v1/chat/completions", self.chat),
        ])  # fmt: skip
        return app

    async def health(self, _: web.Request) -> web.Response:
        """200 while the engine serves, else 503 with the reason."""
        fault = self.thread.fault
        return web.json_response({"status": "ok" if fault is None else fault}, status=200 if fault is None else 503)

    async def models(self, _: web.Request) -> web.Response:
        """The bare backbone and every tenant."""
        return web.json_response(model_list(list(self.served.models), self.served.started))

    async def metrics(self, _: web.Request) -> web.Response:
        """Prometheus' text format."""
        engine, thread = self.served.engine, self.thread
        lines = ["# TYPE perfbench_requests_total counter"]
        lines += [f'perfbench_requests_total{{end="{end}"}} {count}' for end, count in self.ends.items()]
        for name, kind, value in (
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("generated_tokens_total", "counter", thread.tokens),
            ("adapter_loads_total", "counter", thread.loads),
            ("adapter_loaded_bytes_total", "counter", thread.loaded_bytes),
            ("rows", "gauge", engine.rows.most),
            ("rows_in_flight", "gauge", engine.in_flight),
            ("requests_waiting", "gauge", thread.waiting),
        ):
            lines += [f"# TYPE perfbench_{name} {kind}", f"perfbench_{name} {value}"]
        return web.Response(body="\n".join([*lines, ""]).encode(),
                            headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})  # fmt: skip

    async def completions(self, http: web.Request) -> web.StreamResponse:
        """What follows a text, whole or as it is made."""
        return await self._answer(http, chat=False)

    async def chat(self, http: web.Request) -> web.StreamResponse:
        """What follows the messages of a chat, in the words of the model's own template."""
        return await self._answer(http, chat=True)

    async def _answer(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        served, thread = self.served, self.thread
        try:
            body = strict_json.parse(await http.read())
        except ValueError as error:
            raise RefusedError(400, f"the body is no JSON ({error})") from None
        asked = asked_for(body, served.models, served.vocabulary, chat=chat)
        ids = self._ids(asked)
        if thread.fault is not None:
            raise RefusedError(503, f"the engine has ended: {thread.fault}")
        most = served.engine.rows.most + served.most_waiting
        if thread.open_requests >= most:
            waiting = f"{served.most_waiting:,} requests wait for a row already"
            raise RefusedError(429, f"{waiting}, the most that may; send fewer at a time")
        self._number += 1
        self.prompt_tokens += len(ids)
        request = Request(
            torch.tensor(ids, device=served.engine.rows.weights.device), asked.max_tokens, served.models[asked.model],
            frozenset() if asked.ignore_eos else served.eos,
            Sampling(asked.temperature, asked.top_p, asked.seed) if asked.temperature else None,
        )  # fmt: skip
        answer, words = Answer(asked, self._number, len(ids)), Words(served.tokenizer)
        news: asyncio.Queue[News] = asyncio.Queue()
        thread.open(request, news.put_nowait)
        try:
            out, end = await (self._stream if asked.stream else self._whole)(http, answer, words, request, news)
        except (asyncio.CancelledError, ConnectionError) as gone:
            self.ends["cancelled"] += 1
            if isinstance(gone, asyncio.CancelledError):
                raise
            return web.Response()  # nobody is there to read it
        finally:
            thread.close(request)
        self.ends[end] += 1
        return out

    def _ids(self, asked: Asked) -> list[int]:
        """The tokens of a prompt. RefusedError where they can't be had, or are too many."""
        prompt: Any = asked.prompt
        where = "messages" if asked.chat else "prompt"
        if asked.chat or isinstance(prompt, str):
            prompt = self._encoded(prompt, where)
            if not prompt:
                raise RefusedError(400, "expected one token at least, got none", where)
        ids: list[int] = prompt
        room = self.served.engine.rows.capacity + 1
        if len(ids) + asked.max_tokens > room:
            message = f"{len(ids):,} tokens with max_tokens {asked.max_tokens:,}, expected at most {room:,} together"
            raise RefusedError(400, message, where)
        return ids

    def _encoded(self, prompt: Any, where: str) -> list[int]:
        """The tokens of a text, or of messages. RefusedError where the backbone has no words for them."""
        tokenizer = self.served.tokenizer
        if tokenizer is None:
            message = "this backbone has random weights and no tokenizer; send a list of token ids to /v1/completions"
            raise RefusedError(400, message, where)
        if isinstance(prompt, str):
            found: list[int] = tokenizer(prompt)["input_ids"]
            return found
        if tokenizer.chat_template is None:
            raise RefusedError(400, "this backbone has no chat template; send a text to /v1/completions", where)
        try:
            found = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        except (TemplateError, ValueError) as error:
            raise RefusedError(400, f"the backbone's chat template refuses them ({error})", where) from None
        return found

    async def _whole(
        self, _: web.Request, answer: Answer, words: Words, request: Request, news: asyncio.Queue[News]
    ) -> tuple[web.StreamResponse, str]:
        """(the response, to which end the request came)."""
        ended = False
        while not ended:
            one = await news.get()
            if one.failure is not None:
                raise RefusedError(500, one.failure)
            ended = one.ended
        part = answer.part(words.more(request.tokens, last=True), request.tokens, _finish(request))
        return web.json_response(part | {"usage": answer.usage(len(request.tokens))}), "answered"

    async def _stream(
        self, http: web.Request, answer: Answer, words: Words, request: Request, news: asyncio.Queue[News]
    ) -> tuple[web.StreamResponse, str]:
        """As `_whole`, in server-sent events."""
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        ended = False
        while not ended:
            one = await news.get()
            if one.failure is not None:
                if not out.prepared:
                    raise RefusedError(500, one.failure)
                await out.write(_event(RefusedError(500, one.failure).body()))
                await out.write_eof()
                return out, "failed"
            if not out.prepared:
                await out.prepare(http)
            ended = one.ended
            finish = _finish(request) if ended else None
            part = answer.part(words.more(one.tokens, last=ended), one.tokens, finish)
            if answer.asked.usage_always or (ended and not answer.asked.usage_alone):
                part["usage"] = answer.usage(len(request.tokens))
            await out.write(_event(part))
        if answer.asked.usage_alone:
            await out.write(_event(answer.usage_alone(len(request.tokens))))
        await out.write(b"data: [DONE]\n\n")
        await out.write_eof()
        return out, "answered"


async def _in_json(ends: Counter[str], request: web.Request, handler: Any) -> web.StreamResponse:
    """Every refusal is JSON, and counted."""
    try:
        answer: web.StreamResponse = await handler(request)
    except RefusedError as refused:
        ends["failed" if refused.status >= 500 else "refused"] += 1
        return web.json_response(refused.body(), status=refused.status)
    except web.HTTPException as error:
        ends["refused"] += 1
        return web.json_response(RefusedError(error.status, error.reason).body(), status=error.status)
    return answer


class Words:
    """The text of tokens that come one after the other, without halves of characters; none without a tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._given = 0

    def more(self, tokens: list[int], *, last: bool) -> str:
        """What these tokens add."""
        if self._tokenizer is None:
            return ""
        self._tokens += tokens
        text: str = self._tokenizer.decode(self._tokens, skip_special_tokens=True)
        if not last and text.endswith("\ufffd"):
            return ""
        new = text[self._given :]
        self._given = len(text)
        return new


def _event(body: Mapping[str, Any]) -> bytes:
    return b"data: " + json.dumps(body, separators=(",", ":")).encode() + b"\n\n"


def _finish(request: Request) -> str:
    return "stop" if request.tokens[-1] in request.eos else "length"

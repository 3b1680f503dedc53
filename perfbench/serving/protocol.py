"""OpenAI's completions, of texts and of chats, as this server takes and gives them: what a request may say, and what
goes back. Free of torch and of any web framework.

Whatever would change an answer and can't be done is refused: nothing is ignored silently.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.files.plain_text import shown

DEFAULT_MAX_TOKENS = 16

# What many clients send along, and the only value besides null with which it changes nothing.
_NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "presence_penalty": 0, "frequency_penalty": 0,
    "stop": None, "suffix": None, "logprobs": None, "logit_bias": None,
}  # fmt: skip
_FLAGS = ("stream", "ignore_eos", "return_token_ids")
_BOTH = ("model", "max_tokens", "temperature", "top_p", "seed", "user", "stream_options", *_FLAGS, *_NEUTRAL)
_FIELDS = {False: ("prompt", *_BOTH), True: ("messages", "max_completion_tokens", *_BOTH)}
_ROLES = ("system", "user", "assistant")
# What OpenAI takes where nothing is said, and the largest temperature.
DEFAULT_TEMPERATURE, MOST_TEMPERATURE = 1.0, 2.0


class RefusedError(PerfbenchError):
    """A request that can't be served, with its HTTP status and the field that is wrong, None where it is no field."""

    def __init__(self, status: int, message: str, field: str | None = None):
        super().__init__(message if field is None else f"{field}: {message}")
        self.status, self.field = status, field

    def body(self) -> dict[str, Any]:
        """As OpenAI's servers say it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.field, "code": self.status}}


@dataclass(frozen=True)
class Asked:
    """A completion that was asked for. prompt: text, the ids of its tokens, or the messages of a chat, each with its
    `role` and `content`; temperature 0: the likeliest token always; usage_alone: whether the last chunk of a stream has
    the usage and nothing else, and usage_always: whether every chunk has it, so far, as `stream_options` asks."""

    model: str
    prompt: str | list[int] | list[dict[str, str]]
    chat: bool
    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None
    stream: bool
    ignore_eos: bool
    return_token_ids: bool
    usage_alone: bool
    usage_always: bool


def asked_for(body: Any, models: Collection[str], vocabulary: int, *, chat: bool = False) -> Asked:
    """What the body of a request asks for; chat: it is one of messages. RefusedError with status 404 for an unknown
    model, else 400."""
    if not isinstance(body, dict):
        raise RefusedError(400, f"expected a JSON object, got {shown(body)}")
    for name in body:
        if name not in _FIELDS[chat]:
            raise RefusedError(400, f"unknown field; {nearest(name, _FIELDS[chat])}", name)
    model = body.get("model")
    if not isinstance(model, str):
        raise RefusedError(400, f"expected the name of a model, got {shown(model)}", "model")
    if model not in models:
        raise RefusedError(404, f"no model {shown(model)}; {nearest(model, models)}", "model")
    for name, neutral in _NEUTRAL.items():
        if body.get(name) not in (None, neutral):
            raise RefusedError(400, f"expected {shown(neutral)}, the only one there is, got {shown(body[name])}", name)
    flags = {name: _flag(body, name) for name in _FLAGS}
    most = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    return Asked(
        model=model,
        prompt=_messages(body.get("messages")) if chat else _prompt(body.get("prompt"), vocabulary),
        chat=chat,
        max_tokens=_max_tokens(body.get(most), most),
        temperature=_between(body, "temperature", 0, MOST_TEMPERATURE, DEFAULT_TEMPERATURE),
        top_p=_between(body, "top_p", 1e-6, 1, 1.0),
        seed=_seed(body.get("seed")),
        usage_alone=_option(body.get("stream_options"), "include_usage"),
        usage_always=_option(body.get("stream_options"), "continuous_usage_stats"),
        **flags,
    )


def _flag(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise RefusedError(400, f"expected true or false, got {shown(value)}", name)


def _max_tokens(value: Any, name: str) -> int:
    if value is None:
        return DEFAULT_MAX_TOKENS
    if type(value) is not int or value < 1:
        raise RefusedError(400, f"expected an integer >= 1, got {shown(value)}", name)
    return value


def _between(body: Mapping[str, Any], name: str, least: float, most: float, default: float) -> float:
    value = body.get(name)
    if value is None:
        return default
    if type(value) not in (int, float) or not least <= value <= most:
        raise RefusedError(400, f"expected a number from {least:g} to {most:g}, got {shown(value)}", name)
    return float(value)


def _seed(value: Any) -> int | None:
    if value is None or (type(value) is int and 0 <= value < 2**63):
        return value
    raise RefusedError(400, f"expected an integer from 0 to 2^63 - 1, got {shown(value)}", "seed")


def _messages(value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list) or not value:
        raise RefusedError(400, f"expected a list of messages, got {shown(value)}", "messages")
    for place, one in enumerate(value):
        if not isinstance(one, dict) or set(one) != {"role", "content"}:
            raise RefusedError(400, f"expected an object of role and content, got {shown(one)}", f"messages.{place}")
        if one["role"] not in _ROLES:
            told = f"expected one of {', '.join(_ROLES)}, got {shown(one['role'])}"
            raise RefusedError(400, told, f"messages.{place}.role")
        if not isinstance(one["content"], str):
            raise RefusedError(400, f"expected a text, got {shown(one['content'])}", f"messages.{place}.content")
    return value


def _option(options: Any, name: str) -> bool:
    """One of `stream_options`: OpenAI's own, and vLLM's, which load generators ask for."""
    if options is None:
        return False
    if not isinstance(options, dict) or set(options) - {"include_usage", "continuous_usage_stats"}:
        raise RefusedError(400, f"expected an object with include_usage, got {shown(options)}", "stream_options")
    return _flag(options, name)


def _prompt(value: Any, vocabulary: int) -> str | list[int]:
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise RefusedError(400, f"expected a text, or a list of token ids, got {shown(value)}", "prompt")
    for place, token in enumerate(value):
        if type(token) is not int or not 0 <= token < vocabulary:
            raise RefusedError(400, f"expected a token id from 0 to {vocabulary - 1}, got {shown(token)}",
                               f"prompt.{place}")  # fmt: skip
    return value


@dataclass(frozen=True)
class Answer:
    """What stands in every part of the answer to one request. `number`: which request it is."""

    asked: Asked
    number: int
    prompt_tokens: int

    def part(self, text: str, tokens: Sequence[int], finish: str | None) -> dict[str, Any]:
        """A chunk of a stream, or the whole answer: `text` of `tokens`; finish: stop, length, or None for not yet."""
        said: dict[str, Any] = {"text": text}
        if self.asked.chat:
            said = {"delta" if self.asked.stream else "message": {"role": "assistant", "content": text}}
        choice: dict[str, Any] = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        if self.asked.return_token_ids:
            choice["token_ids"] = list(tokens)
        return self._around([choice])

    def usage(self, new_tokens: int) -> dict[str, Any]:
        """How many tokens there were in all."""
        total = self.prompt_tokens + new_tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": new_tokens, "total_tokens": total}

    def usage_alone(self, new_tokens: int) -> dict[str, Any]:
        """The last chunk of a stream that is to have one of its own for this."""
        return self._around([]) | {"usage": self.usage(new_tokens)}

    def _around(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind, name = "text_completion", "cmpl"
        if self.asked.chat:
            kind, name = "chat.completion.chunk" if self.asked.stream else "chat.completion", "chatcmpl"
        return {"id": f"{name}-{self.number}", "object": kind, "created": int(time.time()),
                "model": self.asked.model, "choices": choices}  # fmt: skip


def model_list(names: Sequence[str], started: int) -> dict[str, Any]:
    """`GET /v1/models`. started: seconds since 1970."""
    models = [{"id": name, "object": "model", "created": started, "owned_by": "perfbench"} for name in names]
    return {"object": "list", "data": models}

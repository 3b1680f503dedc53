"""How the judge of MT-Bench is asked: one chat completion at an OpenAI-compatible endpoint that the user names.

The key goes to that address alone, and into no message; an answer that does not come in time, whole, is given up.
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
import time
import urllib.error
import urllib.request
from contextlib import suppress
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

from perfbench.errors import TaskError
from perfbench.files.plain_text import printable

MAX_TOKENS = 2048
LONGEST_WAIT_S = 60.0
LARGEST_REPLY_BYTES = 4 * 2**20


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is asked. url: up to and with /v1; model: its name there; key: sent as a bearer token, if any;
    timeout_s: of one try, until the whole answer is there; tries: in all; wait_s: before the second, doubled before
    each further one."""

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 120.0
    tries: int = 4
    wait_s: float = 2.0

    def __post_init__(self) -> None:
        # A file that a key was read from ends in a newline.
        object.__setattr__(self, "key", self.key.strip())

    def check(self) -> None:
        """TaskError on an address or a key that can't be used; neither a key nor a password stands in its message."""
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise TaskError(
                "judge: the key: expected printable ASCII characters without spaces, got others; "
                "set the variable that --key-variable names to the key alone"
            )
        _check_url(self.url)


def ask(endpoint: Endpoint, system: str, user: str, what: str) -> str:
    """One chat completion at temperature 0; tried again on no connection, no whole answer in time, 429 and 5xx."""
    endpoint.check()
    url = f"{endpoint.url.rstrip('/')}/chat/completions"
    request = _request(endpoint, url, system, user)
    reason, wait_s = "", endpoint.wait_s
    for attempt in range(1, endpoint.tries + 1):
        asked_wait_s = 0.0
        late = f"no answer in {endpoint.timeout_s:g} s"
        deadline = _Deadline(endpoint.timeout_s)
        try:
            body = _reply(request, deadline)
        except urllib.error.HTTPError as error:
            reason = f"HTTP {error.code} {_line(error.reason, endpoint)}: {_line(_rest(error), endpoint)}"
            if error.code != 429 and error.code < 500:
                raise TaskError(
                    f"judge {url}: {what}: {reason}; check the address, the model's name and the key"
                ) from None
            asked_wait_s = _seconds(error.headers.get("Retry-After"))
        except TimeoutError:
            reason = late
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
            said = _line(str(getattr(error, "reason", error) or type(error).__name__), endpoint)
            reason = late if deadline.passed else said
        else:
            return _content(body, f"{url}: {what}", endpoint)
        if attempt < endpoint.tries:
            time.sleep(min(max(wait_s, asked_wait_s), LONGEST_WAIT_S))
            wait_s *= 2
    raise TaskError(
        f"judge {url}: {what}: no answer in {endpoint.tries} tries, the last: {reason}; "
        "check that it runs, then give the same command to go on"
    )


def _request(endpoint: Endpoint, url: str, system: str, user: str) -> urllib.request.Request:
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": MAX_TOKENS, "n": 1}
    headers = {"Content-Type": "application/json"}
    if endpoint.key:
        headers["Authorization"] = f"Bearer {endpoint.key}"
    return urllib.request.Request(url, json.dumps(body).encode(), headers)


def _reply(request: urllib.request.Request, deadline: _Deadline) -> bytes:
    """The body of the answer. TimeoutError where it is not whole when the deadline passes."""
    opener = urllib.request.build_opener(_NoRedirect, _Http(deadline), _Https(deadline))
    with deadline:
        try:
            with opener.open(request, timeout=deadline.seconds) as response:
                body: bytes = response.read(LARGEST_REPLY_BYTES)
        except urllib.error.HTTPError as error:
            with error:
                error.said = _within(error, deadline)  # type: ignore[attr-defined]
            raise
    if deadline.passed:
        raise TimeoutError
    return body


def _within(error: urllib.error.HTTPError, deadline: _Deadline) -> bytes:
    """What an error's page says, as far as it comes before the deadline."""
    with suppress(OSError, http.client.HTTPException):
        return b"" if deadline.passed else error.read(2000)
    return b""


def _rest(error: urllib.error.HTTPError) -> bytes:
    said: bytes = getattr(error, "said", b"")
    return said


class _Deadline:
    """Shuts a connection when the time is over, however little by little an answer comes: a timeout of the socket
    begins anew with every byte. To be used as a context."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self.passed = False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._pass)
        self._timer.daemon = True

    def __enter__(self) -> None:
        self._timer.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._timer.cancel()

    def hold(self, connected: socket.socket) -> None:
        """The connection that is to be shut."""
        self._socket = connected
        if self.passed:
            self._shut()

    def _pass(self) -> None:
        self.passed = True
        self._shut()

    def _shut(self) -> None:
        if self._socket is not None:
            with suppress(OSError):
                # Not the method of a TLS socket, which would take its state away from the thread that reads.
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)


class _Http(urllib.request.HTTPHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def http_open(self, request: urllib.request.Request) -> Any:
        """As the parent class, with a connection that the deadline can shut."""
        return self.do_open(_held(http.client.HTTPConnection, self._deadline), request)


class _Https(urllib.request.HTTPSHandler):
    def __init__(self, deadline: _Deadline):
        super().__init__()
        self._deadline = deadline

    def https_open(self, request: urllib.request.Request) -> Any:
        """As the parent class, with a connection that the deadline can shut."""
        return self.do_open(_held(http.client.HTTPSConnection, self._deadline), request)


def _held(kind: type[http.client.HTTPConnection], deadline: _Deadline) -> Any:
    """A connection of that `kind` whose socket `deadline` holds."""

    class Held(kind):  # type: ignore[misc,valid-type]
        def connect(self) -> None:
            super().connect()
            deadline.hold(self.sock)

    return Held


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """The key goes to the address that the user gave, and nowhere else."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:  # a bracket left open, a port that is none
        parts, known = None, False
    # What stands before an @ may be a password, and what stands behind a ? or # a key.
    shown = printable(re.split("[?#]", url.rpartition("@")[2])[0])[:200]
    if "@" in url:
        raise TaskError(
            f"judge: expected an address without a user and password, got one for {shown}; "
            "give a key in the variable that --key-variable names"
        )
    if not known or not parts or parts.query or parts.fragment or not (url.isascii() and url.isprintable()):
        raise TaskError(f"judge: expected an address such as http://127.0.0.1:8000/v1, got {shown!r}")
    if " " in url:
        raise TaskError(f"judge: expected an address without spaces, got {shown!r}")


def _content(body: bytes, what: str, endpoint: Endpoint) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        content = None
    if not isinstance(content, str):
        got = _line(body, endpoint)
        raise TaskError(f"judge {what}: expected choices[0].message.content of a chat completion, got {got}")
    return content


def _line(said: bytes | str, endpoint: Endpoint) -> str:
    """What an endpoint said, in one line, without the key, which some send back."""
    text = said if isinstance(said, str) else said[:4000].decode("utf-8", "replace")
    if endpoint.key:
        text = text.replace(endpoint.key, "(the key)")
    return printable(text)[:200]


def _seconds(header: str | None) -> float:
    return float(header) if header and header.isdecimal() and len(header) < 10 else 0.0

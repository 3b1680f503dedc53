"""Hostile endpoints, keys and addresses: no secret is ever told, and no try outlives its time."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from perfbench.cli import main
from perfbench.errors import TaskError
from perfbench.finetune.mt_bench.judge_endpoint import Endpoint, ask

KEY = "sk-a-secret-key-123456"
OK = b"HTTP/1.1 200 OK\r\n"
COMPLETION = b'{"choices": [{"message": {"content": "[[7]]"}}]}'

Talk = Callable[[socket.socket, threading.Event], None]


class RawServer:
    """A socket on the loopback that says what `talk` says, byte for byte, to everybody."""

    def __init__(self, talk: Talk) -> None:
        self.over = threading.Event()
        self.requests: list[bytes] = []
        self._talk = talk
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                connection, _ = self._listening.accept()
                if self.over.is_set():
                    connection.close()
                    return
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError):
            self.requests.append(connection.recv(65536))
            self._talk(connection, self.over)

    def close(self) -> None:
        self.over.set()
        with suppress(OSError):
            socket.create_connection(self._listening.getsockname()).close()
        for thread in self._threads:
            thread.join()
        self._listening.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Talk], RawServer]]:
    servers: list[RawServer] = []

    def start(talk: Talk) -> RawServer:
        servers.append(RawServer(talk))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def says(content: bytes) -> Talk:
    return lambda connection, over: connection.sendall(content)


def drips(before: bytes, drop: bytes = b"x") -> Talk:
    """A byte every 20 ms, for ever: no wait for a single one is ever long."""

    def talk(connection: socket.socket, over: threading.Event) -> None:
        connection.sendall(before)
        while not over.wait(0.02):
            connection.sendall(drop)

    return talk


def asked(url: str, *, key: str = KEY, timeout_s: float = 0.3, tries: int = 2) -> str:
    return ask(Endpoint(url, "m", key, timeout_s=timeout_s, tries=tries, wait_s=0.01), "s", "u", "question 1")


@pytest.mark.parametrize(
    "talk",
    [
        drips(b""),
        drips(OK),
        drips(OK + b"\r\n"),
        drips(OK + b"Content-Length: 100000\r\n\r\n"),
        drips(OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        drips(b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        drips(b"HTTP/1.1 503 Busy\r\nContent-Length: 1000\r\n\r\n"),
    ],
    ids=["status", "header", "body", "counted body", "chunks", "continue", "error's page"],
)
def test_an_endpoint_that_drips_is_left_after_the_timeout(serve: Callable[[Talk], RawServer], talk: Talk) -> None:
    with pytest.raises(TaskError, match=r"no answer in 2 tries, the last: (no answer in 0.3 s|HTTP 503 Busy)"):
        asked(serve(talk).url)


def test_an_answer_before_the_deadline_counts(serve: Callable[[Talk], RawServer]) -> None:
    server = serve(says(OK + b"Content-Length: %d\r\n\r\n" % len(COMPLETION) + COMPLETION))
    assert asked(server.url, key=f" {KEY}\n", timeout_s=30) == "[[7]]"
    assert f"Authorization: Bearer {KEY}\r\n".encode() in server.requests[0]


@pytest.mark.parametrize("key", [f"{KEY}\n{KEY}", f"{KEY} x", f"{KEY}\x1b[31m", f"{KEY}é", f"{KEY}\x00"])
def test_a_key_that_can_not_be_sent_is_refused_and_never_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], key: str
) -> None:
    endpoint = Endpoint("http://127.0.0.1:1/v1", "m", key)
    assert KEY not in repr(endpoint)
    with pytest.raises(TaskError, match="expected printable ASCII characters without spaces") as refused:
        endpoint.check()
    assert KEY not in str(refused.value)
    if "\x00" not in key:
        monkeypatch.setenv("OPENAI_API_KEY", key)
        command = ["mtbench", "judge", "a", "--questions", "q", "--out", str(tmp_path / "o"), "--model", "m"]
        assert main([*command, "--url", endpoint.url]) == 2
        said = capsys.readouterr()
        assert KEY not in said.out + said.err
        assert len(said.err.splitlines()) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://user:hunter2@127.0.0.1:8000/v1",
        "http://hunter2@127.0.0.1:8000/v1",
        "http://user:hun/ter2@127.0.0.1/v1",
        "user:hunter2@127.0.0.1",
        "http://127.0.0.1:8000/v1?api-key=hunter2",
        "http://127.0.0.1:8000/v1#hunter2",
    ],
)
def test_an_address_with_a_secret_is_refused_without_telling_it(url: str) -> None:
    with pytest.raises(TaskError, match="expected an address") as refused:
        asked(url)
    assert "hunter2" not in str(refused.value)
    assert "ter2" not in str(refused.value)


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/v1\r\nX: y", "http://127.0.0.1:1/ a", "http://127.0.0.1:1/é", "http://"]
)
def test_an_address_with_odd_characters_is_refused(url: str) -> None:
    with pytest.raises(TaskError, match="expected an address") as refused:
        asked(url)
    assert str(refused.value).isprintable()


@pytest.mark.parametrize(
    "said",
    [
        b"HTTP/1.1 401 Unauthorized\r\n\r\nbad key " + KEY.encode() + b"\x1b[31m\nred",
        b"HTTP/1.1 400 " + KEY.encode() + b"\x1b[31m\r\n\r\n",
        b"HTTP/1.1 500 No\r\n\r\n\x1b]0;title\x07" + KEY.encode(),
        OK + b"\r\n" + KEY.encode() + b"\x1b[31m",
        OK + b"\r\n" + b"[" * 200_000,
        b"\x00\x1b[31m" + KEY.encode() + b"\r\n\r\n",
    ],
)
def test_what_an_endpoint_says_is_told_in_one_clean_line_without_the_key(
    serve: Callable[[Talk], RawServer], said: bytes
) -> None:
    with pytest.raises(TaskError) as refused:
        asked(serve(says(said)).url, timeout_s=30)
    assert str(refused.value).isprintable()
    assert KEY not in str(refused.value)

"""Our server over real HTTP: its answers are the engine's, it refuses with a word, and rows come back."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("aiohttp", reason="needs aiohttp: install the extra `serve`")

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perfbench.cli import main
from perfbench.errors import AdapterError
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.residency import Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.serving.on_device.server import Words
from tests.perfbench.serving.running import TENANTS, VALUES, Running, running, served

PROMPTS = [[3 + (7 * i + j) % 250 for j in range(3 + i)] for i in range(6)]


@pytest.fixture
def up() -> Iterator[Running]:
    with running(served()) as found:
        yield found


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alone(model: int, prompt: list[int], new_tokens: int) -> list[int]:
    """What the engine gives a request that has it to itself."""
    engine = served().engine
    request = Request(torch.tensor(prompt), new_tokens, model)
    engine.submit(request)
    while not engine.idle:
        engine.turn()
    return request.tokens


def streamed(came: bytes) -> tuple[list[int], list[dict[str, Any]]]:
    """(the tokens of a stream, its chunks)."""
    *events, last, end = came.decode().split("\n\n")
    assert (last, end) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    return [token for chunk in chunks for choice in chunk["choices"] for token in choice["token_ids"]], chunks


def test_answers_are_the_engine_s_whole_and_streamed(up: Running) -> None:
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = up.complete(f"tenant-{i % TENANTS}", PROMPTS[i], 5 + i)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, (status, answer) in found.items():
        expected = alone(i % TENANTS, PROMPTS[i], 5 + i)
        assert status == 200
        assert answer["choices"][0]["token_ids"] == expected
        assert answer["choices"][0]["finish_reason"] == "length"
        counted = {"prompt_tokens": 3 + i, "completion_tokens": 5 + i, "total_tokens": 8 + 2 * i}
        assert answer["usage"] == counted
        for alone_last in (False, True):
            _, came = up.ask("/v1/completions", {
                "model": f"tenant-{i % TENANTS}", "prompt": PROMPTS[i], "max_tokens": 5 + i, "temperature": 0,
                "stream": True, "return_token_ids": True, "stream_options": {"include_usage": alone_last},
            })  # fmt: skip
            tokens, chunks = streamed(came)
            assert tokens == expected
            assert chunks[-1]["usage"] == counted
            assert [bool(chunk["choices"]) for chunk in chunks[-1:]] == [not alone_last]
    assert up.metric('requests_total{end="answered"}') == 18
    assert up.metric("generated_tokens_total") == 3 * sum(5 + i for i in range(6))
    assert up.metric("adapter_loads_total") >= TENANTS
    assert (up.metric("rows_in_flight"), up.metric("requests_waiting")) == (0, 0)


def test_tenants_and_the_bare_backbone_differ(up: Running) -> None:
    models = [model["id"] for model in json.loads(up.ask("/v1/models")[1])["data"]]
    assert models == ["llama-tiny", *(f"tenant-{i}" for i in range(TENANTS))]
    answers = [up.complete(model, PROMPTS[5], 8)[1]["choices"][0]["token_ids"] for model in models]
    assert len({tuple(answer) for answer in answers}) == len(models)
    assert up.ask("/health") == (200, b'{"status": "ok"}')


@pytest.mark.parametrize(
    ("change", "status", "field", "said"),
    [
        ({"model": "tenant-9"}, 404, "model", "did you mean 'tenant-"),
        ({"model": 3}, 400, "model", "expected the name of a model, got 3"),
        ({"prompt": "text"}, 400, "prompt", "no tokenizer; send a list of token ids"),
        ({"prompt": []}, 400, "prompt", "expected a text, or a list of token ids, got []"),
        ({"prompt": [3, 256]}, 400, "prompt.1", "expected a token id from 0 to 255, got 256"),
        ({"prompt": [3, True]}, 400, "prompt.1", "got true"),
        ({"prompt": [3] * 17, "max_tokens": 400}, 400, "prompt", "17 tokens with max_tokens 400, expected at most 416"),
        ({"max_tokens": 0}, 400, "max_tokens", "expected an integer >= 1, got 0"),
        ({"max_tokens": 2.5}, 400, "max_tokens", "expected an integer >= 1, got 2.5"),
        ({"temperature": 2.5}, 400, "temperature", "expected a number from 0 to 2, got 2.5"),
        ({"temperature": True}, 400, "temperature", "expected a number from 0 to 2, got true"),
        ({"top_p": 0}, 400, "top_p", "expected a number from 1e-06 to 1, got 0"),
        ({"seed": -1}, 400, "seed", "expected an integer from 0 to 2^63 - 1, got -1"),
        ({"messages": []}, 400, "messages", "unknown field"),
        ({"stream": "yes"}, 400, "stream", "expected true or false, got 'yes'"),
        ({"stream_options": 1}, 400, "stream_options", "expected an object with include_usage"),
        ({"n": 2}, 400, "n", "expected 1, the only one there is, got 2"),
        ({"max_token": 2}, 400, "max_token", "unknown field; did you mean 'max_tokens'?"),
    ],
)
def test_bad_input_is_refused_by_its_field(
    up: Running, change: dict[str, Any], status: int, field: str, said: str
) -> None:
    body = {"model": "tenant-1", "prompt": [3, 4], "max_tokens": 2, "temperature": 0, **change}
    found, came = up.ask("/v1/completions", body)
    error = json.loads(came)["error"]
    assert (found, error["param"]) == (status, field)
    assert said in error["message"]
    assert up.metric('requests_total{end="refused"}') == 1


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'{"model": NaN}', b'{"a": 1, "a": 2}', b"\xff"])
def test_what_is_no_json_object_is_refused(up: Running, body: bytes) -> None:
    status, came = up.ask("/v1/completions", body)
    assert status == 400
    assert "JSON" in json.loads(came)["error"]["message"]
    assert up.ask("/v1/completion", b"{}")[0] == 404
    assert up.ask("/v1/completions")[0] == 405


def test_more_may_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, real = threading.Event(), Engine.turn
    monkeypatch.setattr(Engine, "turn", lambda self: (gate.wait(60), real(self))[1])
    with running(served(most_waiting=1)) as up:
        found: list[int] = []
        threads = [
            threading.Thread(target=lambda: found.append(up.complete("tenant-1", [3, 4], 3)[0])) for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        until(lambda: up.server.thread.open_requests == 4)
        status, answer = up.complete("tenant-1", [3, 4], 3)
        gate.set()
        for thread in threads:
            thread.join()
    assert status == 429
    assert "1 requests wait for a row already" in answer["error"]["message"]
    assert found == [200] * 4


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_gives_its_row_back(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Engine.turn
    monkeypatch.setattr(Engine, "turn", lambda self: (time.sleep(0.01), real(self))[1])
    with running(served()) as up:
        body = json.dumps(
            {"model": "tenant-1", "prompt": [3, 4], "max_tokens": 400, "temperature": 0, "stream": stream}
        )
        with socket.create_connection(("127.0.0.1", up.port)) as connection:
            connection.sendall(
                f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
            )
            if stream:
                assert connection.recv(10)
            until(lambda: up.metric("rows_in_flight") == 1)
        until(lambda: up.metric('requests_total{end="cancelled"}') == 1)
        until(lambda: up.metric("rows_in_flight") == 0)
        assert up.metric("generated_tokens_total") < 400
        assert up.complete("tenant-2", PROMPTS[2], 4)[1]["choices"][0]["token_ids"] == alone(2, PROMPTS[2], 4)


def test_an_adapter_that_can_t_be_had_fails_its_own_requests_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    what, real = served(), Store.of

    def of(self: Store, tenant: int) -> Any:
        if tenant == 3:
            raise AdapterError("tenant 3: its file has gone")
        return real(self, tenant)

    monkeypatch.setattr(Store, "of", of)
    with running(what) as up:
        status, answer = up.complete("tenant-3", [3, 4], 3)
        assert (status, answer["error"]["message"]) == (500, "tenant 3: its file has gone")
        assert up.complete("tenant-2", [3, 4], 3)[0] == 200
        assert up.metric('requests_total{end="failed"}') == 1


def test_an_engine_that_fails_says_so_and_takes_nothing_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def step(self: Rows, tokens: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(Rows, "step", step)
    with running(served()) as up:
        status, answer = up.complete("tenant-3", [3, 4], 3)
        assert status == 500
        assert "no such kernel" in answer["error"]["message"]
        assert up.complete("tenant-3", [3, 4], 3)[0] == 503
        assert up.ask("/health")[0] == 503


def test_text_comes_in_whole_characters() -> None:
    class Bytes:
        def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
            return bytes(tokens).decode(errors="replace")

    words = Words(Bytes())
    tokens = list("aé日".encode())
    parts = [words.more([token], last=i == len(tokens) - 1) for i, token in enumerate(tokens)]
    assert parts == ["a", "", "é", "", "", "日"]


def test_the_command_serves_until_ctrl_c(tmp_path: Path) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    command = [sys.executable, "-m", "perfbench", "serve", str(file), "--port", "0", "--tenants", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("serving on "))
        up = Running(None, int(line.split("/v1")[0].rpartition(":")[2]))  # type: ignore[arg-type]
        assert up.complete("tenant-1", [3, 4], 3)[0] == 200
        assert up.complete("tenant-2", [3, 4], 3)[0] == 404
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    finally:
        process.kill()
        process.stderr.close()
        process.wait()
    assert rest == "1 answered, 1 refused, 0 failed, 0 cancelled\nperfbench: interrupted\n"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--method", "lore"], "--method: the scenario has no 'lore'; did you mean 'lora'?"),
        (["--port", "99999"], "expected a port from 0 to 65535"),
        (["--tenants", "0"], "expected an integer >= 1"),
        (["--host", "203.0.113.1", "--port", "0"], "--host 203.0.113.1 --port 0: can't be listened on"),
    ],
)
def test_what_can_t_be_served_is_one_line(
    more: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    try:
        code = main(["serve", str(file), *more])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    assert said in capsys.readouterr().err.splitlines()[-1]


def test_without_aiohttp_one_line_says_how_to_have_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perfbench.serving.extra.find_spec", lambda name: None)
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    target = 'target={openai: "http://127.0.0.1:1/v1"}'
    for command in (["serve", str(file)], ["traffic", str(file), "--out", str(tmp_path / "out"), "--set", target]):
        assert main(command) == 2
        assert "pip install 'adapter-perfbench[serve]'" in capsys.readouterr().err.splitlines()[-1]


def test_drawn_tokens_are_the_seeds(up: Running) -> None:
    def drawn(**more: Any) -> list[int]:
        status, found = up.complete("tenant-1", [3, 4, 5], 12, **more)
        assert status == 200
        tokens: list[int] = found["choices"][0]["token_ids"]
        return tokens

    greedy = drawn()
    assert drawn(temperature=None, seed=5) == drawn(temperature=1, seed=5), "1 is what OpenAI takes where none is said"
    assert drawn(temperature=2, seed=5) != drawn(temperature=2, seed=6)
    assert drawn(temperature=2, seed=5) != greedy
    assert drawn(temperature=2, top_p=1e-6, seed=5) == greedy, "of the likeliest alone"


@pytest.fixture(scope="module")
def chatting() -> Iterator[Running]:
    """A server with a word for each small letter, and a template."""
    letters = {"<unk>": 0, "<s>": 1, "</s>": 2, **{chr(97 + n): 3 + n for n in range(26)}, ":": 29, "|": 30}
    made = Tokenizer(models.WordLevel(letters, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", unk_token="<unk>")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
        "{{ m.role[0] }}:{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a:{% endif %}"
    )
    with running(replace(served(), tokenizer=tokenizer)) as found:
        yield found


CHAT = {"model": "tenant-2", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
SAID = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]


def test_a_chat_is_the_completion_of_its_template(chatting: Running) -> None:
    status, came = chatting.ask("/v1/chat/completions", {**CHAT, "messages": SAID})
    found = json.loads(came)
    assert (status, found["object"]) == (200, "chat.completion")
    (choice,) = found["choices"]
    _, plain = chatting.complete("tenant-2", list(chatting.server.served.tokenizer("s:be|u:hi|a:")["input_ids"]), 6)
    assert choice["message"] == {"role": "assistant", "content": plain["choices"][0]["text"]}
    assert found["usage"] == plain["usage"]
    assert found["usage"]["prompt_tokens"] == len("s:be|u:hi|a:")


def test_a_chat_is_streamed_in_deltas(chatting: Running) -> None:
    usage = {"include_usage": False, "continuous_usage_stats": True}
    body = {**CHAT, "messages": SAID, "stream": True, "max_completion_tokens": 4, "stream_options": usage}
    _, came = chatting.ask("/v1/chat/completions", body)
    events = [line.removeprefix("data: ") for line in came.decode().split("\n\n") if line]
    assert events.pop() == "[DONE]"
    chunks = [json.loads(event) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    whole = json.loads(chatting.ask("/v1/chat/completions", {**CHAT, "messages": SAID, "max_tokens": 4})[1])
    text = "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks)
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    counted = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counted == sorted(counted)
    assert counted[-1] == 4


@pytest.mark.parametrize(
    ("change", "field", "said"),
    [
        ({"messages": None}, "messages", "expected a list of messages, got null"),
        ({"messages": [{"role": "user"}]}, "messages.0", "expected an object of role and content"),
        (
            {"messages": [{"role": "tool", "content": "a"}]},
            "messages.0.role",
            "expected one of system, user, assistant",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "messages.0.content", "expected a text, got []"),
        ({"messages": [*SAID, SAID[0]]}, "messages", "the backbone's chat template refuses them (late)"),
        ({"messages": SAID, "prompt": "hi"}, "prompt", "unknown field"),
        ({"messages": SAID, "max_completion_tokens": 0}, "max_completion_tokens", "expected an integer >= 1, got 0"),
    ],
)
def test_a_chat_that_can_not_be_is_refused_by_its_field(
    chatting: Running, change: dict[str, Any], field: str, said: str
) -> None:
    status, came = chatting.ask("/v1/chat/completions", {**CHAT, **change})
    error = json.loads(came)["error"]
    assert (status, error["param"]) == (400, field)
    assert said in error["message"]


def test_a_backbone_without_words_has_no_chats(up: Running, chatting: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    body = {**CHAT, "messages": SAID}
    assert "no tokenizer; send a list of token ids" in up.ask("/v1/chat/completions", body)[1].decode()
    monkeypatch.setattr(chatting.server.served.tokenizer, "chat_template", None)
    assert "has no chat template; send a text" in chatting.ask("/v1/chat/completions", body)[1].decode()

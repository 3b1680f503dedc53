"""A server as the target, over real HTTP: its figures and their proof, and each fault of a server in one line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip("aiohttp", reason="needs aiohttp: install the extra `serve`")

from aiohttp import web

from perfbench.cli import main
from perfbench.errors import PerfbenchError, ScenarioError
from perfbench.serving.on_device.server import Server
from perfbench.spec.traffic import Target, Targets
from perfbench.traffic import outcome, traffic_run
from perfbench.traffic.on_device.load import Limit
from perfbench.traffic.on_device.over_http import KEY_VARIABLE, OverHttp
from perfbench.traffic.outcome import Answered
from perfbench.traffic.requests import Due
from tests.perfbench.serving.running import TENANTS, VALUES, Running, running, scenario, served


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(served()) as found:
        yield found


def run(tmp_path: Path, up: Running, **target: Any) -> tuple[int, dict[str, Any]]:
    """(exit code, what traffic.json holds) of a run against a server."""
    file, out = tmp_path / "tiny.yaml", tmp_path / "out"
    file.write_text(yaml.safe_dump({**VALUES, "target": {"openai": up.url, **target}}))
    code = main(["traffic", str(file), "--out", str(out)])
    return code, json.loads((out / "traffic.json").read_text()) if out.exists() else {}


def target(up: Running, **changes: Any) -> Target:
    values = {"base": "llama-tiny", "tenant": "tenant-{tenant}", "adapters": "scenario", "timeout_s": 30.0}
    return Target(**{"openai": up.url, **values, **changes})


DUE = [Due(0.005 * i, i % TENANTS, 4, 5) for i in range(20)]
TEXTS = [torch.arange(3, 7) for _ in DUE]


def test_a_run_over_http_is_measured_and_proved(
    up: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outcome, "MOST_LAG", 1.0)  # other tests may keep this machine busy
    code, found = run(tmp_path, up)
    assert code == 0
    for entry in found["arms"].values():
        assert (entry["status"], entry["proof"]["reason"], entry["proof"]["requests"]) == ("ok", None, 16)
        (point,) = entry["points"]
        assert (point["held"], point["failed"], point["figures"]["counted"]) == (True, None, 24)
        assert point["figures"]["loaded_share"] is None
        assert point["client_lag_ms"] >= 0
    assert found["scenario"]["target"]["openai"] == up.url
    lines = [json.loads(line) for line in (tmp_path / "out" / "measurements.jsonl").read_text().splitlines()]
    assert all(len(line["lag_ms"]) == line["sent"] and line["failed"] == [] for line in lines)
    shown = capsys.readouterr().out
    assert "a server over HTTP at" in shown
    assert "The client sent 99% of its requests at most" in " ".join(shown.split())
    assert main(["show", str(tmp_path / "out")]) == 0
    assert main(["traffic", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--resume"]) == 0


def test_another_tenant_s_adapter_is_found(tmp_path: Path) -> None:
    with running(served(shift=1)) as wrong:
        code, found = run(tmp_path, wrong)
    assert code == 1
    assert found["arms"]["none"]["status"] == "ok"
    assert found["arms"]["lora"]["status"] == "check_failed"
    assert "are not those of their adapters" in found["arms"]["lora"]["proof"]["reason"]


def test_adapters_that_nobody_knows_are_not_proved(
    up: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = run(tmp_path, up, adapters="unknown")
    assert code == 1
    assert found["arms"]["lora"]["status"] == "not_proved"
    assert "not proved" in capsys.readouterr().out


def test_where_nobody_answers_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = run(tmp_path, Running(None, 9))  # type: ignore[arg-type]
    assert (code, found) == (2, {})
    said = capsys.readouterr().err.splitlines()[-1]
    assert "target.openai: GET http://127.0.0.1:9/v1/models: nobody answers there" in said


def test_a_model_that_the_server_lacks_is_named(up: Running) -> None:
    due = [*DUE[:2], Due(0.0, TENANTS, 4, 5)]
    with pytest.raises(PerfbenchError, match=r"has no model 'tenant-5'; did you mean 'tenant-"):
        OverHttp(target(up), 256, bare=False).drive(due, TEXTS[:3], None)


def test_what_is_no_list_of_models_is_named(up: Running) -> None:
    with pytest.raises(PerfbenchError, match=r"GET http.*/wrong/models: status 404: Not Found"):
        OverHttp(target(up, openai=f"{up.url}/wrong"), 256, bare=False)


def test_a_measurement_that_can_t_hold_is_given_up_and_leaves_nothing_behind(up: Running) -> None:
    due = [Due(0.2 * i, 0, 4, 5) for i in range(200)]
    texts = [torch.arange(3, 7) for _ in due]
    driven = OverHttp(target(up), 256, bare=False).drive(due, texts, Limit(Targets(1e-6, 1e6, 0.9), misses=0))
    assert driven.given_up
    assert len(driven.requests) == len(driven.lag_ms or ()) < 200
    assert up.server.thread.open_requests == 0 or up.metric("rows_in_flight") <= 1


class Faulty(Server):
    """Every fifth answer is what `fault` makes of it."""

    fault: Callable[[web.Request], Any]
    every = 5
    seen = 0

    async def completions(self, http: web.Request) -> web.StreamResponse:
        self.seen += 1
        if self.seen % self.every == 0:
            found: web.StreamResponse = await type(self).fault(http)
            return found
        return await super().completions(http)


def _status(status: int) -> Callable[[web.Request], Any]:
    async def fault(http: web.Request) -> web.Response:
        return web.json_response({"error": {"message": f"too much {http.headers.get('Authorization')}"}}, status=status)

    return fault


def _stream(content: bytes) -> Callable[[web.Request], Any]:
    async def fault(http: web.Request) -> web.StreamResponse:
        out = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await out.prepare(http)
        await out.write(content)
        return out

    return fault


async def _never(http: web.Request) -> web.Response:
    await asyncio.sleep(60)
    return web.Response()


async def _hangs_up(http: web.Request) -> web.Response:
    assert http.transport is not None
    http.transport.close()
    return web.Response()


TOKEN = b'data: {"choices": [{"text": "", "token_ids": [5]}]}\n\n'
USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": %d}}\n\n'
DONE = b"data: [DONE]\n\n"
FAULTS = {
    "429": (_status(429), "status 429: too much"),
    "500": (_status(500), "status 500: too much"),
    "half a stream": (_stream(TOKEN * 2), "the stream ended after 2 of 5 tokens"),
    "no JSON": (_stream(b"data: {oops\n\n"), "a chunk of the stream is no JSON"),
    "no chunk": (_stream(b"data: 7\n\n"), "a chunk of the stream is no completion: 7"),
    "an error": (_stream(b'data: {"error": {"message": "out of memory"}}\n\n'), "in the stream: out of memory"),
    "no usage": (_stream(TOKEN * 5 + DONE), "no usage at the end of the stream"),
    "other count": (_stream(TOKEN * 4 + USAGE % 4 + DONE), "expected 5 new tokens, the server counted 4"),
    "fewer tokens": (_stream(TOKEN * 6 + USAGE % 5 + DONE), "expected 5 tokens, got 6 in the stream"),
    "no token": (_stream(TOKEN.replace(b"[5]", b"[256]")), "token_ids: expected ids from 0 to 255, got [256]"),
    "never": (_never, "no end of the answer within 1.5 s"),
    "hangs up": (_hangs_up, "model tenant-"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_of_a_server_is_a_failed_request_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, said = FAULTS[name]
    monkeypatch.setenv(KEY_VARIABLE, "se-cret")
    kind = type("Kind", (Faulty,), {"fault": staticmethod(fault)})
    with running(served(), kind) as faulty:
        slow = 1.5 if name == "never" else 30.0
        driven = OverHttp(target(faulty, timeout_s=slow), 256, bare=False).drive(DUE, TEXTS, None)
    assert len(driven.failures) == 4
    for place, why in driven.failures.items():
        assert why.startswith(f"model tenant-{DUE[place].tenant}: ")
        assert said in why
        assert "se-cret" not in why
        assert "\n" not in why
    whole = [request for place, request in enumerate(driven.requests) if place not in driven.failures]
    assert all(len(request.tokens) == len(request.token_s) == 5 for request in whole)


def test_a_run_with_failed_requests_never_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kind = type("Kind", (Faulty,), {"fault": staticmethod(_status(500)), "every": 9})
    with running(served(), kind) as faulty:
        code, found = run(tmp_path, faulty)
    assert code == 1
    for entry in found["arms"].values():
        (point,) = entry["points"]
        assert point["held"] is False
        assert point["figures"]["kept_share"] < 1
        assert 3 <= point["failed"]["requests"] <= 4
    said = " ".join(capsys.readouterr().out.split())
    assert "requests failed, the first so: model" in said
    assert "The targets were missed by" in said
    changed = {**found, "arms": {**found["arms"]}}
    changed["arms"]["lora"]["points"][0]["held"] = True
    changed["arms"]["lora"]["status"] = "ok"
    (tmp_path / "out" / "traffic.json").write_text(json.dumps(changed))
    assert main(["show", str(tmp_path / "out")]) == 2
    assert "points.0.held: expected false where requests failed" in capsys.readouterr().err


def test_a_server_that_fails_most_requests_ends_the_arm(tmp_path: Path) -> None:
    kind = type("Kind", (Faulty,), {"fault": staticmethod(_status(500)), "every": 1})
    with running(served(), kind) as faulty:
        code, found = run(tmp_path, faulty)
    assert code == 4
    for entry in found["arms"].values():
        assert entry["status"] == "crashed"
        assert "6 of 6 requests failed, the first so: model" in entry["reason"]


def test_failed_requests_count_in_the_share() -> None:
    answered = [Answered(float(i), 0, 1.0, 1.0, 2.0, (1.0,), None) for i in range(20)]
    targets = Targets(10, 10, 0.5)
    assert outcome.kept_share(answered, targets, 4) == 16 / 20
    assert outcome.held(answered, targets)
    assert not outcome.held(answered, targets, 1)
    assert outcome.figures([answered], targets, 4)["kept_share"] == 16 / 20


def test_a_client_that_was_late_voids_the_arm(
    up: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_run.outcome, "MOST_LAG", 1e-12)
    code, found = run(tmp_path, up)
    assert code == 1
    assert found["arms"]["lora"]["status"] == "check_void"
    assert "ms late" in found["arms"]["lora"]["reason"]


@pytest.mark.parametrize(
    ("given", "methods", "said"),
    [
        ({}, ["lora"], "target.openai: is missing"),
        ({"openai": "localhost:8000"}, ["lora"], "target.openai: expected an address such as http://127.0.0.1:8000/v1"),
        ({"openai": "http://me:word@host/v1"}, ["lora"], "target.openai: expected an address"),
        ({"openai": "http://a/v1", "model": {}}, ["lora"], "did you mean 'models'?"),
        (
            {"openai": "http://a/v1", "models": {"tenant": "x"}},
            ["lora"],
            "target.models.tenant: expected a name in which",
        ),
        ({"openai": "http://a/v1", "adapters": "mine"}, ["lora"], "target.adapters"),
        ({"openai": "http://a/v1", "timeout_s": 0}, ["lora"], "target.timeout_s"),
        ({"openai": "http://a/v1"}, ["lora", "para"], "methods: expected one, as a server has one adapter under each"),
    ],
)
def test_a_target_that_can_t_be_is_refused(given: dict[str, Any], methods: list[str], said: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        scenario(target=given, methods=methods)
    assert said in str(refused.value)
    assert "word" not in str(refused.value)

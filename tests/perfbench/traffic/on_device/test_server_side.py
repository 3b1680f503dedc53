"""Two servers as the sides of `perfbench ab`: over real HTTP, our own server standing for any."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("aiohttp", reason="needs aiohttp: install the extra `serve`")

from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.figures.metrics import contradiction
from perfbench.gate import protocol
from perfbench.traffic.on_device import server_side
from perfbench.traffic.on_device.traffic_worker import TargetFailedError
from tests.perfbench.serving.running import VALUES, Running, running, served

CLOSED = {"prompt_tokens": 6, "new_tokens": 5, "tenants": 5, "arrivals": "closed", "in_flight": [2, 4], "requests": 20}
WAVES = [f"http/t5/in-flight-{count}/{arm}" for arm in ("none", "lora") for count in (2, 4)]


@pytest.fixture(scope="module")
def up() -> Iterator[Running]:
    with running(served()) as found:
        yield found


def file_of(folder: Path, **changes: Any) -> Path:
    """The scenario; `target` says only what the models are called, as the sides say where they are."""
    target = {"openai": "http://127.0.0.1:1/v1", "models": {"base": "llama-tiny"}}
    file = folder / "servers.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "traffic": CLOSED, "target": target, **changes}))
    return file


def said(monkeypatch: pytest.MonkeyPatch, url: str, file: Path, *turns: Any, **job: Any) -> list[dict[str, Any]]:
    """The events of a side that gets a job and turns, each found to be one of the protocol."""
    asked = {"scenario": str(file), "set": [], "only": None, "threads": 1, "prepare": False, **job}
    events: list[dict[str, Any]] = []
    monkeypatch.setattr(sys, "argv", ["server_side", url])
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(json.dumps(line) + "\n" for line in (asked, *turns))))
    server_side._serve(
        lambda event, **fields: events.append(protocol.event_of(json.dumps({"event": event, **fields}).encode()))
    )
    return events


def test_a_side_is_proved_and_then_timed(up: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(tmp_path)
    cases = [one for one in said(monkeypatch, up.url, file, prepare=True) if one["event"] == "case"]
    assert [(one["case"], one["status"], one["check"]) for one in cases] == [
        (wave, "ok", {"passed": True}) for wave in WAVES
    ]
    turn = {"case": WAVES[-1], "repetitions": 2}
    events = said(monkeypatch, up.url, file, turn, only=[WAVES[-1]])
    (ready,) = [one for one in events if one["event"] == "ready"]
    assert ready["cases"] == [WAVES[-1]]
    (block,) = [one for one in events if one["event"] == "block"]
    assert [contradiction(sample, 4, 5) for sample in block["samples"]] == [None, None]
    assert all(len(sample["itl_ms"]) == 4 for sample in block["samples"])


def test_no_prompt_is_sent_twice(up: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that keeps prefixes would answer the second process of the baseline from them."""
    sent: list[Any] = []
    real = server_side.load.prompts
    monkeypatch.setattr(server_side.load, "prompts", lambda *given: sent.extend(real(*given)) or sent[-len(given[0]) :])
    for _ in range(2):
        said(monkeypatch, up.url, file_of(tmp_path), {"case": WAVES[0], "repetitions": 2}, only=[WAVES[0]])
    assert (
        len({tuple(prompt.tolist()) for prompt in sent})
        == len(sent)
        == 2 * 2 * (1 + server_side.UNTIMED_WAVES) * (server_side.WARM_WAVES + 2)
    )


def test_a_server_that_answers_with_other_adapters_fails(
    up: Running, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(served(shift=1)) as wrong:
        sides = ["--baseline", up.url, "--candidate", wrong.url]
        code = main(["ab", *sides, str(file_of(tmp_path)), "--out", str(tmp_path / "out")])
    shown = capsys.readouterr()
    assert code == 1, shown
    assert "4 of 4 answers are not those of their adapters" in shown.out
    assert not (tmp_path / "out" / "pairs.jsonl").exists(), "nothing was timed"


def test_unproved_answers_are_told(up: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the file says that the adapters are others nothing is compared, and the finding says so."""
    other = {"openai": "http://127.0.0.1:1/v1", "models": {"base": "llama-tiny"}, "adapters": "unknown"}
    cases = [one for one in said(monkeypatch, up.url, file_of(tmp_path, target=other), prepare=True) if "status" in one]
    assert {(one["status"], one["reason"][:15]) for one in cases} == {("ok", "target.adapters")}


def test_a_request_that_fails_ends_the_side(up: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = server_side.Asked.wave
    monkeypatch.setattr(server_side, "WARM_WAVES", 1)

    def broken(self: Any, wave: Any) -> Any:
        self.vocabulary *= 100  # tokens that no model has
        return real(self, wave)

    monkeypatch.setattr(server_side.Asked, "wave", broken)
    with pytest.raises(TargetFailedError, match=r"of 2 requests failed: model .*token"):
        said(monkeypatch, up.url, file_of(tmp_path), only=[WAVES[2]])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"traffic": {**VALUES["traffic"], "new_tokens": 5}}, "traffic.arrivals: expected closed, .* got poisson"),
        ({"traffic": {**CLOSED, "new_tokens": {"median": 5, "sigma": 1, "most": 9}}}, "got a distribution"),
        ({"traffic": {**CLOSED, "new_tokens": 1}}, "expected one number of at least 2, .* got 1"),
    ],
)
def test_what_makes_no_waves(
    changes: dict[str, Any], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PerfbenchError, match=expected):
        said(monkeypatch, "http://127.0.0.1:1/v1", file_of(tmp_path, **changes))


def test_nobody_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sides = ["--baseline", "http://127.0.0.1:1/v1", "--candidate", "http://127.0.0.1:2/v1"]
    assert main(["ab", *sides, str(file_of(tmp_path)), "--out", str(tmp_path / "out")]) == 2
    url = "http://127.0.0.1:1/v1"
    assert f"INVALID INPUT: {url}: target.openai: GET {url}/models: nobody answers" in capsys.readouterr().out

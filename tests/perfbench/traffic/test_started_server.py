"""A server that is started by the scenario's command: the real one, and those that do not come up."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("aiohttp", reason="needs aiohttp: install the extra `serve`")

from perfbench.cli import main
from tests.perfbench.serving.running import TENANTS, VALUES, running, served


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        found: int = one.getsockname()[1]
        return found


def write(folder: Path, port: int, command: list[str], **target: Any) -> Path:
    file = folder / "started.yaml"
    traffic = {**VALUES["traffic"], "new_tokens": 5, "requests": 20}
    del traffic["rate"]
    traffic |= {"arrivals": "closed", "in_flight": 3, "tenant_mix": "in-turn"}
    own = {"openai": f"http://127.0.0.1:{port}/v1", "command": command, **target}
    file.write_text(yaml.safe_dump({**VALUES, "traffic": traffic, "target": own}))
    return file


def test_our_own_server_is_started_driven_proved_and_ended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = free_port()
    own = tmp_path / "own.yaml"
    own.write_text(yaml.safe_dump(VALUES))
    command = [sys.executable, "-m", "perfbench", "serve", str(own), "--port", str(port), "--tenants", str(TENANTS)]
    file, out = write(tmp_path, port, command), tmp_path / "out"
    assert main(["traffic", str(file), "--out", str(out)]) == 0
    found = json.loads((out / "traffic.json").read_text())
    assert {entry["status"] for entry in found["arms"].values()} == {"ok"}
    assert found["scenario"]["target"]["command"] == command
    assert "serving on http://127.0.0.1" in (out / "server.log").read_text()
    assert "3 requests in flight" in " ".join(capsys.readouterr().out.split())
    with socket.socket() as gone:
        assert gone.connect_ex(("127.0.0.1", port)) != 0, "the server ended with the run"


def refused(file: Path, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["traffic", str(file), "--out", str(out)]) == 2
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["/no/such/program"], "target.command: /no/such/program: can't be run (No such file or directory)"),
        ([sys.executable, "-c", "print('no weights here'); raise SystemExit(3)"], "ended with code 3: no weights here"),
    ],
)
def test_a_server_that_does_not_start_is_named(
    command: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert says in refused(write(tmp_path, free_port(), command), tmp_path / "out", capsys)


def test_a_server_that_is_never_ready_is_ended_with_what_it_started(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(321)'])"
    file = write(tmp_path, free_port(), [sys.executable, "-c", script], ready_s=1)
    assert "is not ready after 1 s (target.ready_s): it printed nothing" in refused(file, tmp_path / "out", capsys)
    wait_until(lambda: "time.sleep(321)" not in subprocess.run(["ps", "ax"], capture_output=True, text=True).stdout)


def wait_until(holds: Callable[[], bool]) -> None:
    for _ in range(50):
        if holds():
            return
        time.sleep(0.1)
    raise AssertionError("a process is still there")


def test_whoever_answers_there_already_is_not_taken_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(served()) as up:
        said = refused(write(tmp_path, up.port, [sys.executable, "-c", "pass"]), tmp_path / "out", capsys)
    assert "somebody answers at" in said

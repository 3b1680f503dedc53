"""One writer for a run: the second is told who writes, and a lock that outlived its process stops nobody."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from perfbench.cli import main
from perfbench.errors import RunDirectoryError
from perfbench.files import run_lock
from perfbench.files.run_lock import LOCK, held
from perfbench.run_folder.run_directory import MANIFEST

HOLD = """
import sys
from pathlib import Path
from perfbench.files.run_lock import held
with held(Path(sys.argv[1]), resume=False):
    print("held", flush=True)
    sys.stdin.readline()
"""
SCENARIO = "backbone: llama-tiny\ndtype: fp32\ndevice: cpu\nmethods: [lora]\n"
SCENARIO += "workload: {prompt_tokens: 4, new_tokens: 2, requests: 2, tenants: 1}\n"


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The folder, locked by another process."""
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], **pipes) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def owner(**fields: Any) -> str:
    me = psutil.Process()
    return json.dumps(
        {"pid": me.ppid(), "host": socket.gethostname(), "process_started_at": psutil.Process(me.ppid()).create_time()}
        | fields
    )


def test_a_lock_says_who_holds_it_and_goes_with_them(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "new"
    with held(folder, resume=False):
        content = json.loads((folder / LOCK).read_text())
        assert content["pid"] == os.getpid()
        assert content["host"] == socket.gethostname()
        (folder / "mine").touch()
    assert [entry.name for entry in folder.iterdir()] == ["mine"]


def test_what_stays_empty_is_taken_away_again(tmp_path: Path) -> None:
    with held(tmp_path / "runs" / "new", resume=False):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_told_of_the_first(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "run") as process:
        for resume in (True, False):
            with (
                pytest.raises(RunDirectoryError, match=f"is writing this run .process {process.pid} on"),
                held(tmp_path / "run", resume=resume),
            ):
                pass
        assert (tmp_path / "run" / LOCK).exists(), "the holder's lock stays"


def test_a_lock_of_a_process_that_was_killed_stops_nobody(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "run") as process:
        process.kill()
        process.wait()
        assert (tmp_path / "run" / LOCK).exists()
        with held(tmp_path / "run", resume=True):
            assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run" / LOCK).exists()


@pytest.mark.parametrize("system_locks", [True, False])
@pytest.mark.parametrize(
    ("content", "stale"),
    [
        (owner(), False),
        (owner(process_started_at=1.0), True),
        (owner(pid=2**22 + 1), True),
        (owner(pid=2**40), True),
        (owner(host="another-machine"), False),
        (owner(pid=os.getpid()), True),
        ("", True),
        ('{"pid": 1', True),
        ('{"pid": "x", "host": 3}', True),
    ],
    ids=["alive", "another-start", "no-such-pid", "no-pid", "another-host", "ourselves", "empty", "torn", "not-ours"],
)
def test_which_locks_are_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, stale: bool, system_locks: bool
) -> None:
    if not system_locks:
        monkeypatch.setattr(run_lock, "fcntl", None)
    (tmp_path / LOCK).write_text(content)
    if stale:
        with held(tmp_path, resume=True):
            assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
        return
    with pytest.raises(RunDirectoryError, match="another perfbench is writing") as refused, held(tmp_path, resume=True):
        pass
    assert ("delete" in str(refused.value)) == ("another-machine" in content)
    assert (tmp_path / LOCK).read_text() == content


def test_a_folder_that_can_not_be_made_is_left_to_the_writer(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with held(tmp_path / "file" / "run", resume=False):
        pass
    with held(tmp_path / "gone", resume=True):
        assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("command", ["run", "finetune", "accuracy", "search", "verify"])
def test_every_command_that_writes_a_run_takes_the_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    scenarios = Path(__file__).parents[3] / "scenarios"
    (tmp_path / "run.yaml").write_text(SCENARIO)
    words = {
        "run": ["run", str(tmp_path / "run.yaml")],
        "finetune": ["finetune", str(next(scenarios.glob("finetune/*.yaml")))],
        "accuracy": ["accuracy", str(scenarios / "accuracy" / "cpu.yaml")],
        "search": ["fanlora", "search", str(next(scenarios.glob("fanlora/*cpu.yaml")))],
        "verify": ["verify", "--section", "kernels"],
    }[command]
    out = tmp_path / "out"
    with held_elsewhere(out) as process:
        for resume in ([], ["--resume"]):
            assert main([*words, "--out", str(out), *resume]) == 2
            last = capsys.readouterr().err.splitlines()[-1]
            assert last.startswith(f"perfbench: {out}: another perfbench is writing this run (process {process.pid} on")
    assert not (out / MANIFEST).exists()

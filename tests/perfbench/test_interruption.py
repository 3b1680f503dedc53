"""SIGTERM and SIGHUP end a command as Ctrl-C does, and what a kill leaves in the temporary folder is swept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

if sys.platform == "win32":
    pytest.skip("SIGHUP, and signals that a program may catch, are POSIX's", allow_module_level=True)

from perfbench import interruption
from perfbench.files.run_lock import LOCK
from perfbench.files.scratch import PREFIX, Scratch, is_stale, sweep
from perfbench.measure.children import FRESH, Child

SCENARIO = "backbone: llama-tiny\ndtype: fp32\ndevice: cpu\nmethods: [lora]\nwarmup: 1\nrepetitions: 100000\n"
SCENARIO += "workload: {prompt_tokens: 4, new_tokens: 8, requests: 2, tenants: 2}\n"
HOLD = """
import sys
from perfbench.files.scratch import Scratch
scratch = Scratch()
(scratch.path / "large").write_bytes(b"x" * 4096)
print(scratch.path, flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A temporary folder of the test's own, for this process and its children."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr("tempfile.tempdir", None)
    return folder.resolve()


@contextmanager
def process(*command: str, **options: Any) -> Iterator[subprocess.Popen[str]]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, *command], **{**pipes, **options}) as started:
        try:
            yield started
        finally:
            started.kill()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_is_an_interrupt_once_and_then_as_before(name: str) -> None:
    number = getattr(signal, name)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup the tests begin with SIGHUP ignored

    def ended() -> None:
        with interruption.as_ctrl_c():
            try:
                os.kill(os.getpid(), number)
                time.sleep(10)
            finally:
                os.kill(os.getpid(), number)  # a second, while what the first began is cleared up

    try:
        with pytest.raises(KeyboardInterrupt):
            ended()
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_what_was_ignored_stays_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with interruption.as_ctrl_c():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_of_the_main_thread_nothing_is_changed() -> None:
    found = []

    def look() -> None:
        with interruption.as_ctrl_c():
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.SIG_DFL]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_run_that_is_ended_says_how_to_go_on_and_leaves_nothing(
    tmp_path: Path, temporary: Path, number: signal.Signals
) -> None:
    scenario, out = tmp_path / "x.yaml", tmp_path / "out"
    scenario.write_text(SCENARIO)
    command = ["-m", "perfbench", "run", str(scenario), "--out", str(out), "--set", "repetitions=100000"]
    with process(*command, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)) as run:
        until(lambda: (out / "samples.jsonl").exists() or run.poll() is not None)
        children = psutil.Process(run.pid).children(recursive=True)
        assert children
        assert any(entry.name.startswith(PREFIX) for entry in temporary.iterdir())
        run.send_signal(number)
        _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert f"go on with: perfbench run {scenario}" in said
    assert "Traceback" not in said
    assert not psutil.wait_procs(children, timeout=20)[1]
    assert not (out / LOCK).exists()
    assert [entry for entry in temporary.iterdir() if entry.name.startswith(PREFIX)] == []


def until(true: Any) -> None:
    end = time.monotonic() + 120
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_child_has_a_temporary_folder_that_goes_with_it(tmp_path: Path, temporary: Path) -> None:
    child = Child(FRESH, tmp_path / "log")
    (folder,) = temporary.iterdir()
    assert folder.name.startswith(PREFIX)
    (folder / "adapters").mkdir()
    (folder / "adapters" / "large").touch()
    child.end()
    child.end()
    assert list(temporary.iterdir()) == []


def test_scratch_of_the_dead_is_swept_and_that_of_the_living_stays(temporary: Path) -> None:
    with process("-c", HOLD) as living, process("-c", HOLD) as dead:
        assert living.stdout is not None
        assert dead.stdout is not None
        stays, goes = (Path(one.stdout.readline().strip()) for one in (living, dead) if one.stdout)
        dead.kill()
        dead.wait()
        others = temporary / f"{PREFIX}link"
        others.symlink_to(stays)
        young = temporary / f"{PREFIX}young"
        young.mkdir()
        (temporary / "others").mkdir()
        assert is_stale(goes)
        assert sweep() == [goes]
        assert sorted(temporary.iterdir()) == sorted([stays, others, young, temporary / "others"])
        os.utime(young, (0, 0))
        assert sweep() == [young]
        with Scratch() as mine:
            assert sweep() == []
            assert mine.environment()["TMPDIR"] == str(mine.path)
    assert sweep() == [stays]

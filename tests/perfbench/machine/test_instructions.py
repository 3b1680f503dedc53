"""Counts of instructions: the processor's counter with a pretended kernel, and callgrind for real where it is."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from perfbench.errors import PerfbenchError
from perfbench.machine import instructions
from tests.perfbench.gate.runs import ROOT

needs_valgrind = pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed")


def pretended(monkeypatch: pytest.MonkeyPatch, *readings: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """A kernel whose counter is read so: (instructions, ns enabled, ns running); and the attributes that it is asked
    with, one tuple for each."""
    asked: list[tuple[int, ...]] = []

    def opened(attributes: bytes) -> int:
        asked.append(struct.unpack("IIQQQQQIIQ", attributes))
        end, other = os.pipe()
        with os.fdopen(other, "wb") as pipe:
            pipe.write(b"".join(struct.pack("QQQ", *one) for one in readings))
        return end

    monkeypatch.setattr(instructions, "_perf_event_open", opened)
    return asked


def test_the_counter_counts_what_a_call_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = pretended(monkeypatch, (100, 10, 10), (1350, 20, 20), (2000, 30, 30), (2001, 40, 40))
    counter = instructions.Perf()
    found = []
    for _ in range(2):
        counter.start()
        found.append(counter.stop())
    assert found == [1250, 1]
    ((kind, size, config, period, _, read_format, flags, *_),) = asked
    assert (kind, size, config, period, read_format) == (0, 64, 1, 0, 3)
    assert flags == 0b1100000, "of this thread, in user space, from now on"


def test_a_counter_that_was_shared_with_others_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pretended(monkeypatch, (0, 10, 10), (1000, 30, 20))
    counter = instructions.Perf()
    counter.start()
    with pytest.raises(PerfbenchError, match="taken away for a while; stop other profilers"):
        counter.stop()


def test_what_the_kernel_says_here() -> None:
    """The real system call, where it is answered."""
    try:
        counter = instructions.Perf()
    except OSError as error:
        pytest.skip(f"no counter here: {error.strerror}")
    counter.start()
    sum(range(10_000))
    assert counter.stop() > 10_000


@pytest.mark.parametrize("valgrind", [True, False])
def test_which_counter_a_machine_has(monkeypatch: pytest.MonkeyPatch, valgrind: bool) -> None:
    pretended(monkeypatch)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/valgrind" if valgrind else None)
    monkeypatch.setattr(instructions, "_MACHINE", "x86_64")
    assert instructions.counter() == "perf"

    def refused(_: bytes) -> int:
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(instructions, "_perf_event_open", refused)
    if valgrind:
        assert instructions.counter() == "callgrind"
        monkeypatch.setattr(instructions, "_MACHINE", "riscv64")
    with pytest.raises(PerfbenchError, match=r"\(Permission denied\).*perf_event_paranoid.*install valgrind") as error:
        instructions.counter()
    assert "\n" not in str(error.value)


def test_another_system_has_no_counter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instructions, "_MACHINE", "riscv64")
    with pytest.raises(OSError, match="not known on"):
        instructions.Perf()
    with pytest.raises(OSError, match="does not run under valgrind"):
        instructions.Callgrind()


def test_without_valgrind_a_request_does_nothing() -> None:
    with pytest.raises(OSError, match="this process does not run under valgrind"):
        instructions.Callgrind()


@needs_valgrind
def test_callgrind_counts_what_a_call_adds(tmp_path: Path) -> None:
    """Loops of one, two and three times ten thousand turns: as far apart as each other, to the hundredth."""
    program = (
        "from perfbench.machine.instructions import Callgrind\n"
        "def counted(turns):\n"
        "    counter.start()\n"
        "    for _ in range(turns): pass\n"
        "    return counter.stop()\n"
        "counter = Callgrind()\n"
        "counted(10_000)  # which Python then has specialised\n"
        "print([counted(turns) for turns in (10_000, 20_000, 30_000)])\n"
    )
    done = subprocess.run(
        [*instructions.under("callgrind"), sys.executable, "-P", "-c", program],
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    one, two, three = map(int, done.stdout.strip(" []\n").split(", "))
    assert two - one > 10_000
    assert three - two == pytest.approx(two - one, rel=0.01)
    assert [file.name for file in tmp_path.iterdir() if file.name != "callgrind.out"] == [], "the counts are taken away"

"""The sections in child processes: one process for several, as long as all goes well in it. Free of torch.

Starting a process takes as long as a short section (16 s on a GPU machine), so that sections share one. After a section
in which anything failed, died or hung, the next one has a new process: an error on a GPU stays in its process for good.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress

from perfbench.verify.verify_report import FAIL, Finding
from perfbench.verify.worker import DONE

# Starts a child; the device kind follows.
COMMAND = (sys.executable, "-m", "perfbench.verify.worker")
# What a child did not come to.
THE_REST = "the rest"
AGAIN = "go on with --resume"


class SectionProcess:
    """One child; what its libraries say goes to a file of its own."""

    def __init__(self, device: str, *, interpreted: bool):
        self.interpreted = interpreted
        self.last_words = ""  # the last line of the log, once it has ended
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        variables = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if interpreted else {})
        self._process = subprocess.Popen(
            [*COMMAND, device],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=variables,
        )  # fmt: skip

    def ask(self, section: str) -> Iterator[Finding | None]:
        """The findings of a section, and None when it is done; without the None, it died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(section.encode() + b"\n")
            self._process.stdin.flush()
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return  # a child that is killed may leave half a line
            said = json.loads(line)
            if DONE in said:
                yield None
                return
            yield Finding(**said)

    def kill(self) -> None:
        """Ends it, from any thread."""
        self._process.kill()

    def end(self, *, kill: bool = True) -> int:
        """Its exit code, when it has ended; kill False: it is about to end by itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            code = self._process.wait(0.0 if kill else 5.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        self._process.stdout.close()
        self._log.seek(0)
        self.last_words = (self._log.read().decode(errors="replace").strip().splitlines() or ["no word"])[-1]
        self._log.close()
        return code


class Sections:
    """Runs sections on a device, one after the other. To be closed at the end.

    ahead: so many processes are begun at once, and load their libraries until they are needed.
    """

    def __init__(self, device: str, *, ahead: int = 0):
        self._device = device
        self._process: SectionProcess | None = None
        self._ahead = [SectionProcess(device, interpreted=False) for _ in range(ahead)]

    def findings(self, section: str, seconds: float, late: Finding) -> Iterator[Finding]:
        """What a section finds; `late` where it is not done after `seconds`. One that dies is a finding too."""
        process = self._process_for(section)
        self._process = None  # until it has shown that it is fit for another section
        too_late = threading.Event()

        def give_up() -> None:
            too_late.set()
            process.kill()

        alarm = threading.Timer(seconds, give_up)
        alarm.start()
        done = failed = died = False
        try:
            for finding in process.ask(section):
                done = finding is None
                if finding is not None:
                    failed = failed or finding.status == FAIL
                    yield finding
            died = not done
        finally:
            alarm.cancel()
            if done and not failed and not too_late.is_set():
                self._process = process
            else:
                code = process.end(kill=not died)
        if died:
            why = f"the child process ended with {code}: {process.last_words}"
            yield late if too_late.is_set() else Finding(THE_REST, FAIL, why)

    def close(self) -> None:
        """Ends the process of the last section: nothing of it stays beside what is measured next."""
        if self._process is not None:
            self._process.end()
            self._process = None

    def close_all(self) -> None:
        """Ends those that were begun ahead too."""
        self.close()
        while self._ahead:
            self._ahead.pop().end()

    def _process_for(self, section: str) -> SectionProcess:
        """The one that is there, where it is fit for the section; else one that was begun ahead, else a new one."""
        interpreted = section == "kernels" and self._device == "cpu"
        if self._process is not None and self._process.interpreted != interpreted:
            self.close()
        if self._process is None and self._ahead and not interpreted:
            self._process = self._ahead.pop()
        return self._process or SectionProcess(self._device, interpreted=interpreted)

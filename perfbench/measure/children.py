"""The child processes that measure: a fresh one for each job, or one that is kept and holds its backbone.

Free of torch. A child takes a job, one line of JSON, and answers with events, one line of JSON each, until `done`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from perfbench.files.scratch import Scratch
from perfbench.run_folder.run_directory import RunDirectory

WORKER_LOG = "worker.log"
FRESH, KEPT = "perfbench.measure.on_device.worker", "perfbench.measure.on_device.kept_worker"


class NodeLost(Exception):
    """The machine of a child, or what started it there, ended in the middle of a job, which may run again elsewhere."""


class Child:
    """One process; what its libraries say goes to `log`."""

    def __init__(self, module: str, log: Path):
        self.log = log
        self.jobs = 0
        self.numbers: dict[Path, int] = {}  # run directory -> which of its processes this one is
        self._scratch = Scratch()
        try:
            with log.open("ab") as said:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", module],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=said,
                    env=self._scratch.environment(),
                )
        except BaseException:
            self._scratch.remove()
            raise

    def events(self, job: dict[str, Any], *, last: bool) -> Iterator[dict[str, Any]]:
        """What it says to a job, `done` included; fewer where it dies. last: no other job follows."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self.jobs += 1
        # A child that is dead already breaks the pipe: how it ended is told by `end`.
        with suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(job).encode() + b"\n")
            self._process.stdin.flush()
        if last:
            self._close_input()
        for line in self._process.stdout:
            if not line.endswith(b"\n"):
                return  # it died while writing
            event = json.loads(line)
            done = event["event"] == "done"
            yield event
            if done:
                return

    def wait(self) -> None:
        """Until it has ended by itself."""
        self._process.wait()

    def end(self) -> int:
        """Ends it if it still lives, and removes what it has left in its temporary folder. Its exit code."""
        self._process.kill()
        code = self._process.wait()
        self._close_input()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._scratch.remove()
        return code

    def _close_input(self) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()


class Children:
    """Where a supervisor gets its children from.

    kept_log: None for a fresh child for each job, which is what `perfbench run` does; or the log of one child that
    stays for the jobs that follow, so that its backbone is loaded once. To be closed at the end.
    at_once: how many jobs may be under way.
    """

    at_once = 1

    def stop(self) -> None:
        """Ends those under way, where that are several: each supervisor ends its own."""

    def __init__(self, kept_log: Path | None = None):
        self._kept_log = kept_log
        self._waiting: Child | None = None

    @property
    def keeps(self) -> bool:
        """Whether a child stays when its job is done."""
        return self._kept_log is not None

    def start(self) -> None:
        """Begins a kept child ahead of its first job, so that it loads its libraries meanwhile."""
        if self._kept_log is not None and self._waiting is None:
            self._kept_log.parent.mkdir(parents=True, exist_ok=True)
            self._waiting = Child(KEPT, self._kept_log)

    def take(self, directory: RunDirectory) -> tuple[Child, int]:
        """A child for one job of `directory`, and its number among the processes of that run."""
        self.start()
        child = self._waiting or Child(FRESH, directory.path / WORKER_LOG)
        self._waiting = None
        if directory.path not in child.numbers:
            child.numbers[directory.path] = directory.manifest["processes"]
            directory.manifest["processes"] += 1
            directory.write_manifest()
        return child, child.numbers[directory.path]

    def give_back(self, child: Child) -> None:
        """After a job that came to its end."""
        if self.keeps:
            self._waiting = child
        else:
            child.wait()
            child.end()

    def close(self) -> None:
        """Ends the child that waits for another job, if there is one."""
        if self._waiting is not None:
            self._waiting.end()
            self._waiting = None

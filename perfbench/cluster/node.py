"""What runs on a node of the cluster: one child process that measures, its events handed on as it says them.

Free of torch. Ray calls `measure` on a node that has what the job needs; everything that it says goes home, to the
process that was started by the user and alone writes the run directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from perfbench.cluster import shared_paths
from perfbench.errors import PerfbenchError
from perfbench.files.scratch import Scratch
from perfbench.machine import environment

# Kinds of events that are not the child's own.
MACHINE, ENDED = "machine", "ended"
# Not a child's own temporary folder, which TMPDIR names.
LOCKS = Path("/tmp" if os.name == "posix" else tempfile.gettempdir())
PACKAGE = Path(__file__).parents[1]
_BETWEEN_TRIES_S = 0.2
_LOG_BYTES = 20_000


def measure_checked(
    module: str, job: Mapping[str, Any], device: str, variables: Mapping[str, str], expected: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """As `measure`, where this node has what is `expected`: the hash of the `code`, the `versions` of packages, and
    the `shared` paths with their hashes. PerfbenchError names what is other here."""
    installed = environment.versions()
    for package, version in expected["versions"].items():
        if installed.get(package) != version:
            raise PerfbenchError(
                f"a node has {package} {installed.get(package)}, and here it is {version}; install the same there"
            )
    if code() != expected["code"]:
        raise PerfbenchError("a node has other code of perfbench than this command; install the same there")
    if (what := shared_paths.unlike(expected["shared"])) is not None:
        raise PerfbenchError(f"a node does not see the same files: {what}; give a path that all nodes share")
    yield from measure(module, job, device, variables)


def measure(module: str, job: Mapping[str, Any], device: str, variables: Mapping[str, str]) -> Iterator[dict[str, Any]]:
    """Starts `module` as a child process on this node, gives it the job, and yields its events.

    The first event describes the node, the last one says how the child ended and what its libraries printed last.
    Nothing else is timed on this host meanwhile, whatever Ray thinks of it. `device`: "cpu" or "cuda"; `variables`:
    what is set where the user started the command.
    """
    yield {"event": MACHINE, "environment": environment.collect(device, environment.threads())}
    with Scratch() as scratch, tempfile.TemporaryFile() as log:
        waits = Turn(device)
        while not waits.taken():
            yield {"event": "phase", "case": None, "text": "waiting: something else is timed on that host"}
            waits.wait()
        with waits:
            child = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_variables(scratch.environment(), variables),
            )
            try:
                yield from _events(child, {**job, "threads": environment.threads()})
            finally:
                child.kill()
                ended = child.wait()
                if child.stdout is not None:
                    child.stdout.close()
        yield {"event": ENDED, "code": ended, "log": _last_words(log)}


def code() -> str:
    """A hash of the perfbench that runs here: of every Python file of it, methods and kernels too."""
    found = hashlib.sha256()
    for folder in (PACKAGE, PACKAGE / "methods", PACKAGE / "kernels"):
        for file in sorted(folder.resolve().rglob("*.py")):
            found.update(file.relative_to(folder.resolve()).as_posix().encode() + b"\0" + file.read_bytes())
    return found.hexdigest()


class Turn:
    """The right to time on this host: a lock on a file in the temporary folder that all of its nodes share.

    It names the host by its boot id, since two nodes may be one host, and the devices: the whole host for a CPU, for
    GPUs those that Ray gave this task.
    """

    def __init__(self, device: str):
        own = os.environ.get("CUDA_VISIBLE_DEVICES", "all") if device == "cuda" else device
        name = hashlib.sha256(f"{_boot_id()} {own}".encode()).hexdigest()[:16]
        self.path = LOCKS / f"perfbench-host-{name}.lock"
        self._descriptor: int | None = None

    def taken(self) -> bool:
        """Whether it is this process's now; tries to take it."""
        import fcntl

        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def wait(self, seconds: float = 15.0) -> None:
        """Until it is free, or so long."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.taken():
                self.__exit__()
                return
            time.sleep(_BETWEEN_TRIES_S)

    def __enter__(self) -> Turn:
        return self

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _boot_id() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return os.uname().nodename


def _variables(own: Mapping[str, str], given: Mapping[str, str]) -> dict[str, str]:
    """The child's environment: this node's, with the user's settings of speed; Ray's own choice of threads is not
    one of them, its choice of GPUs is."""
    kept = {name: value for name, value in own.items() if name not in environment.VARIABLES}
    gpus = {name: own[name] for name in ("CUDA_VISIBLE_DEVICES",) if name in own}
    root = str(PACKAGE.parent)
    path = os.pathsep.join([root, *filter(None, [own.get("PYTHONPATH")])])
    return {**kept, **given, **gpus, "PYTHONPATH": path}


def _events(child: subprocess.Popen[bytes], job: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    assert child.stdin is not None
    assert child.stdout is not None
    with suppress(BrokenPipeError):  # how it ended is told by its exit code
        child.stdin.write(json.dumps(job).encode() + b"\n")
        child.stdin.close()
    for line in child.stdout:
        if not line.endswith(b"\n"):
            return  # it died while writing
        event = json.loads(line)
        yield event
        if event["event"] == "done":
            child.wait()
            return
    child.wait()


def _last_words(log: Any) -> str:
    size = log.seek(0, os.SEEK_END)
    log.seek(max(0, size - _LOG_BYTES))
    return str(log.read().decode(errors="replace"))

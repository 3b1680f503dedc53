"""A target that perfbench starts and ends itself, by the command in the scenario. Free of torch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import printable
from perfbench.progress import RunProgress
from perfbench.spec.traffic import Target

LOG = "server.log"
# How long a server may take to end when it is asked to, before it is killed; how often it is asked whether it is ready.
GRACE_S, ASK_S = 15.0, 0.5


@contextmanager
def started(target: Target, folder: Path, progress: RunProgress) -> Iterator[str | None]:
    """The server of `target.command`, ready to answer; gives what it says its version is, None where it does not. All
    that it prints goes to server.log in `folder`. It and what it has started end with the block.

    PerfbenchError where somebody answers there already, the command can't be run, or it is not ready in time.
    """
    if not target.command:
        yield None
        return
    if _answers(target):
        raise PerfbenchError(
            f"target.openai: somebody answers at {target.openai} already, who is not the server of target.command; "
            "end it, or take another port"
        )
    progress.say("the server", f"starting {printable(target.command[0])}")
    log = folder / LOG
    with log.open("ab") as said:
        try:
            process = subprocess.Popen(
                target.command, stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True
            )
        except OSError as error:
            raise PerfbenchError(f"target.command: {target.command[0]}: can't be run ({error.strerror})") from None
    try:
        _wait(process, target, log)
        progress.say("the server", "ready")
        yield version_of(target)
    finally:
        _end(process)


def _wait(process: subprocess.Popen[bytes], target: Target, log: Path) -> None:
    until = time.monotonic() + target.ready_s
    while not _answers(target):
        if (code := process.poll()) is not None:
            raise PerfbenchError(f"target.command: the server ended with code {code}: {_last_line(log)}")
        if time.monotonic() > until:
            late = f"the server is not ready after {target.ready_s:g} s (target.ready_s)"
            raise PerfbenchError(f"target.command: {late}: {_last_line(log)}")
        time.sleep(ASK_S)


def _get(url: str) -> bytes | None:
    """None where nobody answers, or not so. A proxy is not asked: the server is the one that was started here."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=5) as response:
            found: bytes = response.read(100_000)
            return found
    except (OSError, ValueError):
        return None


def _answers(target: Target) -> bool:
    return _get(f"{target.openai}/models") is not None


def version_of(target: Target) -> str | None:
    """What vLLM and others tell at /version, beside /v1."""
    with suppress(ValueError, AttributeError):
        found: Any = json.loads(_get(f"{target.openai.removesuffix('/v1')}/version") or b"null")
        return printable(str(found["version"]))[:80] if found and "version" in found else None
    return None


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{printable(lines[-1])[:200] if lines else 'it printed nothing'}; all of it is in {log}"


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and all processes of its group."""
    for kind in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, kind)
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE_S)

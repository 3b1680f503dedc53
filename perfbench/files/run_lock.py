"""One writer for a run folder: a lock file with the process that holds it. Free of torch.

Two processes that write one run interleave their samples, and nothing tells it afterwards. The file says who writes:
pid, host and when that process started, so that a lock of a process that is gone, or whose pid is another's by now, is
known to be stale. Where the system has file locks one is held too, which ends with its process whatever ends that.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json
from perfbench.files.plain_text import printable

try:
    import fcntl
except ImportError:  # no such locks on Windows: the file alone says who writes
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
# The start of a process is known to the clock's tick.
_SAME_START_S = 2.0
_ATTEMPTS = 10


def has_files(folder: Path) -> bool:
    """Whether something else than a lock is in the folder."""
    return any(entry.name != LOCK for entry in folder.iterdir())


@contextmanager
def held(folder: Path, *, resume: bool) -> Iterator[None]:
    """While it is open, no other perfbench writes into `folder`, which is made where it is not there, and is taken
    away again where it is still empty at the end.

    RunDirectoryError, in one line, where another process writes there. Where the folder can't be made or written, or
    is to be resumed and not there, nothing is held: whoever writes says what is wrong.
    """
    made: list[Path] = []
    if not resume:
        made = _make(folder)
    descriptor = _take(folder) if folder.is_dir() else None
    try:
        yield
    finally:
        if descriptor is not None:
            _release(folder / LOCK, descriptor)
        for one in made:
            with suppress(OSError):
                one.rmdir()


def is_held(folder: Path) -> bool:
    """Whether a process that lives has the lock of `folder`."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        locked, owner = _is_locked(descriptor), _owner(descriptor)
        return locked or bool(owner and _lives(owner))
    finally:
        os.close(descriptor)


def _make(folder: Path) -> list[Path]:
    """Makes the folder; those that were made, the innermost first."""
    missing: list[Path] = []
    with suppress(OSError):
        missing = [one for one in (folder, *folder.parents) if not one.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    return missing


def _take(folder: Path) -> int | None:
    """The open lock file; None where the folder can't be written."""
    file = folder / LOCK
    for _ in range(_ATTEMPTS):
        try:
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:
            return None
        locked, owner = _is_locked(descriptor), _owner(descriptor)
        if locked or (owner and _lives(owner)):
            os.close(descriptor)
            raise RunDirectoryError(_refusal(folder, owner))
        with suppress(OSError):  # taken away by its last holder between opening and locking: again
            if os.path.samestat(os.fstat(descriptor), file.stat()):
                _write(descriptor)
                return descriptor
        os.close(descriptor)
    raise RunDirectoryError(f"{file}: another perfbench takes and leaves this lock; try again")


def _is_locked(descriptor: int) -> bool:
    """Whether another process holds the system's lock; takes it where nobody does."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system without locks
        return False
    return False


def _write(descriptor: int) -> None:
    me = psutil.Process()
    content = {
        "pid": me.pid,
        "host": socket.gethostname(),
        "process_started_at": me.create_time(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content).encode() + b"\n", 0)


def _owner(descriptor: int) -> dict[str, Any] | None:
    """What the lock says; None where it says nothing whole, as after a kill while it was written."""
    try:
        found = strict_json.parse(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return None
    typed = isinstance(found, dict) and isinstance(found.get("pid"), int) and isinstance(found.get("host"), str)
    return found if typed and isinstance(found.get("process_started_at"), int | float) else None


def _lives(owner: dict[str, Any]) -> bool:
    """Whether the process that wrote the lock still runs. On another host nobody here can know, so it does."""
    if owner["host"] != socket.gethostname():
        return True
    if owner["pid"] == os.getpid():
        return False  # a child that never was this process can't have its pid: left by an earlier one of that pid
    try:
        started = psutil.Process(owner["pid"]).create_time()
    except (psutil.Error, ValueError, OverflowError):
        return False
    return abs(started - owner["process_started_at"]) <= _SAME_START_S


def _refusal(folder: Path, owner: dict[str, Any] | None) -> str:
    if owner is None:
        return f"{folder}: another perfbench is writing this run; wait for it, or give another --out"
    who = printable(f"process {owner['pid']} on {owner['host']}, since {owner.get('since', 'a time unknown')}")
    away = "" if owner["host"] == socket.gethostname() else f"; if that process is gone, delete {folder / LOCK}"
    return f"{folder}: another perfbench is writing this run ({who}); wait for it, or give another --out{away}"


def _release(file: Path, descriptor: int) -> None:
    with suppress(OSError):
        if os.path.samestat(os.fstat(descriptor), file.stat()):
            file.unlink()
    os.close(descriptor)

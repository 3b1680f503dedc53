"""Temporary folders that outlive nobody: of a child that is killed, and of a perfbench that was. Free of torch.

A child that is ended can't remove what it has in the temporary folder, gigabytes of checkpoints among it. So it gets a
temporary folder of its own, which the parent removes; one that the parent too could not remove is swept later.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from perfbench.files.compiler_cache import compiler_cache
from perfbench.files.run_lock import LOCK, held, is_held

PREFIX = "perfbench-scratch-"
# A folder that is just being made has no lock yet.
_LEAST_AGE_S = 3600.0


class Scratch:
    """A new folder in the temporary folder, locked by this process until `remove`; usable as a context."""

    def __init__(self) -> None:
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
        self._lock = ExitStack()
        self._lock.enter_context(held(self.path, resume=True))

    def __enter__(self) -> Scratch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def environment(self) -> dict[str, str]:
        """The variables of a child that has its temporary files here. What torch compiles stays where it was."""
        return os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(compiler_cache()), "TMPDIR": str(self.path)}

    def remove(self) -> None:
        """Takes it away with all that is in it; a second time does nothing."""
        for entry in _entries(self.path):
            if entry.name != LOCK:
                _remove(entry)
        self._lock.close()
        shutil.rmtree(self.path, ignore_errors=True)


def sweep() -> list[Path]:
    """Removes the scratch of processes that are gone; which folders those were."""
    swept = []
    for folder in _entries(Path(tempfile.gettempdir())):
        if folder.name.startswith(PREFIX) and is_stale(folder):
            shutil.rmtree(folder, ignore_errors=True)
            swept.append(folder)
    return swept


def is_stale(folder: Path) -> bool:
    """Whether it is a folder of this user's whose process is gone."""
    with suppress(OSError):
        if folder.is_symlink() or not folder.is_dir():
            return False
        found = folder.stat()
        if hasattr(os, "getuid") and found.st_uid != os.getuid():
            return False
        if not (folder / LOCK).exists():
            return time.time() - found.st_mtime > _LEAST_AGE_S
        return not is_held(folder)
    return False


def _entries(folder: Path) -> list[Path]:
    with suppress(OSError):
        return list(folder.iterdir())
    return []


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        with suppress(OSError):
            entry.unlink()

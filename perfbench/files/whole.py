"""Files written as a whole or not at all: what was there stays until the new one is complete. Free of torch."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path

from perfbench.errors import PerfbenchError


def replace(path: Path, content: bytes) -> None:
    """Puts `content` in the place of `path`. OSError where that can't be done; nothing of it is left then."""
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except OSError:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()
        raise


def write(path: Path, content: bytes) -> None:
    """As `replace`, for a file that the user named with --out. PerfbenchError where that can't be done."""
    if path.is_dir():
        raise PerfbenchError(f"--out {path}: is a folder; expected the name of a file")
    try:
        replace(path, content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise PerfbenchError(f"--out {path}: can't be written ({reason}); give a file that you can write to") from None


def _umask() -> int:
    """The mask of this process: the temporary file is private, the new one is as any file that the user makes."""
    mask = os.umask(0)
    os.umask(mask)
    return mask

"""Paths that people write down, made paths of this system or refused in one line. Free of torch."""

from __future__ import annotations

import errno
from datetime import UTC, datetime
from pathlib import Path

from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import printable

# What the system says of a path itself, whatever may lie there.
_REFUSED = {
    errno.ENAMETOOLONG: "the name is longer than this system allows; shorten it",
    errno.ELOOP: "symbolic links lead in a circle; mend them",
    errno.EACCES: "a folder on the way can't be entered; check its permissions",
}


def expanded(name: str) -> Path:
    """The path `name`, a leading `~` or `~user` made a home folder; whether something is there is not asked.

    PerfbenchError where no path can be meant: an unknown user, a name that the system takes for no file's.
    """
    shown = printable(name)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    try:
        path = Path(name).expanduser()
        path.exists()
        path.stat()
    except RuntimeError:
        raise PerfbenchError(f"{shown}: no user of that name has a home folder here; write the path out") from None
    except ValueError:  # a zero byte, half of a surrogate pair
        raise PerfbenchError(f"{shown}: expected a path, got characters that none can have") from None
    except OSError as error:
        if error.errno in _REFUSED:
            raise PerfbenchError(f"{shown}: {_REFUSED[error.errno]}") from None
    return path


def stamped(name: str) -> Path:
    """runs/<name>-<time>."""
    return Path("runs") / f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"

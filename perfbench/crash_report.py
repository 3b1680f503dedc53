"""The last net: an error that nobody foresaw becomes one line, and its traceback a file that the line names.

Free of torch.
"""

from __future__ import annotations

import errno
import os
import tempfile
import traceback

from perfbench.files.plain_text import printable

# What the system refuses the user: no fault of ours, wherever it shows first.
_OF_THE_SYSTEM = {errno.ENAMETOOLONG, errno.ELOOP, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def in_one_line(error: BaseException) -> str:
    """`KeyError: 'type'; a fault of perfbench itself ... the traceback is in FILE`. Writes that file."""
    what = printable(f"{type(error).__name__}: {error}")
    what = what if len(what) <= 300 else f"{what[:297]}..."
    return f"{what}; this is a fault of perfbench itself, {_written(error)}"


def of_the_system(error: OSError) -> str | None:
    """What the system refuses, in one line, where the user can mend it: a full disk, a path too long; else None."""
    if error.errno not in _OF_THE_SYSTEM:
        return None
    name = printable(os.fsdecode(error.filename)) if isinstance(error.filename, str | bytes) else "the system"
    name = name if len(name) <= 80 else f"{name[:77]}..."
    return f"{name}: {error.strerror}; mend that and run again"


def _written(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error))
    try:
        descriptor, path = tempfile.mkstemp(prefix="perfbench-fault-", suffix=".txt")
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(lines)
    except OSError as refused:
        return f"whose traceback can't be kept ({refused.strerror})"
    return f"the traceback is in {path}"

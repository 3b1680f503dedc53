"""Where torch keeps what it compiles, from run to run. Needs the standard library alone."""

from __future__ import annotations

import getpass
import os
import tempfile
from pathlib import Path


def compiler_cache() -> Path:
    """The folder in which torch keeps what it compiles."""
    own = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    return Path(own) if own else Path(tempfile.gettempdir()) / f"torchinductor_{_user()}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user without a name
        return str(os.getuid()) if hasattr(os, "getuid") else "user"

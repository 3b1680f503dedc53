"""What kernel set `compiled` needs of a machine: a C++ compiler, and a folder that keeps what was compiled. Free of
torch, whose Inductor uses both."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile

from perfbench.files.compiler_cache import compiler_cache

WAY_OUT = "choose kernels eager"


def compiler() -> str:
    """The name of the C++ compiler that Inductor calls."""
    return os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")


def problem() -> str | None:
    """Why nothing can be compiled here, in a line with the way out; None where it can."""
    name = compiler()
    if shutil.which(name) is None:
        return f"no C++ compiler: there is no {name} on PATH; install g++, or {WAY_OUT}"
    cache = compiler_cache()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        return f"can't write to {cache}, which keeps what was compiled: {reason}; set TORCHINDUCTOR_CACHE_DIR to " + (
            f"a folder that can be written, or {WAY_OUT}"
        )
    return None

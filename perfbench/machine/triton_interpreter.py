"""Whether Triton's interpreter, in which its kernels are checked without a GPU, works here. Free of triton itself."""

from __future__ import annotations

import re

from perfbench.machine.environment import version_of

# The last triton whose interpreter makes numbers out of arrays of one element, and the first numpy that refuses to.
LAST_OLD_TRITON, FIRST_STRICT_NUMPY = (3, 6), (2, 4)


def broken(triton: str | None = None, numpy: str | None = None) -> str | None:
    """Why kernels can't be run in the interpreter of these versions, by default the installed ones; None where they
    can, as far as versions tell."""
    triton, numpy = triton or version_of("triton"), numpy or version_of("numpy")
    if triton is None or numpy is None:
        return None  # whoever imports them will hear it
    if _first_two(triton) <= LAST_OLD_TRITON and _first_two(numpy) >= FIRST_STRICT_NUMPY:
        return (
            f"the interpreter of triton {triton} fails on numpy {numpy} (2.4 and later); "
            "install triton>=3.7 or numpy<2.4"
        )
    return None


def _first_two(version: str) -> tuple[int, int]:
    """Major and minor number of a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)

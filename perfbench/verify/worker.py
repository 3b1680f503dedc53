"""The child process of one group of sections: what it finds goes to standard output, one line of JSON each.

A process of its own, because a kernel that goes wrong on a GPU takes its process with it, and because Triton's
interpreter has to be chosen before triton is imported.

    python -m perfbench.verify.worker kernels cpu
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import import_module

from perfbench.verify.report import Finding

# Section -> (module of perfbench.verify, its function: device kind -> findings).
SECTIONS = {
    "kernels": ("kernels", "findings"),
    "replay": ("runtimes", "replay"),
    "generate": ("runtimes", "against_generate"),
    "isolation": ("runtimes", "isolation"),
    "peers": ("peers", "findings"),
}


def main() -> int:
    """Runs one section on a device kind, both given as arguments."""
    section, device = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan keeps a GPU busy
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the libraries print goes to standard error
    for finding in findings(section, device):
        events.write(json.dumps(asdict(finding), allow_nan=False) + "\n")
        events.flush()
    return 0


def findings(section: str, device: str) -> Iterator[Finding]:
    """What a section finds on `cpu` or `cuda`, one by one."""
    module, function = SECTIONS[section]
    run: Callable[[str], Iterator[Finding]] = getattr(import_module(f"perfbench.verify.{module}"), function)
    return run(device)


if __name__ == "__main__":
    sys.exit(main())

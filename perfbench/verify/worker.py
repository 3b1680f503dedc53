"""The child process of sections: what they find goes to standard output, one line of JSON each.

A process apart, because a kernel that goes wrong on a GPU takes its process with it, and because Triton's interpreter
has to be chosen before triton is imported. Names of sections come as arguments, or else on standard input, one a line,
until it ends; after each section a line says that it is done.

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

from perfbench.verify.verify_report import Finding

# Section -> (module of perfbench.verify.on_device, its function: device kind -> findings).
SECTIONS = {
    "kernels": ("kernels", "findings"),
    "replay": ("runtimes", "replay"),
    "generate": ("runtimes", "against_generate"),
    "isolation": ("runtimes", "isolation"),
    "peers": ("peers", "findings"),
    "tune": ("tuning", "findings"),
}
DONE = "done"


def main() -> int:
    """Runs the sections that the arguments or standard input name, on the device kind given as the last argument."""
    *named, device = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: no orphan keeps a GPU busy
    events = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever the libraries print goes to standard error
    if device == "cuda":
        import_module("perfbench.verify.on_device.runtimes")  # takes long; done before the first section comes
    for section in named or map(str.strip, sys.stdin):
        for finding in findings(section, device):
            events.write(json.dumps(asdict(finding), allow_nan=False) + "\n")
            events.flush()
        tidy()
        events.write(json.dumps({DONE: section}) + "\n")
        events.flush()
    return 0


def findings(section: str, device: str) -> Iterator[Finding]:
    """What a section finds on `cpu` or `cuda`, one by one."""
    module, function = SECTIONS[section]
    run: Callable[[str], Iterator[Finding]] = getattr(import_module(f"perfbench.verify.on_device.{module}"), function)
    return run(device)


def tidy() -> None:
    """Gives back the GPU memory that a section took, so that the next one begins as in a process of its own."""
    import gc

    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())

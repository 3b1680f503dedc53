"""How many instructions this process executes, by the processor's counter or by valgrind's callgrind. Free of torch.

The counter costs nothing, and few virtual machines have one; callgrind works wherever valgrind does and makes a process
many times slower. Both count this process in user space, perf its calling thread alone. They give different numbers,
callgrind those of plainer kernels, so only those of one kind compare.
The counter's path was tried with a pretended kernel only: no machine that had counters was at hand.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
import re
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from perfbench.errors import PerfbenchError

_MACHINE = platform.machine()
# linux/perf_event.h
_PERF_EVENT_OPEN = {"x86_64": 298, "aarch64": 241}
_HARDWARE, _INSTRUCTIONS = 0, 1
_TIMES_ENABLED_AND_RUNNING = 0b11
_EXCLUDE_KERNEL, _EXCLUDE_HYPERVISOR = 1 << 5, 1 << 6  # and not `inherit`, so of one thread
_CLOSE_ON_EXEC = 8
_COUNTER = struct.pack(
    "IIQQQQQIIQ",
    *(_HARDWARE, 64, _INSTRUCTIONS, 0, 0, _TIMES_ENABLED_AND_RUNNING, _EXCLUDE_KERNEL | _EXCLUDE_HYPERVISOR, 0, 0, 0),
)

# valgrind.h and callgrind.h
_RUNNING_ON_VALGRIND = 0x1001
_DUMP, _ZERO, _START, _STOP = (0x43540000 + number for number in (0, 1, 4, 5))
# The instructions that valgrind takes for a request, as a function of the address of its words: rol rdi by 3, 13, 61
# and 51, xchg rbx,rbx. Without valgrind they do nothing, and the answer is 0.
_REQUEST = bytes.fromhex("4889f8 31d2 48c1c703 48c1c70d 48c1c73d 48c1c733 4887db 4889d0 c3")
_DUMPS = "callgrind.out"


class Counter(Protocol):
    """Counts from `start` to `stop`."""

    def start(self) -> None:
        """From here on."""

    def stop(self) -> int:
        """How many instructions since `start`."""


class Perf:
    """The processor's counter, of the thread that made this. Making it raises OSError where the kernel lets us have
    none."""

    def __init__(self) -> None:
        self._counter = _perf_event_open(_COUNTER)
        self._before = (0, 0, 0)

    def start(self) -> None:
        """From here on."""
        self._before = self._read()

    def stop(self) -> int:
        """Raises PerfbenchError where others had the counter meanwhile."""
        instructions, enabled, running = (b - a for a, b in zip(self._before, self._read(), strict=True))
        if running != enabled:
            raise PerfbenchError("the counter of instructions was taken away for a while; stop other profilers")
        return instructions

    def _read(self) -> tuple[int, int, int]:
        return struct.unpack("QQQ", os.read(self._counter, 24))


class Callgrind:
    """Callgrind's count, in a process that `under("callgrind")` started. Making it raises OSError in any other."""

    def __init__(self) -> None:
        if not _requested(_RUNNING_ON_VALGRIND):
            raise OSError("this process does not run under valgrind")
        self._folder = Path(tempfile.gettempdir())

    def start(self) -> None:
        """From here on everything is slow."""
        _requested(_ZERO)
        _requested(_START)

    def stop(self) -> int:
        """Raises PerfbenchError where callgrind wrote something else than it does."""
        _requested(_STOP)
        _requested(_DUMP)
        (dump,) = self._folder.glob(f"{_DUMPS}.*")
        total = re.search(rb"^totals: (\d+)", dump.read_bytes(), re.MULTILINE)
        dump.unlink()
        if total is None:
            raise PerfbenchError(f"{dump.name}: expected totals of callgrind's, found none")
        return int(total[1])


COUNTERS: dict[str, Callable[[], Counter]] = {"perf": Perf, "callgrind": Callgrind}


def counter() -> str:
    """Which of COUNTERS this machine has, the better one first. Raises PerfbenchError that names both remedies."""
    try:
        os.close(_perf_event_open(_COUNTER))
    except OSError as error:
        refused = error.strerror
    else:
        return "perf"
    if _MACHINE == "x86_64" and shutil.which("valgrind"):
        return "callgrind"
    raise PerfbenchError(
        f"instructions can't be counted: the processor's counter can't be had ({refused}) and valgrind is not here, or "
        "does not know this processor; set kernel.perf_event_paranoid to 2 or less on a machine that has counters, "
        "which few virtual ones do, or install valgrind on x86_64"
    )


# Valgrind computes fused products in software: with them one prefill of llama-256x8 took minutes, and takes a second.
_PLAIN_KERNELS = ("MKL_CBWR=COMPATIBLE", "ATEN_CPU_CAPABILITY=default", "ONEDNN_MAX_CPU_ISA=SSE41")


def under(name: str) -> tuple[str, ...]:
    """The words before the command of a process that is to count with a counter of COUNTERS."""
    if name == "perf":
        return ()
    dumps = f"--callgrind-out-file=%q{{TMPDIR}}/{_DUMPS}"
    return ("env", *_PLAIN_KERNELS, "valgrind", "--tool=callgrind", "--quiet", "--instr-atstart=no", dumps)


def _perf_event_open(attributes: bytes) -> int:
    """The descriptor of a counter that counts from now on, of this thread on any core."""
    number = _PERF_EVENT_OPEN.get(_MACHINE)
    if sys.platform != "linux" or number is None:
        raise OSError(0, f"not known on {sys.platform} {_MACHINE}")
    libc = ctypes.CDLL(None, use_errno=True)
    found = libc.syscall(number, attributes, 0, -1, -1, _CLOSE_ON_EXEC)
    if found < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return int(found)


def _requested(request: int) -> int:
    """What valgrind answers to a request without arguments; 0 where there is no valgrind."""
    if _MACHINE != "x86_64":
        return 0
    words = (ctypes.c_uint64 * 6)(request)
    return int(_page()[1](ctypes.addressof(words)))


@functools.cache
def _page() -> tuple[object, Callable[[int], int]]:
    """_REQUEST in memory, which has to be kept, and as a function."""
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(_REQUEST)
    code = ctypes.c_char.from_buffer(page)
    return code, ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(ctypes.addressof(code))

"""What call sites launch, recorded without a GPU, and compiled for any.

    with recording() as launches:
        low_rank.FORMS["triton"](y, x, a, b)  # on CPU tensors; computes nothing
    compiled(launches[0], 90)  # registers, spilled bytes, shared memory on sm_90

A launch is recorded as Triton specialises it: the types of the arguments, which of them are 1 or divisible by 16, the
constants, the warps. Nothing of that is written down here. Only in a process without TRITON_INTERPRET.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

from perfbench.kernels.launch import EARLY_START
from perfbench.kernels.placement import standing_in

# Compute capability -> shared memory that a block may have, in bytes.
ARCHITECTURES = {80: 163 * 1024, 86: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel. Two are equal where Triton takes the program of the one for the other."""

    name: str  # of the file and the function: low_rank.shrink
    key: str
    kernel: Any = field(compare=False)
    signature: dict[str, Any] = field(compare=False)  # argument -> type, "constexpr" of a constant
    constants: dict[tuple[int, ...], Any] = field(compare=False)  # place among the arguments -> value
    attributes: dict[tuple[int, ...], Any] = field(compare=False)  # place -> what is known of the value
    options: dict[str, Any] = field(compare=False)  # num_warps and the like

    @property
    def named_constants(self) -> dict[str, Any]:
        """Argument -> its value, of the constants and of what is 1 and so became one."""
        names = list(self.signature)
        return {".".join([names[first], *map(str, rest)]): value for (first, *rest), value in self.constants.items()}


class _Driver:
    """What Triton asks of a driver before it compiles. The GPU is none of any machine: what is recorded is compiled
    for others."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", max(ARCHITECTURES), 32)

    def get_current_device(self) -> int:
        return -1

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Within it, launches of kernels are noted in the list that it gives, in order, and neither compiled nor run; CPU
    tensors stand in for a GPU's, and what a kernel should have written stays as it was.

    RuntimeError in Triton's interpreter, whose launches say nothing of a GPU's.
    """
    if knobs.runtime.interpret:
        raise RuntimeError("expected a process without TRITON_INTERPRET: its kernels are interpreted, not compiled")
    launches: list[Launch] = []

    def note(*, key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        launches.append(_launch(fn.jit_function, key, compile))
        return True  # leave it at that

    before = driver._active
    with knobs.runtime.scope(), standing_in():
        knobs.runtime.jit_cache_hook = note
        driver.set_active(_Driver())
        try:
            yield launches
        finally:
            driver._active = before


def _launch(kernel: Any, key: str, told: dict[str, Any]) -> Launch:
    file = kernel.fn.__module__.rsplit(".", 1)[-1].removesuffix("_triton")
    options = {name: told[name] for name in ("num_warps", "num_ctas", "num_stages", "enable_fp_fusion")}
    name = f"{file}.{kernel.fn.__name__.lstrip('_')}"
    return Launch(name, str(key), kernel, told["signature"], told["constants"], told["configs"][0], options)


def distinct(launches: Iterable[Launch]) -> list[Launch]:
    """One of each, in order."""
    return list(dict.fromkeys(launches))


def source_for(launch: Launch, capability: int) -> ASTSource:
    """What is compiled for a GPU of this compute capability."""
    constants = launch.constants
    if capability < EARLY_START[0] * 10:  # there the launcher would not have asked for it
        arguments = launch.kernel.arg_names
        constants = {
            place: False if arguments[place[0]] == "EARLY" else value for place, value in launch.constants.items()
        }
    return ASTSource(launch.kernel, launch.signature, constants, launch.attributes)


def compiled(launch: Launch, capability: int) -> dict[str, int]:
    """registers of a thread, spill_bytes that it keeps in memory instead, shared_bytes of a program, once `launch` is
    compiled for this compute capability. What does not compile raises what Triton or its assembler raise."""
    source = source_for(launch, capability)
    program = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    return _usage(program.asm["cubin"]) | {"shared_bytes": int(program.metadata.shared)}


def fault(launch: Launch, capability: int, spill_bytes: int = 0) -> str | None:
    """What speaks against launching it on a GPU of this compute capability, in a line; None if nothing does.
    spill_bytes: how many a thread may spill."""
    try:
        found = compiled(launch, capability)
    except Exception as error:  # Triton's of every kind, its assembler's: whatever it is, a GPU would meet it
        return f"{launch.name} on sm_{capability}: does not compile: {_last_line(error)}"
    if found["spill_bytes"] > spill_bytes or found["shared_bytes"] > ARCHITECTURES[capability]:
        return f"{launch.name} on sm_{capability}: spills or outgrows shared memory: {found}"
    return None


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


def _usage(cubin: bytes) -> dict[str, int]:
    """What a program for a GPU says that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
    found = re.findall(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if done.returncode or len(found) != 1:
        said = (done.stdout + done.stderr).strip()
        raise RuntimeError(f"cuobjdump: expected the usage of one function, got {said!r}")
    registers, stack = map(int, found[0])
    return {"registers": registers, "spill_bytes": stack}

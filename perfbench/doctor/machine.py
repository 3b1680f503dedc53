"""What this machine can and can't do for perfbench, and how to fix it: one check a line, each by trying it.

Nothing here opens the network, and no package is imported but inside the check that needs it: where it is missing,
that check alone is skipped.
"""

from __future__ import annotations

import importlib
import os
import platform
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from perfbench.doctor.check import Check
from perfbench.files.compiler_cache import compiler_cache
from perfbench.machine import compiler
from perfbench.machine.nvml import Nvml
from perfbench.spec.backbone_config import NAMED_CONFIGS, parameter_count

GIB = 2**30
LOW_DISK_BYTES = GIB  # a run directory is some MB; a backbone from the hub is GBs, into its own cache

# Imported name -> package, where they are called differently.
PACKAGE_OF = {"pynvml": "nvidia-ml-py", "yaml": "PyYAML", "jinja2": "Jinja2"}


def all_of_them() -> list[Check]:
    """Every check of the machine."""
    return [run(name, check) for name, check in MACHINE_CHECKS.items()]


def run(name: str, check: Callable[[], Check]) -> Check:
    """What a check finds; where a package is missing that it needs, which one."""
    try:
        return check()
    except ModuleNotFoundError as error:
        imported = (error.name or "a package").split(".")[0]
        package = PACKAGE_OF.get(imported, imported)
        finding = f"skipped: it needs {package}, which is not installed"
        return Check(name, "warn", finding, f"install {package}, see above")


def cuda() -> Check:
    """Whether torch finds a CUDA device, by asking it."""
    try:
        import torch
    except ModuleNotFoundError as error:
        if error.name == "torch":
            raise
        return Check("cuda", "missing", f"torch can't be imported: {_one_line(error)}", "install torch again")
    except (ImportError, OSError) as error:  # OSError: a shared library of torch's is missing
        return Check("cuda", "missing", f"torch can't be imported: {_one_line(error)}", "install torch again")
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why, remedy = "this torch is a CPU build", "on a machine with a GPU, install torch's CUDA build"
        else:
            why, remedy = (
                "torch finds no usable GPU",
                "check the driver (nvidia-smi) and CUDA_VISIBLE_DEVICES",
            )
        return Check("cuda", "warn", f"no CUDA device, so cases run on the CPU only: {why}", remedy)
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    names = ", ".join(f"{device.name} ({device.total_memory / GIB:.0f} GiB)" for device in devices)
    bf16 = "" if torch.cuda.is_bf16_supported(including_emulation=False) else "; bf16 is not native: use fp16"
    return Check("cuda", "warn" if bf16 else "ok", f"cases run on {names}{bf16}")


def nvml() -> Check:
    """Whether the driver can be read, and who else computes on the GPUs."""
    reason = Nvml.why_not()
    if reason is not None:
        return Check(
            "nvml",
            "warn",
            f"{reason}; device and process memory, SM clocks, throttling and energy stay empty",
            "on a machine with an NVIDIA GPU, install its driver",
        )
    others = sorted(
        process.name or f"process {process.pid}"
        for gpu in Nvml.devices()
        for process in gpu.processes()
        if process.pid != os.getpid()
    )
    if others:
        finding = f"{len(others)} other programs compute on the GPUs: {', '.join(others)}; timings will be noisy"
        return Check("nvml", "warn", finding, "stop them, or choose an idle GPU with CUDA_VISIBLE_DEVICES")
    return Check("nvml", "ok", "memory, clocks and energy can be read; nothing else computes on the GPUs")


def triton() -> Check:
    """Whether `kernels: triton` can be used, by importing triton."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return Check(
            "kernels: triton",
            "warn",
            f"{_one_line(error)}; kernels: eager works without it",
            "install triton",
        )
    return Check("kernels: triton", "ok", "triton can be imported; its kernels run on a CUDA device")


def compiling() -> Check:
    """Whether `kernels: compiled` can be used."""
    reason = compiler.problem()
    if reason is not None:
        return Check(
            "kernels: compiled", "warn", f"{reason.split(';')[0]}; kernels: eager works without it", "install g++"
        )
    finding = f"{compiler.compiler()} is on PATH; what was compiled stays in {compiler_cache()}"
    return Check("kernels: compiled", "ok", finding)


def tuned_kernels(settings: dict[str, str] | None = None) -> Check:
    """Whether the launch settings of the Triton kernels were tuned for the GPUs here."""
    if settings is None:
        from perfbench.machine import environment

        settings = environment.kernel_settings()
    untuned = [name for name, source in settings.items() if source != "tuned"]
    if untuned:
        finding = f"kernels/settings.json lacks {', '.join(untuned)}: its kernels run with the defaults"
        return Check("kernel settings", "warn", finding, "python -m perfbench.kernels.tune --write")
    finding = f"tuned for {', '.join(settings)}" if settings else "the defaults; no GPU to tune them for"
    return Check("kernel settings", "ok", finding)


def kernels_name(package: Path = Path(__file__).parents[1]) -> Check:
    """Whether our folder `kernels` is reachable as perfbench.kernels and shadows no installed package."""
    if not (package / "kernels").is_dir():
        finding = "perfbench/kernels is not a folder: the symbolic link to it was lost"
        return Check("name kernels", "missing", finding, "git config core.symlinks true, then git checkout .")
    if (package / "kernels" / "__init__.py").exists():
        finding = "kernels/__init__.py makes it shadow Hugging Face's package kernels, which transformers imports"
        return Check("name kernels", "missing", finding, "delete kernels/__init__.py")
    return Check("name kernels", "ok", "a namespace package: it shadows nothing")


def memory() -> Check:
    """The memory that is free, and which named backbones fit into it with fp32 weights."""
    import psutil

    from perfbench.machine import environment

    free = psutil.virtual_memory().available
    limit = environment.limits()["memory_bytes"]
    free = min(free, int(limit)) if limit is not None else free
    # Weights times 1.5: the rest is adapters, activations and the libraries themselves.
    fit = [name for name, config in NAMED_CONFIGS.items() if 4 * 1.5 * parameter_count(config) + GIB < free]
    too_large = [name for name in NAMED_CONFIGS if name not in fit]
    finding = f"{free / GIB:.1f} GiB free; in fp32 on the CPU fit {', '.join(fit) or 'no named shapes'}"
    if too_large:
        finding += f"; too large are {', '.join(too_large)}"
    if "llama-110m" not in fit:
        return Check("memory", "warn", finding, "close other programs, or raise the container's limit")
    return Check("memory", "ok", finding)


def disk(folder: Path | None = None) -> Check:
    """Whether a run directory can be written in `folder` (the current one), and the space there."""
    folder = folder or Path.cwd()
    if not os.access(folder, os.W_OK):
        return Check("disk", "warn", "the current folder is not writable", "give another with --out")
    free = shutil.disk_usage(folder).free
    if free < LOW_DISK_BYTES:
        return Check("disk", "warn", f"{free / GIB:.2f} GiB free in the current folder", "make room, or use --out")
    return Check("disk", "ok", f"{free / GIB:.0f} GiB free in the current folder")


def peak_memory(clear_refs: Path = Path("/proc/self/clear_refs")) -> Check:
    """Whether the peak resident set can be reset before each memory pass, by resetting it."""
    try:
        clear_refs.write_text("5")
    except OSError as error:
        finding = f"the peak resident set can't be reset ({error.strerror}): peaks include what ran before"
        return Check("host memory peak", "warn", finding, "run on Linux, where /proc/self/clear_refs is writable")
    return Check("host memory peak", "ok", "the peak resident set can be reset before each pass")


def cpu_clock() -> Check:
    """Whether the CPU's clock is held still."""
    from perfbench.machine import environment

    found = environment.governor()
    if found is None:
        finding = "the frequency governor is not visible (a virtual machine?): speed may drift"
        return Check("cpu clock", "warn", finding, "compare arms of one run (kept), not figures of two")
    if found != "performance":
        finding = f"the frequency governor is {found}: speed depends on what ran before"
        return Check("cpu clock", "warn", finding, "cpupower frequency-set -g performance")
    return Check("cpu clock", "ok", "the frequency governor is performance")


def timer(now: Callable[[], float] = time.perf_counter) -> Check:
    """Whether the clock that times everything is fine enough and steady, by reading it."""
    from perfbench.machine import timer

    if (fault := timer.fault(now)) is not None:
        return Check("timer", "missing", fault, "measure on a machine, or a virtual one, with a steady fine clock")
    return Check("timer", "ok", "the clock is fine and keeps the pace of the machine's raw one")


def cpu_load() -> Check:
    """Whether other work runs on the cores, and whether a quota takes them away."""
    import psutil

    from perfbench.machine import environment

    cores = psutil.cpu_count() or 1
    quota = environment.limits()["cpus"]
    if quota is not None and quota < cores:
        finding = f"a container limit of {quota:g} cores on {cores} visible ones: threads beyond it are stopped"
        return Check("cpu load", "warn", finding, f"use at most {max(1, int(quota))} threads")
    load = os.getloadavg()[0]
    if load > 0.5 * cores:
        finding = f"{load:.1f} programs running on {cores} cores in the last minute: timings will be noisy"
        return Check("cpu load", "warn", finding, "wait, or stop them")
    return Check("cpu load", "ok", f"{cores} cores, load {load:.1f}")


def instructions() -> Check:
    """Whether `perfbench ab --instructions` can count, and with what."""
    from perfbench.errors import PerfbenchError
    from perfbench.machine import instructions

    try:
        found = instructions.counter()
    except PerfbenchError as error:
        finding, _, remedy = str(error).partition("; ")
        return Check("instructions", "warn", finding, remedy)
    slowly = "valgrind, which takes minutes" if found == "callgrind" else "the processor's counter"
    return Check("instructions", "ok", f"`perfbench ab --instructions` counts with {slowly}")


def hub() -> Check:
    """Whether backbones can come from the hub, as far as can be told without opening the network."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    where = f"the hub's cache ({_short(cache)}) {'exists' if cache.is_dir() else 'does not exist yet'}"
    if constants.HF_HUB_OFFLINE:
        finding = f"HF_HUB_OFFLINE is set: only folders, named shapes and cached models; {where}"
        return Check("hub", "warn", finding, "unset HF_HUB_OFFLINE to download models")
    return Check("hub", "ok", f"models are downloaded where the network allows it (not tried); {where}")


# Name, as each check says it itself -> the check.
# System -> what is known to be missing there; on Linux alone everything is tested.
LESS_THAN_LINUX = {
    "Darwin": "no CUDA and no Triton kernels; of host memory no peak; the rest is not tested here",
    "Windows": "no Triton kernels of ours, no file locks (a run folder is guarded by its .lock file alone), no limits "
    "for generated SQL, which is therefore not scored; of host memory no peak; the rest is not tested here",
}


def system() -> Check:
    """Whether this is a system on which perfbench is tested."""
    name = platform.system()
    if name == "Linux":
        return Check("system", "ok", "Linux, on which everything is tested")
    what = LESS_THAN_LINUX.get(name, "not tested here")
    return Check("system", "warn", f"{name}: {what}", "measure on Linux")


MACHINE_CHECKS: dict[str, Callable[[], Check]] = {
    "system": system,
    "cuda": cuda,
    "nvml": nvml,
    "kernels: triton": triton,
    "kernels: compiled": compiling,
    "kernel settings": tuned_kernels,
    "name kernels": kernels_name,
    "memory": memory,
    "disk": disk,
    "host memory peak": peak_memory,
    "cpu clock": cpu_clock,
    "timer": timer,
    "cpu load": cpu_load,
    "instructions": instructions,
    "hub": hub,
}


def _short(path: Path) -> str:
    """`path` with ~ for the home folder, so that a pasted table names nobody."""
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else str(path)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())

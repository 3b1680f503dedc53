"""The machine and the software beside every figure. Free of torch; says nothing about who ran it or where.

No host name, user name or folder is recorded, so that a run.json can be published as it is.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import psutil

from perfbench.machine.nvml import Nvml

PACKAGES = ("perfbench", "torch", "transformers", "peft", "triton", "numpy", "safetensors", "nvidia-ml-py")
# The name at the registry where it is another one: `perfbench` there is another project.
DISTRIBUTIONS = {"perfbench": "adapter-perfbench"}

# Environment variables that change speed, memory or results, and whose values name no folder.
VARIABLES = (
    "ATEN_CPU_CAPABILITY",
    "CUBLAS_WORKSPACE_CONFIG",
    "CUDA_LAUNCH_BLOCKING",
    "CUDA_VISIBLE_DEVICES",
    "HF_HUB_OFFLINE",
    "KMP_AFFINITY",
    "MALLOC_ARENA_MAX",
    "MKL_NUM_THREADS",
    "NVIDIA_TF32_OVERRIDE",
    "OMP_NUM_THREADS",
    "OMP_PROC_BIND",
    "ONEDNN_MAX_CPU_ISA",
    "PYTORCH_ALLOC_CONF",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_NO_CUDA_MEMORY_CACHING",
    "TOKENIZERS_PARALLELISM",
    "TORCHDYNAMO_DISABLE",
    "TRITON_INTERPRET",
)

# The CPU features that decide how fast torch multiplies matrices, on x86-64 and on ARM.
ISA_FLAGS = (
    *(
        "avx2",
        "fma",
        "avx512f",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_tile",
        "amx_bf16",
        "amx_int8",
    ),
    *("asimd", "sve", "sve2", "bf16", "i8mm"),
)

GIT_TIMEOUT_S = 5.0
# GPU name -> kernel -> launch settings; kernels/settings.py reads it too.
KERNEL_SETTINGS = Path(__file__).parents[1] / "kernels" / "settings.json"


def collect(device_kind: str, threads: int | None) -> dict[str, Any]:
    """The environment of a run, as a JSON-able dict; a fact that can't be read is None.

    `device_kind`: "cpu" or "cuda", what the cases run on; `threads`: the torch threads of the cases, None
    where the caller left them to torch. Sizes are in bytes, clocks in MHz, power in watts.
    """
    return {
        "device_kind": device_kind,
        "cpu": cpu(threads),
        "gpus": gpus(),
        "nvml_missing": Nvml.why_not(),
        "kernel_settings": kernel_settings(),
        "limits": limits(),
        "load_average": list(os.getloadavg()),
        "os": operating_system(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "versions": versions(),
        "checkout": checkout(),
        "variables": variables(),
    }


def threads() -> int:
    """CPU threads that a measuring process may use: the processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu(threads: int | None) -> dict[str, Any]:
    """Model, cores, the given `threads`, memory, frequency and governor, and the ISA features that matter."""
    info = _cpuinfo()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    frequency = psutil.cpu_freq()
    return {
        "model": info.get("model name") or platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(logical=False),
        "logical_cores": psutil.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "threads": threads,
        "memory_bytes": psutil.virtual_memory().total,
        "clock_mhz": round(frequency.current) if frequency else None,
        "max_clock_mhz": (round(frequency.max) or None) if frequency else None,  # psutil says 0 for unknown
        "governor": governor(),
        "isa": [flag for flag in ISA_FLAGS if flag in flags],
    }


def gpus() -> list[dict[str, Any]]:
    """Every NVIDIA GPU of the machine, in NVML's order, with the other programs that compute on it."""
    return [
        {
            "name": gpu.name(),
            "memory_bytes": gpu.device_total_bytes(),
            "used_bytes": gpu.device_used_bytes(),
            "driver": gpu.driver_version(),
            "sm_clock_mhz": gpu.sm_clock_mhz(),
            "max_sm_clock_mhz": gpu.max_sm_clock_mhz(),
            "power_limit_watts": gpu.power_limit_watts(),
            "throttle_reasons": gpu.throttle_reasons(),
            "other_processes": [
                {"name": process.name, "used_bytes": process.used_bytes}
                for process in gpu.processes()
                if process.pid != os.getpid()
            ],
        }
        for gpu in Nvml.devices()
    ]


def kernel_settings(names: Iterable[str] | None = None, table: Path = KERNEL_SETTINGS) -> dict[str, str]:
    """GPU name -> "tuned" where the committed table has launch settings of the Triton kernels for it, else "defaults".

    `names`: by default those of this machine's GPUs; without one it is empty.
    """
    if names is None:
        names = [name for gpu in Nvml.devices() if (name := gpu.name()) is not None]
    tuned = json.loads(table.read_text(encoding="utf-8"))
    return {name: "tuned" if name in tuned else "defaults" for name in names}


def governor() -> str | None:
    """The first core's frequency governor; None where the system shows none (most virtual machines)."""
    return _read(Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"))


def limits(root: Path = Path("/sys/fs/cgroup")) -> dict[str, float | int | None]:
    """What a container may use: `cpus` (a quota, in cores) and `memory_bytes`; None means no limit is set."""
    quota = _read(root / "cpu.max")  # cgroup v2: "max 100000" or "<quota> <period>", in microseconds
    if quota is not None:
        allowed, period = quota.split()
    else:
        allowed = _read(root / "cpu/cpu.cfs_quota_us") or "max"
        period = _read(root / "cpu/cpu.cfs_period_us") or "100000"
    unlimited = allowed in ("max", "-1")
    memory = _read(root / "memory.max") or _read(root / "memory/memory.limit_in_bytes") or "max"
    # cgroup v1 writes "no limit" as a number near 2^63, more memory than there is.
    limited = memory != "max" and int(memory) < psutil.virtual_memory().total
    return {
        "cpus": None if unlimited else int(allowed) / int(period),
        "memory_bytes": int(memory) if limited else None,
    }


def operating_system() -> str:
    """The distribution, kernel and C library, without the host's name."""
    try:
        distribution = platform.freedesktop_os_release().get("PRETTY_NAME", platform.system())
    except OSError:
        distribution = platform.system()
    libc = "-".join(platform.libc_ver())
    return f"{distribution}, {platform.system()} {platform.release()} {platform.machine()}, {libc}"


def versions() -> dict[str, str | None]:
    """Of PACKAGES, None where one is not installed."""
    return {name: version_of(DISTRIBUTIONS.get(name, name)) for name in PACKAGES}


def version_of(package: str) -> str | None:
    """The installed version of `package` (its name at the registry); None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def checkout(package: Path = Path(__file__).parents[1]) -> dict[str, Any] | None:
    """The commit of the checkout that `package` runs from, and whether its code differs from that commit
    (untracked files included); None outside a checkout, or where git is missing or does not answer."""
    root = package.parent
    top = _git(root, "rev-parse", "--show-toplevel")
    # An installed copy may lie in a virtual environment inside somebody else's checkout.
    if top is None or Path(top).resolve() != root.resolve():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    code = [name for name in ("perfbench", "methods", "kernels", "scenarios") if (root / name).exists()]
    changes = _git(root, "status", "--porcelain", "--", "pyproject.toml", *code)
    if commit is None or changes is None:
        return None
    return {"commit": commit, "dirty": bool(changes)}


def variables() -> dict[str, str]:
    """The environment variables that are set and matter; of LD_PRELOAD only the files' names."""
    found = {name: os.environ[name] for name in VARIABLES if name in os.environ}
    preload = os.environ.get("LD_PRELOAD", "").replace(":", " ").split()
    if preload:  # another memory allocator, for example
        found["LD_PRELOAD"] = " ".join(Path(library).name for library in preload)
    return found


def _cpuinfo() -> dict[str, str]:
    """The fields of the first processor of /proc/cpuinfo; empty where there is no such file."""
    first = (_read(Path("/proc/cpuinfo")) or "").split("\n\n", 1)[0]
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints, stripped; None where it is missing, fails or takes longer than GIT_TIMEOUT_S."""
    # Inside a git hook these variables would point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _read(path: Path) -> str | None:
    """The text of a small system file, stripped; None where there is none or it can't be read."""
    try:
        return path.read_text().strip()
    except OSError:
        return None

"""Peak memory of one generate call, as five separate figures, and what it consists of, in passes of their own."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from perfbench.machine.nvml import Nvml
from perfbench.runtimes.backbone import tensor_bytes
from perfbench.runtimes.continuous.arm import ContinuousArm
from perfbench.runtimes.generation import Arm, Batch
from perfbench.runtimes.merged import Merging
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm

# What a process may take between the reset of its peak and the reading that proves it.
RESET_SLACK_BYTES = 2**22


def peaks(arm: Arm, batch: Batch, resident_bytes: int, device: torch.device, nvml: Nvml | None) -> dict[str, Any]:
    """Peak bytes while `arm` (alone on the device with the backbone) generates, and `kv_cache_bytes`, those of the KV
    cache after the last step, when it is full; None where a figure does not exist.

    `resident_bytes`: weights and adapters that are there before the call, which the CPU's allocator does not count.
    Every figure is reset before, and all are of one call. The caching allocator gives nothing back to the driver within
    the call, so that NVML read right after it shows the peak.
    """
    gc.collect()
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    # Without a GPU the profiler alone sees what the allocator holds; its notes are a few MB of what is resident.
    profiler = None if on_gpu else profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    with profiler or nullcontext():
        resettable = reset_peak_resident()
        cache_bytes = _full_cache_bytes(arm, batch)
        peak_resident = peak_resident_bytes() if resettable else None
    if on_gpu:
        torch.cuda.synchronize()
    found: dict[str, Any] = {
        "kv_cache_bytes": cache_bytes,
        "peak_resident_bytes": peak_resident,
        "peak_device_bytes": nvml.device_used_bytes() if nvml else None,
        "peak_process_bytes": nvml.process_used_bytes(os.getpid()) if nvml else None,
    }
    if on_gpu:
        found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated()
        found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
    else:
        found["peak_allocated_bytes"] = resident_bytes + _peak_allocated(profiler)
        found["peak_reserved_bytes"] = None
    return found


def adapter_bytes(arm: Arm, weight_bytes: int) -> int:
    """Bytes of all resident adapters.

    What is left of the peak beside these, the KV cache and the `weight_bytes` of the backbone is the call's workspace.
    """
    if isinstance(arm, Merging):
        return sum(t.nbytes for t in arm.adapter_tensors())
    if isinstance(arm, (PlanArm, StaticArm, ContinuousArm)):
        return sum(t.nbytes for t in arm.bank.tensors()) if arm.bank else 0
    return tensor_bytes(arm.model) - weight_bytes


def _full_cache_bytes(arm: Arm, batch: Batch) -> int:
    """Generates once: the cache that `static` keeps, or what Hugging Face's cache held after its last step."""
    found = 0

    def see(_module: Any, _args: Any, output: Any) -> None:
        nonlocal found
        layers = output.past_key_values.layers
        found = sum(t.untyped_storage().nbytes() for layer in layers for t in (layer.keys, layer.values))

    if isinstance(arm, StaticArm):
        arm.generate(batch)
        assert arm.decoder is not None
        return sum(t.nbytes for t in arm.decoder.cache.tensors())
    if isinstance(arm, ContinuousArm):
        arm.generate(batch)
        assert arm.rows is not None
        return sum(t.nbytes for t in arm.rows.cache.tensors())
    causal = next(module for module in arm.model.modules() if isinstance(module, PreTrainedModel))
    hook = causal.register_forward_hook(see)
    try:
        arm.generate(batch)
    finally:
        hook.remove()
    return found


def free_bytes(device: torch.device, transient_bytes: int) -> int:
    """What is left for more tenants while such a call runs, right after one ran: what the driver has free, or what
    the host has available less the `transient_bytes` that the call takes and gives back."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return max(0, psutil.virtual_memory().available - transient_bytes)


def resident_bytes(arm: Arm) -> int:
    """Bytes of the weights, the adapters and whatever else an arm keeps on its device from call to call."""
    return tensor_bytes(arm.model) + sum(t.nbytes for t in arm.tensors())


def _peak_allocated(profiler: Any) -> int:
    """Peak of the running sum over the allocator's events of one call: exact, and the same in every run."""
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    peak = current = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        current += event.nbytes()
        peak = max(peak, current)
    if peak <= 0:
        raise RuntimeError("the peak of a call: expected allocations of a call that generates, the profiler saw none")
    return peak


def reset_peak_resident() -> bool:
    """Makes VmHWM start again from the present resident set; False where the kernel does not offer it, or offers it
    and does not do it."""
    if sys.platform != "linux":
        return False
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return peak_resident_bytes() <= _status_bytes("VmRSS") + RESET_SLACK_BYTES


def peak_resident_bytes() -> int:
    """VmHWM of this process, in bytes."""
    return _status_bytes("VmHWM")


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024

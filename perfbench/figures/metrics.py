"""What each figure means: the one place that defines them. Free of torch.

A *request* is one prompt; rows = requests x beams. Beams are never multiplied in. N, the number of new
tokens, is exact, because end-of-sequence is off in latency work. A *sample* is one repetition of one case; a
*round* is one turn of all the cases of a comparison; an *arm* is one case of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Metric:
    """One figure: its `unit`, which way is `better` ("higher", "lower", None), its one-line `definition`."""

    unit: str
    better: str | None
    definition: str


METRICS: dict[str, Metric] = {
    "total_ms": Metric("ms", "lower", "the whole generate call"),
    "ttft_ms": Metric("ms", "lower", "from the start of generate until the first step's token is chosen"),
    "follow_up_ttft_ms": Metric(
        "ms", "lower", "the second turn's ttft: from the cache of the first where the method allows it"
    ),
    "itl_ms": Metric("ms", "lower", "for each later step, the time since the step before it"),
    "decode_tokens_per_s": Metric(
        "tokens/s", "higher", "requests x (N - 1) / (total - ttft); beams are never multiplied in"
    ),
    "tokens_per_s": Metric("tokens/s", "higher", "requests x N / total: the figure to lay beside the papers'"),
    "peak_allocated_bytes": Metric("bytes", "lower", "most memory in tensors on the device, that arm alone"),
    "peak_reserved_bytes": Metric("bytes", "lower", "most device memory the allocator held, that arm alone"),
    "peak_device_bytes": Metric("bytes", "lower", "most memory in use on the device by all processes (NVML)"),
    "peak_process_bytes": Metric("bytes", "lower", "most device memory used by the measuring process (NVML)"),
    "peak_resident_bytes": Metric(
        "bytes",
        "lower",
        "most host memory the measuring process had resident; grows from arm to arm, so it compares none",
    ),
    "adapter_bytes": Metric("bytes", "lower", "adapters of all resident tenants on the device"),
    "kv_cache_bytes": Metric("bytes", "lower", "keys and values when the cache is full, after the last step"),
    "tenants_that_fit": Metric(
        "tenants", "higher", "more tenants whose adapters fit in the memory that is left while a batch runs"
    ),
    "admit_ms": Metric("ms", "lower", "from one cold tenant's checkpoint folder into its slot (page cache warm)"),
    "parameters_per_tenant": Metric(
        "parameters", None, "trained adapter parameters of one tenant, the mean over tenants"
    ),
    "bytes_per_tenant": Metric("bytes", "lower", "one tenant's adapter as it is served, the mean over tenants"),
    "resident_bytes_per_tenant": Metric(
        "bytes", "lower", "what one more resident tenant takes: a slot of the bank, or all that PEFT makes of it"
    ),
    "energy_mj_per_token": Metric("mJ/token", "lower", "device energy in generate / (requests x N) (NVML)"),
    "aten_ops_per_decode_step": Metric("operations", "lower", "ATen operations called in one decode step"),
    "kernel_launches_per_decode_step": Metric("launches", "lower", "device kernels launched in one step"),
    "flops_per_decode_step": Metric(
        "FLOPs", "lower", "floating-point operations of one decode step: as counted, or the least where that is more"
    ),
    "compiled_registers": Metric("registers", "lower", "registers of one thread of a compiled kernel (ptxas)"),
    "compiled_spill_bytes": Metric("bytes", "lower", "registers' worth that one thread keeps in memory instead"),
    "compiled_shared_bytes": Metric("bytes", "lower", "shared memory of one program of a compiled kernel"),
    "bytes_per_decode_step": Metric("bytes", "lower", "weights, adapters and cache the last step must read"),
    "least_flops_per_decode_step": Metric("FLOPs", "lower", "products that the last step can't do without"),
    "least_ms_per_decode_step": Metric(
        "ms", "lower", "least bytes or FLOPs over the device's speeds, whichever takes longer: the median of the steps"
    ),
    "roof_share": Metric("ratio", "higher", "least_ms_per_decode_step / the median of itl_ms"),
    "kept": Metric("ratio", "higher", "median over rounds of arm / `none` within the same round"),
    "versus_plain": Metric(
        "ratio", "higher", "median over rounds of arm / itself on transformers with eager, same round"
    ),
    "kept_bound": Metric(
        "ratio", "higher", "bytes of `none` per step / bytes of the arm: the `kept` that traffic allows"
    ),
}


def sample_metrics(token_times_ms: Sequence[float], requests: int, total_ms: float) -> dict[str, Any]:
    """The figures of one repetition.

    `token_times_ms`: the N instants, in ms since the start of generate, at which each step's token was
    chosen; `requests`: prompts in the batch, not rows; `total_ms`: the whole generate call. Gives `total_ms`,
    `ttft_ms`, `itl_ms` (N - 1 values), `decode_tokens_per_s` and `tokens_per_s`.
    Raises ValueError on fewer than 2 tokens, on fewer than 1 request, and on times that are not finite, go
    backwards, or leave no time for decoding.
    """
    times = [float(instant) for instant in token_times_ms]
    tokens = len(times)
    if tokens < 2:
        raise ValueError(f"token_times_ms: expected at least 2 tokens, got {tokens}")
    if requests < 1:
        raise ValueError(f"requests: expected an integer >= 1, got {requests}")
    instants = [0.0, *times, float(total_ms)]
    for step, (before, after) in enumerate(pairwise(instants)):
        name = "total_ms" if step == tokens else f"token_times_ms[{step}]"
        if not math.isfinite(after):
            raise ValueError(f"{name}: expected a finite time in ms, got {after}")
        if after < before:
            raise ValueError(f"{name}: times go backwards, {after} ms follows {before} ms")
    ttft_ms, decode_ms = times[0], float(total_ms) - times[0]
    if decode_ms <= 0:
        raise ValueError(f"total_ms: expected more than ttft_ms ({ttft_ms} ms), got {total_ms} ms")
    return {
        "total_ms": float(total_ms),
        "ttft_ms": ttft_ms,
        "itl_ms": [after - before for before, after in pairwise(times)],
        "decode_tokens_per_s": requests * (tokens - 1) / decode_ms * 1000.0,
        "tokens_per_s": requests * tokens / float(total_ms) * 1000.0,
    }


def contradiction(sample: Mapping[str, Any], requests: int, new_tokens: int) -> str | None:
    """What in a sample of `requests` prompts and `new_tokens` each can't be so, worked out from the times alone; None
    where all agrees."""
    steps, total_ms, ttft_ms = sample["itl_ms"], sample["total_ms"], sample["ttft_ms"]
    if len(steps) != new_tokens - 1:
        return f"itl_ms: expected {new_tokens - 1} steps after the first token, got {len(steps)}"
    if not 0 < ttft_ms + sum(steps) <= total_ms * (1 + 1e-9):
        return f"total_ms: the steps take {ttft_ms + sum(steps)} ms, the whole call {total_ms} ms"
    for name, tokens, ms in (
        ("tokens_per_s", new_tokens, total_ms), ("decode_tokens_per_s", new_tokens - 1, total_ms - ttft_ms),
    ):  # fmt: skip
        if not math.isclose(sample[name], requests * tokens / ms * 1e3, rel_tol=1e-9):
            return f"{name}: {requests} requests x {tokens} tokens in {ms} ms are not {sample[name]}"
    return None


def energy_mj_per_token(energy_mj: float, requests: int, new_tokens: int) -> float:
    """Energy of one generate call in mJ, shared out over its requests x N new tokens."""
    return energy_mj / (requests * new_tokens)

"""Which figures of a run are exact, which are timed, and which are shown and never gated. Free of torch.

Definitions, units and which way is better are in `perfbench.figures.metrics.METRICS`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from perfbench.errors import ComparisonError
from perfbench.figures.metrics import METRICS, energy_mj_per_token

# Figure -> the part of a case in run.json that holds it. Two runs of one commit give the same value.
EXACT: dict[str, str] = {
    "parameters_per_tenant": "adapters",
    "bytes_per_tenant": "adapters",
    "aten_ops_per_decode_step": "exact",
    "kernel_launches_per_decode_step": "exact",
    "flops_per_decode_step": "exact",
    "bytes_per_decode_step": "exact",
    "least_flops_per_decode_step": "exact",
    "kept_bound": "exact",
    "peak_allocated_bytes": "memory",
    "adapter_bytes": "memory",
    "kv_cache_bytes": "memory",
}

# Figure -> the field of kernels/resources.json, for each kernel and target. Exact for one version of triton.
COMPILED: dict[str, str] = {
    "compiled_registers": "registers",
    "compiled_spill_bytes": "spill_bytes",
    "compiled_shared_bytes": "shared_bytes",
}

# Taken once a run and noisy: shown, never gated.
SHOWN: dict[str, str] = {
    "peak_reserved_bytes": "memory",
    "peak_device_bytes": "memory",
    "peak_process_bytes": "memory",
    "peak_resident_bytes": "memory",
    "tenants_that_fit": "memory",
    "admit_ms": "adapters",
}

# Sampled in every repetition; a process gives one value of each, the median over its repetitions.
TIMED = ("decode_tokens_per_s", "tokens_per_s", "ttft_ms", "itl_ms", "total_ms", "energy_mj_per_token")


def case_figures(case: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, float | int | None]:
    """The values of EXACT or SHOWN `figures` in one case of a run.json; None where one was not measured.

    Raises ComparisonError where one is no finite number >= 0, which no size, count or share can be.
    """
    for part in set(figures.values()):
        if not isinstance(case[part], dict | None):
            raise ComparisonError(f"{case['id']}: {part}: expected an object or null, got {case[part]!r}; run again")
    found = {figure: (case[part] or {}).get(figure) for figure, part in figures.items()}
    for figure, value in found.items():
        if value is not None and not _is_size(value):
            raise ComparisonError(f"{case['id']}: {figure}: expected a number >= 0 or null, got {value!r}; run again")
    return found


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def sample_figures(sample: Mapping[str, Any], requests: int) -> dict[str, float]:
    """The TIMED figures of one repetition: `itl_ms` as the median over its steps, energy where it was measured.

    Raises ValueError where one is not a finite number > 0.
    """
    figures = {name: sample[name] for name in ("decode_tokens_per_s", "tokens_per_s", "ttft_ms", "total_ms")}
    figures["itl_ms"] = statistics.median(sample["itl_ms"])
    if sample["energy_mj"]:  # 0 where the call was shorter than the meter's step
        new_tokens = len(sample["itl_ms"]) + 1
        figures["energy_mj_per_token"] = energy_mj_per_token(sample["energy_mj"], requests, new_tokens)
    for name, value in figures.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return figures


def medians(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over repetitions that all have it."""
    figures = list(figures)
    common = set[str]().union(*figures).intersection(*figures)
    return {name: statistics.median(one[name] for one in figures) for name in sorted(common)}


def slowdown(figure: str, baseline: float, candidate: float) -> float:
    """The log of how many times worse `candidate` is than `baseline` in a timed figure: 0.05 is about 5% slower.

    Raises ValueError where either is not > 0, which no timed figure can be.
    """
    if not (baseline > 0 and candidate > 0):
        raise ValueError(f"{figure}: expected values > 0, got {baseline} and {candidate}")
    return worse_sign(figure) * math.log(candidate / baseline)


def worse_sign(figure: str) -> int:
    """1 where a larger value of `figure` is worse, else -1."""
    return -1 if METRICS[figure].better == "higher" else 1


def change(figure: str, log_slowdown: float) -> float:
    """A log slow-down as the relative change of the figure itself: tokens/s fall (-0.05) where ms rise (+0.05)."""
    return math.expm1(worse_sign(figure) * log_slowdown)

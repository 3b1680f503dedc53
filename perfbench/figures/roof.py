"""The roof: the least time that a decode step can take, from bytes and operations over a device's speeds.

Free of torch: an adapter is known by its plan, whose tensors may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.shape import MODULES, BackboneShape
from perfbench.spec.backbone_config import parameter_count


@dataclass(frozen=True)
class Device:
    """What a device can do at most: memory bandwidth, floating-point operations a second by dtype (dense, fp32
    accumulation), memory; `source` says where the figures come from."""

    name: str
    bytes_per_s: float
    flops_per_s: Mapping[str, float]
    memory_bytes: int | None
    source: str


def _gpu(name: str, gb_per_s: float, half_tflops: float, fp32_tflops: float, gib: int, source: str) -> Device:
    flops = {"bf16": half_tflops * 1e12, "fp16": half_tflops * 1e12, "fp32": fp32_tflops * 1e12}
    return Device(name, gb_per_s * 1e9, flops, gib * 2**30, source)


# Key -> the vendor's figures; fp32 is that of the plain cores, as torch multiplies fp32 matrices by default.
DEVICES: dict[str, Device] = {
    "a40": _gpu("NVIDIA A40", 696, 149.7, 37.4, 48, "NVIDIA A40 datasheet"),
    "a100-80gb": _gpu("NVIDIA A100 SXM 80GB", 2039, 312, 19.5, 80, "NVIDIA A100 datasheet"),
    "l40s": _gpu("NVIDIA L40S", 864, 362, 91.6, 48, "NVIDIA L40S datasheet"),
    "h100": _gpu("NVIDIA H100 SXM", 3350, 989, 67, 80, "NVIDIA H100 datasheet"),
    "h200": _gpu("NVIDIA H200 SXM", 4800, 989, 67, 141, "NVIDIA H200 datasheet"),
    "rtx-4090": _gpu("NVIDIA GeForce RTX 4090", 1008, 165.2, 82.6, 24, "NVIDIA Ada architecture whitepaper"),
}

# What the driver calls them. Other memory or another form factor has other figures: those are measured.
_DRIVER_NAMES = {
    "a40": r"NVIDIA A40",
    "a100-80gb": r"NVIDIA A100-SXM4-80GB",
    "l40s": r"NVIDIA L40S",
    "h100": r"NVIDIA H100 80GB HBM3",
    "h200": r"NVIDIA H200",
    "rtx-4090": r"NVIDIA GeForce RTX 4090",
}


def find_device(key: str) -> Device:
    """The device of this key. PerfbenchError on another one, with the nearest."""
    if key not in DEVICES:
        raise PerfbenchError(f"--device: unknown device {key!r}; {nearest(key, DEVICES)}")
    return DEVICES[key]


def known_device(driver_name: str) -> Device | None:
    """The device that the driver calls so; None where the table has no such one."""
    return next((DEVICES[key] for key, name in _DRIVER_NAMES.items() if re.fullmatch(name, driver_name)), None)


@dataclass(frozen=True)
class Work:
    """What one decode step must at least do: bytes read, by what they are, and floating-point operations."""

    weight_bytes: int
    cache_bytes: int
    adapter_bytes: int
    flops: int

    @property
    def bytes(self) -> int:
        """All bytes read."""
        return self.weight_bytes + self.cache_bytes + self.adapter_bytes

    def least_s(self, device: Device, dtype: str) -> float:
        """The least seconds on `device`: bytes and operations overlap, the slower of the two counts."""
        return max(self.bytes / device.bytes_per_s, self.flops / device.flops_per_s[dtype])

    def bound_by(self, device: Device, dtype: str) -> str:
        """memory or arithmetic: which of the two it is."""
        return "memory" if self.bytes / device.bytes_per_s >= self.flops / device.flops_per_s[dtype] else "arithmetic"


def decode_step(
    config: Mapping[str, Any],
    dtype: str,
    *,
    prompt_tokens: Iterable[int],
    generated_tokens: int,
    beams: int,
    plan: Iterable[Any] | None,
    served: Iterable[int],
) -> Work:
    """The least work of a step that finds the prompts and `generated_tokens` more of each row in the cache.

    Weights are read once, a prompt's cache once for all its beams, a tenant's adapter once for all its requests, but
    scales made from a prompt once for each. The new cache entries and the embedding's rows are beside the point.
    `prompt_tokens`: of each request; `plan`: one tenant's adapter, sizes only (None: none); `served`: the tenant of
    each request that has one.
    """
    shape, size = BackboneShape.of_config(config), DTYPES[dtype].bytes
    lengths, tenants = list(prompt_tokens), list(served)
    rows = len(lengths) * beams
    embedding = shape.vocab * shape.hidden
    tied = config.get("tie_word_embeddings", config["model_type"] == "gemma")
    weights = parameter_count(config) - (0 if tied else embedding)
    cached = sum(lengths) + generated_tokens * rows
    linears = shape.layers * sum(d_in * d_out for d_in, d_out in map(shape.features, MODULES)) + embedding
    seen = sum(lengths) * beams + (generated_tokens + 1) * rows
    attention = 2 * shape.layers * shape.heads * shape.head_dim * seen
    adapter_bytes = adapter_products = 0
    for layer in plan or ():
        pairs = sum(t.numel() for pair in layer.low_rank.values() for t in (pair.a, pair.b))
        scales = sum(t.numel() for t in layer.scale_minus_one.values())
        made = layer.generator.bias_minus_one.numel() if layer.generator is not None else 0
        adapter_bytes += (len(set(tenants)) * (pairs + scales) + len(tenants) * made) * size
        adapter_products += len(tenants) * beams * (pairs + scales + made)
    return Work(
        weight_bytes=weights * size,
        cache_bytes=2 * shape.layers * shape.kv_heads * shape.head_dim * cached * size,
        adapter_bytes=adapter_bytes,
        flops=2 * (linears * rows + attention + adapter_products),
    )


# A vendor's figures can't be beaten. One that was measured on a machine that others use too may be a bad moment's.
_MARGIN_OF_A_MEASUREMENT = 3.0


def least_ms(comparison: Mapping[str, Any], exact: Mapping[str, Any] | None) -> float | None:
    """The least time of the last decode step of a case on the device of its comparison; None where something is not
    known. exact: the case's figures of a step."""
    roof, exact = comparison.get("roof"), exact or {}
    if not roof or exact.get("bytes_per_decode_step") is None or exact.get("least_flops_per_decode_step") is None:
        return None
    if comparison["dtype"] not in roof["flops_per_s"]:
        return None
    work = Work(exact["bytes_per_decode_step"], 0, 0, exact["least_flops_per_decode_step"])
    device = Device(**{field.name: roof[field.name] for field in fields(Device)})
    return work.least_s(device, comparison["dtype"]) * 1e3


def impossible(comparison: Mapping[str, Any], case: Mapping[str, Any]) -> str | None:
    """Why a measured case can't have been so fast, in a line; None where it can.

    Of the last step's bytes, which are known, at most those of the tokens generated since fall away for the first one.
    """
    last_ms = least_ms(comparison, case["exact"])
    if last_ms is None or not case["summary"]:
        return None
    load = comparison["workload"]
    # Prompts out of a file may be shorter than the length to which they are cut.
    prompt_tokens = 1 if load.get("prompts") else load.get("prompt_tokens") or 1
    margin = _MARGIN_OF_A_MEASUREMENT if comparison["roof"]["memory_bytes"] is None else 1.0
    first_ms = last_ms * prompt_tokens / (prompt_tokens + load["new_tokens"] * load["beams"]) / margin
    median_ms = case["summary"]["itl_ms"]["median"]
    if median_ms >= first_ms:
        return None
    return f"a step took {median_ms:.3g} ms, and what it must read takes {first_ms:.3g} ms at least on this device"

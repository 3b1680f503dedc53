"""The roof: the least time that a decode step can take, from bytes and operations over a device's speeds.

Free of torch: an adapter is known by its plan, whose tensors may be on the meta device.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.methods.dtypes import DTYPES, QUANTISATIONS
from perfbench.methods.shape import MODULES, SHARED_INPUT, BackboneShape
from perfbench.spec.backbone_config import parameter_count, windows


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
    adapters: Iterable[tuple[Iterable[Any], Sequence[int]]] = (),
    quantisation: str = "none",
    ranks: int = 1,
) -> Work:
    """The least work of a step that finds the prompts and `generated_tokens` more of each row in the cache.

    Weights are read once, a prompt's cache once for all its beams, a tenant's adapter once for all its requests, but
    scales made from a prompt once for each. The new cache entries and the embedding's rows are beside the point, and so
    are keys and values of tokens that a layer's window has left behind.
    `prompt_tokens`: of each request; `adapters`: of every kind of adapter its plan, sizes only, and the tenant of each
    request that has one of that kind; `ranks`: how many share the backbone, of which this is one's work, with the sizes
    of its part of the adapters.
    """
    shape, size = BackboneShape.of_config(config).of_rank(ranks), DTYPES[dtype].bytes
    lengths = list(prompt_tokens)
    rows = len(lengths) * beams
    embedding = shape.vocab * shape.hidden
    tied = config.get("tie_word_embeddings", config["model_type"] == "gemma")
    weights = parameter_count(config, ranks) - (0 if tied else embedding)
    linears = shape.layers * sum(d_in * d_out for d_in, d_out in map(shape.features, MODULES)) + embedding
    cached, seen = _tokens(config, lengths, generated_tokens, beams)
    attention = 2 * shape.heads * shape.head_dim * seen
    kinds = [(list(plan), tenants) for plan, tenants in adapters if tenants]
    of_kinds = [_of_adapters(shape, plan, tenants, beams) for plan, tenants in kinds]
    kept = QUANTISATIONS[quantisation]
    quantised = 0  # less than the linears take in `dtype`
    if kept is not None:
        outputs = shape.layers * sum(d_out for _, d_out in map(shape.features, MODULES)) + shape.vocab
        quantised = linears * (size - kept[0]) - outputs * kept[1]
    # What all tenants share is read once.
    shared = max((_shared_numbers(plan) for plan, _ in kinds), default=0)
    return Work(
        weight_bytes=weights * size - quantised,
        cache_bytes=2 * shape.kv_heads * shape.head_dim * cached * size,
        adapter_bytes=(shared + sum(numbers for numbers, _ in of_kinds)) * size,
        flops=2 * (linears * rows + attention + sum(products for _, products in of_kinds)),
    )


def read_piece(config: Mapping[str, Any], dtype: str, *, tokens: int, past: int) -> Work:
    """The least work of reading `tokens` of a prompt without an adapter of which `past` are in the cache: weights and
    cache are read once, and only the last token's logits are made."""
    shape = BackboneShape.of_config(config)
    first = decode_step(config, dtype, prompt_tokens=[past], generated_tokens=0, beams=1)
    logits = 2 * shape.vocab * shape.hidden
    # A token attends to those before it: on average to as many as the first and the last do, or to more, where a
    # window cuts what the last ones see.
    start, end = (_tokens(config, [length], 0, 1)[1] for length in (past, past + tokens - 1))
    further = 4 * shape.heads * shape.head_dim * (end - start) // 2
    return replace(first, flops=tokens * (first.flops - logits + further) + logits)


def _of_adapters(shape: BackboneShape, plan: Sequence[Any], tenants: Sequence[int], beams: int) -> tuple[int, int]:
    """(numbers of their own that are read, products) of a step of requests of these tenants with adapters alike."""
    numbers = products = 0
    for layer in plan:
        # A number that is stored is read once, and multiplied with one of each row.
        stored = sum(t.numel() for t in replace(layer, generator=None).tensors())
        made = layer.generator.bias_minus_one.numel() if layer.generator is not None else 0
        numbers += len(set(tenants)) * stored + len(tenants) * made
        # An addition is half of the two operations that a product is counted as.
        added = sum(bias.numel() for bias in layer.bias.values())
        summed = sum(
            shape.features(modules[0])[0] // 2
            for modules in SHARED_INPUT.values()
            if any(module in layer.grouped for module in modules)
        )
        # Modules that read the same input share the first half of a shared pair.
        shared = sum(pair.b.numel() for pair in layer.shared.values()) + sum(
            next((layer.shared[module].a.numel() for module in modules if module in layer.shared), 0)
            for modules in SHARED_INPUT.values()
        )
        products += len(tenants) * beams * (stored - added // 2 + made + summed + shared)
    return numbers, products


def _tokens(config: Mapping[str, Any], lengths: list[int], generated_tokens: int, beams: int) -> tuple[int, int]:
    """(tokens whose keys and values are read, tokens that the rows attend to, each itself too), over all layers."""
    cached = seen = 0
    for window, layers in Counter(windows(config)).items():
        for length in lengths:
            before = length + generated_tokens if window is None else window - 1
            generated = min(generated_tokens, before)
            prompt = min(length, before - generated)
            cached += layers * (prompt + beams * generated)
            seen += layers * beams * (prompt + generated + 1)
    return cached, seen


def _shared_numbers(plan: Iterable[Any]) -> int:
    """Of the two matrices that shared pairs are parts of, which a step reads once, at least."""
    pairs = [pair for layer in plan for pair in layer.shared.values()]
    return sum(max((getattr(pair, half).numel() for pair in pairs), default=0) for half in ("a", "b"))


def least_s_of_step(first: Work, last: Work, step: int, steps: int, device: Device, dtype: str) -> float:
    """The least seconds of one `step` of `steps` in a row, counted from 0: what a step reads and computes grows by the
    same each time, or by less from where a window is full, so that it is never less than on the line between."""
    part = step / (steps - 1) if steps > 1 else 1.0
    found_bytes, found_flops = (
        round(start + (end - start) * part) for start, end in ((first.bytes, last.bytes), (first.flops, last.flops))
    )
    return Work(found_bytes, 0, 0, found_flops).least_s(device, dtype)


# A vendor's figures can't be beaten. One that was measured on a machine that others use too may be a bad moment's.
_MARGIN_OF_A_MEASUREMENT = 3.0


def least_ms(comparison: Mapping[str, Any], case: Mapping[str, Any]) -> float | None:
    """The median of the least times of a case's decode steps on the device of its comparison; None where something is
    not known.

    No median of measured steps can be below it: each step takes its own bound at least, and so does the middle one.
    """
    roof, exact, load = comparison.get("roof"), case["exact"] or {}, comparison["workload"]
    if not roof or exact.get("bytes_per_decode_step") is None or exact.get("least_flops_per_decode_step") is None:
        return None
    steps = load.get("new_tokens", 1) - 1
    if comparison["dtype"] not in roof["flops_per_s"] or steps < 1:
        return None
    last = Work(exact["bytes_per_decode_step"], 0, 0, exact["least_flops_per_decode_step"])
    flops = exact.get("least_flops_per_first_decode_step")
    if exact.get("bytes_per_first_decode_step") is None or flops is None:
        first = _first_of_an_older_run(last, load, case.get("memory") or {})
    else:
        first = Work(exact["bytes_per_first_decode_step"], 0, 0, flops)
    device = Device(**{field.name: roof[field.name] for field in fields(Device)})
    middle = ((steps - 1) // 2, steps // 2)  # the bounds only grow
    return sum(least_s_of_step(first, last, step, steps, device, comparison["dtype"]) for step in middle) / 2 * 1e3


def impossible(comparison: Mapping[str, Any], case: Mapping[str, Any]) -> str | None:
    """Why a measured case can't have been so fast, in a line; None where it can."""
    least = least_ms(comparison, case)
    if least is None or not case["summary"]:
        return None
    least /= _MARGIN_OF_A_MEASUREMENT if comparison["roof"]["memory_bytes"] is None else 1.0
    measured = case["summary"]["itl_ms"]["median"]
    if measured >= least:
        return None
    return f"a step took {measured:.3g} ms, and what it must read takes {least:.3g} ms at least on this device"


def _first_of_an_older_run(last: Work, load: Mapping[str, Any], memory: Mapping[str, Any]) -> Work:
    """At most the first step's work: of the last one's cache, the part of the tokens generated since falls away."""
    # Prompts out of a file may be shorter than the length to which they are cut.
    prompt_tokens = 1 if load.get("prompts") else load.get("prompt_tokens") or 1
    generated = load["new_tokens"] * load.get("beams", 1)
    part = generated / (prompt_tokens + generated)
    cache = min(last.bytes, memory.get("kv_cache_bytes") or last.bytes)
    return Work(int(last.bytes - cache * part), 0, 0, int(last.flops * (1 - part)))

"""`perfbench roof`: what every method could reach at most on a device, without running anything."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.figures.roof import Device, Work, decode_step, least_s_of_step
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.report.plain_tables import PlainTables
from perfbench.report.tables import Column
from perfbench.spec.backbone_config import find_config

_MIB = 2**20
COLUMNS = (
    Column("method", lambda row: row["method"], text=True),
    Column("weight\nMiB", lambda row: f"{row['weight_bytes'] / _MIB:,.0f}"),
    Column("cache\nMiB", lambda row: f"{row['cache_bytes'] / _MIB:,.0f}"),
    Column("adapter\nMiB", lambda row: f"{row['adapter_bytes'] / _MIB:,.1f}"),
    Column("first\nms", lambda row: f"{row['first_step_ms']:,.2f}"),
    Column("last\nms", lambda row: f"{row['last_step_ms']:,.2f}"),
    Column("tokens/s\nat most", lambda row: f"{row['most_tokens_per_s']:,.0f}"),
    Column("kept\nmax %", lambda row: f"{row['most_kept'] * 100:.1f}"),
    Column("bound by", lambda row: row["bound_by"], text=True),
)


@dataclass(frozen=True)
class Question:
    """What is asked: counts of requests to go through, `tenants` (None: one for each request), and the lengths."""

    backbone: str
    dtype: str
    requests: tuple[int, ...]
    tenants: int | None
    prompt_tokens: int
    new_tokens: int
    beams: int
    quantisation: str = "none"


def bounds(question: Question, requests: int) -> dict[str, tuple[Work, Work]]:
    """Method -> the least work of the first and of the last decode step of such a batch, `none` first.

    PerfbenchError for more tokens than the context, or more tenants than requests; BackboneError.
    """
    from perfbench.methods import parameters

    config = find_config(question.backbone)
    shape = BackboneShape.of_config(config)
    tokens = question.prompt_tokens + question.new_tokens
    if tokens > shape.context:
        raise PerfbenchError(
            f"--prompt-tokens: expected at most {shape.context} tokens, the context of {question.backbone}, "
            f"got {question.prompt_tokens} + {question.new_tokens} new ones; lower one of them"
        )
    tenants = requests if question.tenants is None else question.tenants
    if tenants > requests:
        raise PerfbenchError(f"--tenants: expected at most the {requests} requests, got {tenants}; lower it")
    found = {}
    for name, method in METHODS.items():
        if not method.has_one_size:
            continue
        served = [request % tenants for request in range(requests)]
        adapters = [] if name == "none" else [(parameters.meta_plan(name, shape, method.options()), served)]
        first, last = (
            decode_step(
                config,
                question.dtype,
                prompt_tokens=[question.prompt_tokens] * requests,
                generated_tokens=generated,
                beams=question.beams,
                adapters=adapters,
                quantisation=question.quantisation,
            )
            for generated in (0, max(question.new_tokens - 2, 0))
        )
        found[name] = first, last
    return found


def table(question: Question, device: Device) -> PlainTables:
    """A table for each number of requests. PerfbenchError and BackboneError as `bounds`."""
    note = (
        f"{device.name}: {device.bytes_per_s / 1e9:,.0f} GB/s, "
        f"{device.flops_per_s[question.dtype] / 1e12:,.1f} TFLOP/s in {question.dtype} ({device.source}).\n"
        "Bytes: of the last decode step. A step's least time grows with the cache, from the first to the last; "
        "tokens/s and kept, the share of the bare backbone's speed, are those of all decode steps together. Bytes "
        "are read once, operations overlap them; nothing that runs can be faster."
    )
    return PlainTables(COLUMNS, [_part(question, device, requests) for requests in question.requests], note)


def _part(question: Question, device: Device, requests: int) -> tuple[str, list[dict[str, Any]]]:
    tenants = requests if question.tenants is None else question.tenants
    weights = "" if question.quantisation == "none" else f" {question.quantisation}"
    title = (
        f"{question.backbone} {question.dtype}{weights} on {device.name}; prompt {question.prompt_tokens}, new "
        f"{question.new_tokens}, beams {question.beams}, requests {requests}, tenants {tenants}"
    )
    work, steps = bounds(question, requests), max(question.new_tokens - 1, 1)
    least = {
        name: [least_s_of_step(first, last, step, steps, device, question.dtype) for step in range(steps)]
        for name, (first, last) in work.items()
    }
    asked = {"backbone": question.backbone, "dtype": question.dtype, "quantisation": question.quantisation,
             "device": device.name, "requests": requests, "tenants": tenants}  # fmt: skip
    rows = [
        {
            **asked,
            "method": name,
            "weight_bytes": last.weight_bytes,
            "cache_bytes": last.cache_bytes,
            "adapter_bytes": last.adapter_bytes,
            "first_step_ms": least[name][0] * 1e3,
            "last_step_ms": least[name][-1] * 1e3,
            "most_tokens_per_s": requests * steps / sum(least[name]),
            "most_kept": sum(least["none"]) / sum(least[name]),
            "bound_by": last.bound_by(device, question.dtype),
        }
        for name, (_, last) in work.items()
    ]
    return title, rows

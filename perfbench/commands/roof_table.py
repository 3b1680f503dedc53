"""`perfbench roof`: what every method could reach at most on a device, without running anything."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfbench.errors import PerfbenchError
from perfbench.figures.roof import Device, Work, decode_step, least_s_of_step
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import find_config

_MIB = 2**20


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
            )
            for generated in (0, max(question.new_tokens - 2, 0))
        )
        found[name] = first, last
    return found


def render(question: Question, device: Device, console: Console | None = None) -> None:
    """Prints a table for each number of requests."""
    console = console or Console()
    for requests in question.requests:
        work = bounds(question, requests)
        console.print(_table(question, device, requests, work))
    console.print(
        Text(
            f"{device.name}: {device.bytes_per_s / 1e9:,.0f} GB/s, "
            f"{device.flops_per_s[question.dtype] / 1e12:,.1f} TFLOP/s in {question.dtype} ({device.source}).\n"
            "Bytes: of the last decode step. A step's least time grows with the cache, from the first to the last; "
            "tokens/s and kept, the share of the bare backbone's speed, are those of all decode steps together. Bytes "
            "are read once, operations overlap them; nothing that runs can be faster.",
            "dim",
        )
    )


def _table(question: Question, device: Device, requests: int, work: dict[str, tuple[Work, Work]]) -> Table:
    tenants = requests if question.tenants is None else question.tenants
    title = (
        f"{question.backbone} {question.dtype} on {device.name}; prompt {question.prompt_tokens}, new "
        f"{question.new_tokens}, beams {question.beams}, requests {requests}, tenants {tenants}"
    )
    table = Table(title=Text(title, "bold"), title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("method", no_wrap=True)
    heads = (
        "weight\nMiB",
        "cache\nMiB",
        "adapter\nMiB",
        "first\nms",
        "last\nms",
        "tokens/s\nat most",
        "kept\nmax %",
    )
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("bound\nby", no_wrap=True)
    steps = max(question.new_tokens - 1, 1)
    least = {
        name: [least_s_of_step(first, last, step, steps, device, question.dtype) for step in range(steps)]
        for name, (first, last) in work.items()
    }
    for name, (_, last) in work.items():
        steps_s = least[name]
        table.add_row(
            name,
            f"{last.weight_bytes / _MIB:,.0f}",
            f"{last.cache_bytes / _MIB:,.0f}",
            f"{last.adapter_bytes / _MIB:,.1f}",
            f"{steps_s[0] * 1e3:,.2f}",
            f"{steps_s[-1] * 1e3:,.2f}",
            f"{requests * len(steps_s) / sum(steps_s):,.0f}",
            f"{sum(least['none']) / sum(steps_s) * 100:.1f}",
            last.bound_by(device, question.dtype),
        )
    return table

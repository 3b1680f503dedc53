"""The memory that a run needs at the very least, from configs alone, against what this machine has. Free of torch.

Counted are the weights, the adapters of the arm that takes most, and the keys and values of a batch: what must be there
together, whatever the runtime adds. A run that can't fit would be ended by the kernel, or slow the machine to a halt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import psutil

from perfbench.errors import ScenarioError
from perfbench.figures.roof import decode_step
from perfbench.files.plain_text import format_bytes
from perfbench.machine import environment
from perfbench.machine.nvml import Nvml
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec import backbone_config, cost
from perfbench.spec.cases import Case, Comparison, kinds_of
from perfbench.spec.scenario import Scenario


@dataclass(frozen=True)
class Needed:
    """Bytes, at the least: `adapters` those of `arm`, the largest; `cache` the keys and values of the batch."""

    weights: int
    adapters: int
    arm: str
    cache: int

    @property
    def bytes(self) -> int:
        """All of them."""
        return self.weights + self.adapters + self.cache


def of_comparison(comparison: Comparison, config: dict[str, Any]) -> Needed:
    """What it needs on the backbone of `config`. Adapters out of folders count nothing: their sizes are not in it."""
    load, size = comparison.workload, DTYPES[comparison.dtype].bytes
    numbers = _numbers_of_a_tenant(BackboneShape.of_config(config))
    largest = max(comparison.cases, key=numbers)
    last = decode_step(
        config,
        comparison.dtype,
        prompt_tokens=[load.prompt_tokens or 1] * load.requests,
        generated_tokens=load.new_tokens + load.follow_up_tokens - 1,  # the last one is never read
        beams=load.beams,
        quantisation=comparison.quantisation,
    )
    weights, ranks = backbone_config.parameter_count(config) * size, comparison.tensor_parallel_size
    if comparison.quantisation != "none":
        weights = last.weight_bytes + config["vocab_size"] * config["hidden_size"] * size  # the embedding stays
    if ranks > 1:
        # Each rank holds its part beside the whole, of which the proof and the adapters' scales are made.
        weights += backbone_config.parameter_count(config, ranks) * size
        weights *= ranks if comparison.device == "cpu" else 1
    return Needed(
        weights=weights,
        adapters=numbers(largest) * (load.resident + 1) * size,  # the bank has an empty slot beside
        arm=largest.arm,
        cache=last.cache_bytes,
    )


def _numbers_of_a_tenant(shape: BackboneShape) -> Callable[[Case], int]:
    from perfbench.methods import parameters

    def numbers(case: Case) -> int:
        if METHODS[case.method].served_by == "merged":  # in the weights, of one tenant at a time
            return 0
        if METHODS[case.method].module is None or getattr(case.options, "adapters", None) is not None:
            return 0
        # A slot of the bank has room for the largest, at least.
        return max(parameters.served_count(own.method, shape, own.options) for own in kinds_of(case))

    return numbers


def there_is(device_kind: str) -> int | None:
    """Bytes of this machine's memory, or of its largest GPU's, whoever has them now; None where nothing says so."""
    if device_kind == "cpu":
        total: int = psutil.virtual_memory().total
        limit = environment.limits()["memory_bytes"]
        return total if limit is None else min(total, int(limit))
    return max((found for gpu in Nvml.devices() if (found := gpu.device_total_bytes()) is not None), default=None)


def check(scenario: Scenario, comparisons: Sequence[Comparison]) -> None:
    """ScenarioError, with the figures, where a comparison needs more memory than there is."""
    there = there_is(scenario.device)
    if there is None:
        return
    config_of = cache(backbone_config.find_config)
    for comparison in comparisons:
        needed = of_comparison(comparison, config_of(comparison.backbone))
        if needed.bytes > there:
            load = comparison.workload
            raise ScenarioError(
                f"{scenario.source.origin(())}: {comparison.id}: expected at most the {format_bytes(there)} of memory "
                f"of this {'machine' if scenario.device == 'cpu' else 'GPU'}, got {format_bytes(needed.bytes)} at the "
                f"least: weights {format_bytes(needed.weights)}, adapters of {load.resident:,} tenants "
                f"{format_bytes(needed.adapters)} ({needed.arm}), keys and values of {load.requests:,} requests "
                f"{format_bytes(needed.cache)}; choose a smaller one, or say {cost.LIFTED}"
            )

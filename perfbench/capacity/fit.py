"""What must lie in a device's memory together, and what an adapter is there. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.figures.roof import decode_step
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import parameter_count
from perfbench.spec.traffic import Traffic


def plan_of(method: str, options: Any, config: Mapping[str, Any]) -> Sequence[Any]:
    """The plan of a tenant's adapter, sizes only; empty for the bare backbone."""
    from perfbench.methods import parameters

    if METHODS[method].module is None:
        return ()
    return parameters.sized_plan(method, BackboneShape.of_config(config), options)


def bytes_of(plan: Sequence[Any], dtype: str) -> int:
    """What an adapter of this plan takes in the bank."""
    return sum(tensor.numel() for layer in plan for tensor in layer.tensors()) * DTYPES[dtype].bytes


def reads_whole(plan: Sequence[Any]) -> bool:
    """Whether its scales are made of a prompt's last token, so that the prompt is read in one piece."""
    return any(layer.generator is not None for layer in plan)


@dataclass(frozen=True)
class Memory:
    """Bytes: of the device, of the weights, of the keys and values of the longest request, of a tenant's adapter.

    What a runtime needs beside them is not in it: what is found to fit is the most that could.
    """

    device: int
    weights: int
    cache_of_row: int
    adapter: int

    @classmethod
    def of(cls, config: Mapping[str, Any], dtype: str, traffic: Traffic, device: int, adapter: int) -> Memory:
        """On the backbone of `config`; the cache is what a row has room for, the longest request."""
        longest = decode_step(
            config,
            dtype,
            prompt_tokens=[traffic.prompt_tokens.most],
            generated_tokens=traffic.new_tokens.most - 1,  # the last one is never read
            beams=1,
        )
        weights = parameter_count(config) * DTYPES[dtype].bytes
        return cls(device, weights, longest.cache_bytes, adapter)

    def of_rows(self, rows: int) -> int:
        """Weights, and of each row the cache and the copy of its adapter that runtime `continuous` makes."""
        return self.weights + rows * (self.cache_of_row + self.adapter)

    def resident(self, rows: int) -> int:
        """How many adapters fit beside so many rows and the bank's empty slot, below 0 where not even these do. Without
        adapters 0."""
        left = self.device - self.of_rows(rows)
        if not self.adapter:
            return 0 if left >= 0 else -1
        return left // self.adapter - 1

"""One method with its tenants on the static runtime."""

from __future__ import annotations

from typing import Any

import torch

from perfbench.backbone import Backbone
from perfbench.methods.bank import Bank
from perfbench.runtimes.generation import Batch, Generation, StepClock
from perfbench.runtimes.static.adapters import bind
from perfbench.runtimes.static.cache import CacheSize, KVCache
from perfbench.runtimes.static.decoder import Decoder
from perfbench.runtimes.static.search import beam, beam_to_the_end, greedy
from perfbench.runtimes.static.weights import fuse


class StaticArm:
    """The adapters of a bank (or none) over the fused weights; the cache stays from call to call."""

    def __init__(self, backbone: Backbone, bank: Bank | None, kernels: str):
        self.weights = fuse(backbone)
        self.model: Any = backbone.model
        self.bank = bank
        self.kernels = kernels
        self.cache: KVCache | None = None

    def generate(
        self,
        batch: Batch,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """As `generation.generate`. Taking the batch's adapters out of the bank is part of the call and its time."""
        with torch.inference_mode():
            layers = bind(self.bank, self.weights.shape, batch.slots, stack=self.kernels == "eager")
            decoder = Decoder(self.weights, layers, self._cache_for(batch), batch, self.kernels)
            if batch.beams == 1:
                return greedy(decoder, clock, forced, with_logits)
            if batch.eos and forced is None and not with_logits:
                return beam_to_the_end(decoder, clock)
            return beam(decoder, clock, forced, with_logits)

    def _cache_for(self, batch: Batch) -> KVCache:
        requests, prompt_tokens = batch.input_ids.shape
        size = CacheSize(requests, batch.beams, prompt_tokens, batch.new_tokens)
        if self.cache is None or self.cache.size != size:
            self.cache = None  # gives the old one back before the new one is taken
            self.cache = KVCache(size, self.weights.shape, self.weights.dtype, self.weights.device)
        return self.cache

    def tensors(self) -> list[torch.Tensor]:
        """The bank's stacks, the cache, and the table of rotations."""
        held = self.bank.tensors() if self.bank else []
        held += self.cache.tensors() if self.cache else []
        return [*held, self.weights.cos, self.weights.sin]

    def close(self) -> None:
        """Drops the cache and the bank."""
        self.model = self.bank = self.cache = None

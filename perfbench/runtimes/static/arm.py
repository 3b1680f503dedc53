"""One method with its tenants on the static runtime."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from perfbench.methods.bank import Bank
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch, Generation, StepClock
from perfbench.runtimes.shared_context import invoked
from perfbench.runtimes.static.adapters import Adapters, rooms, stacked_slots
from perfbench.runtimes.static.cache import CacheSize
from perfbench.runtimes.static.capture import Step, cuda_graph, run_again
from perfbench.runtimes.static.decoder import Decoder
from perfbench.runtimes.static.search import beam, beam_to_the_end, greedy
from perfbench.runtimes.static.weights import fuse


class StaticArm:
    """The adapters of a bank (or none) over the fused weights; the decoder of the last size of batch stays.

    capture: how a decode step becomes a thing to replay; by default a CUDA graph on a GPU, and elsewhere only what is
    compiled, as it is.
    """

    def __init__(
        self, backbone: Backbone, bank: Bank | None, kernels: str, capture: Callable[[Step], Step] | None = None
    ):
        self.weights = fuse(backbone, self)
        self.model: Any = backbone.model
        self.bank = bank
        self.kernels = kernels
        if capture is None:
            capture = cuda_graph if backbone.device.type == "cuda" else run_again if kernels == "compiled" else None
        self.capture = capture
        self.decoder: Decoder | None = None
        self._decodes: Any = None  # what the decoder was made for
        self._adapters = 0  # stacked at most, so far

    def generate(
        self,
        batch: Batch,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """As `generation.generate`. Taking the batch's adapters out of the bank is part of the call and its time."""
        batch = invoked(batch, self.bank)
        with torch.inference_mode():
            decoder = self._decoder_for(batch)
            decoder.start(batch)
            if batch.beams == 1:
                return greedy(decoder, decoder.prefill(), clock, forced, with_logits)
            if batch.eos and forced is None and not with_logits:
                return beam_to_the_end(decoder, clock)
            return beam(decoder, clock, forced, with_logits)

    def follow_up(
        self,
        generated: torch.Tensor,
        *,
        clock: StepClock | None = None,
        forced: torch.Tensor | None = None,
        with_logits: bool = False,
    ) -> Generation:
        """The second turn of the batch that `generate` was last called with (greedy, with a follow_up), whose first
        turn gave `generated` int64 [Q, N]. Reads the first turn's cache where the method allows it: RuntimeError where
        another arm has had a turn in that cache since."""
        assert self.decoder is not None
        with torch.inference_mode():
            logits = self.decoder.prefill_follow_up(generated)
            return greedy(self.decoder, logits, clock, forced, with_logits)

    def reserve(self, batch: Batch) -> int:
        """Makes room in the weights' tails for the adapters of such a batch, of which it returns the number. Later it
        would move weights under the feet of arms that have captured a step."""
        if self.bank is None:
            return 0
        adapters = len(stacked_slots(batch.slots, self.kernels)[0])
        if adapters > self._adapters:
            self._adapters = adapters
            self.weights.hold(self, rooms(self.bank, adapters))
        return adapters

    def _decoder_for(self, batch: Batch) -> Decoder:
        requests, prompt_tokens = batch.input_ids.shape
        follow_up_tokens = 0 if batch.follow_up is None else batch.follow_up.shape[1]
        size = CacheSize(requests, batch.beams, prompt_tokens, batch.new_tokens, follow_up_tokens)
        padded = not bool(batch.attention_mask.all())
        adapters = self.reserve(batch)
        wanted = (size, padded, adapters, self.weights.version)
        if self.decoder is None or self._decodes != wanted:
            self.decoder = None  # gives the old one back before the new one is taken
            self.decoder, self._decodes = self._make(size, adapters, padded=padded), wanted
        return self.decoder

    def _make(self, size: CacheSize, adapters: int, *, padded: bool) -> Decoder:
        weights = self.weights
        taken = Adapters(self.bank, weights, size.requests, adapters, self.kernels) if self.bank else None
        return Decoder(weights, taken, weights.cache(size), self.kernels, self.capture, padded=padded)

    def tensors(self) -> list[torch.Tensor]:
        """The bank, the adapters of the last batch, the cache, and the table of rotations: all that the arm needs, also
        where it shares the cache with other arms."""
        held = self.bank.tensors() if self.bank else []
        if self.decoder is not None:
            held += self.decoder.cache.tensors()
            held += self.decoder.adapters.tensors() if self.decoder.adapters else []
        return [*held, self.weights.cos, self.weights.sin]

    @property
    def compile_ms(self) -> float | None:
        """Milliseconds that compiling the decode step of the last batch took; None where nothing was compiled."""
        return None if self.decoder is None else self.decoder.compile_ms

    def close(self) -> None:
        """Drops the bank, lets the weights' tails go, and the cache where no other arm holds it."""
        self.weights.let_go(self)
        self.model = self.bank = self.decoder = None

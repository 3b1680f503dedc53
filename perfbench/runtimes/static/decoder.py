"""The forward pass of one batch: the prompts at once, then a token for each row at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch

from perfbench.kernels import decode_attention
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.shared_context import acting, reusable
from perfbench.runtimes.static.adapters import Adapters
from perfbench.runtimes.static.cache import KVCache
from perfbench.runtimes.static.capture import Step, weak
from perfbench.runtimes.static.compiled import STEPS
from perfbench.runtimes.static.forward import Forward, View
from perfbench.runtimes.static.weights import Weights


class Decoder(Forward):
    """Weights, adapters and cache for batches of one size. `start` one, `prefill` it, then `step` by step; never waits
    for the device in between.

    capture None: every step sees as much of the cache as is there, cut by the host. Else the step has one size for
    all, its length is on the device, and `capture` makes it a thing to replay. Other decoders may use the cache too,
    but not between `start` and the last step.
    """

    def __init__(
        self,
        weights: Weights,
        adapters: Adapters | None,
        cache: KVCache,
        kernels: str,
        capture: Callable[[Step], Step] | None,
        *,
        padded: bool,
    ):
        super().__init__(weights, adapters.layers if adapters else None, adapters.own if adapters else None, kernels)
        self.adapters, self.cache = adapters, cache
        self._bare = Forward(weights, None, None, kernels)
        self.steps = 0
        size, device = cache.size, weights.device
        rows = size.requests * size.beams
        self._rows = torch.arange(rows, device=device)
        self._lengths = torch.empty(rows, dtype=torch.int64, device=device)
        self._padding: torch.Tensor | None = None
        if padded:
            capacity = size.prompt_tokens + size.places
            self._padding = torch.ones(size.requests, 1, 1, capacity, dtype=torch.bool, device=device)
        self._capture = capture
        self._replay: Step | None = None
        self._tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)
        self._logits = torch.empty(0, device=device)
        self._mask = decode_attention.MASKS[kernels]
        self._entries = cache.whole() if kernels == "compiled" else cache.entries
        self._compute = STEPS[kernels](Decoder._write_logits, device)
        self.compile_ms: float | None = None  # what compiling the step took, where it is compiled and was

    def start(self, batch: Batch) -> None:
        """Takes a batch of this decoder's size: its adapters and its padding, copied to where the steps find them."""
        self.batch = batch
        self._turn = self.cache.begin(clear=self._capture is not None)
        self._begin(0)
        torch.sum(batch.attention_mask.repeat_interleave(batch.beams, dim=0), dim=1, out=self._lengths)
        if self._padding is not None:
            self._padding[:, 0, 0, : batch.attention_mask.shape[1]] = batch.attention_mask
        if self.adapters is not None:
            self.adapters.take(batch.slots)

    def _begin(self, place: int) -> None:
        """The next step is the first of a turn, and puts its keys and values at `place` after the prompt."""
        self.steps, self._first_place = 0, place
        self._at.fill_(place)

    def prefill(self) -> torch.Tensor:
        """Reads the prompts; logits [Q, V] of what follows them.

        What all of them begin with is read once, by the bare backbone, where no adapter of the batch acts on it.
        """
        batch, bank = self.batch, self.adapters.bank if self.adapters else None
        acts = None if bank is None else acting(batch)
        if not reusable(batch, bank):
            return self._read(batch.input_ids, 0, batch.attention_mask, acts)
        shared = batch.shared_tokens
        first = [entry[:1] for entry in self.cache.prompt]
        self._bare.read(batch.input_ids[:1, :shared], 0, batch.attention_mask[:1, :shared], first, None)
        for entry in self.cache.prompt:
            entry[1:, :, :, :shared] = entry[:1, :, :, :shared]
        if acts is not None:
            acts = acts[:, shared:] if max(batch.acts_from) > shared else None
        return self._read(batch.input_ids[:, shared:], shared, batch.attention_mask, acts)

    def prefill_follow_up(self, generated: torch.Tensor) -> torch.Tensor:
        """Reads the second turn, after `generated` int64 [Q, N] of the first; logits [Q, V] of what follows it.

        Goes on from the first turn's cache, unless scales are generated from the last prompt token: they are others
        now, and with them all keys and values, so that the whole conversation is read.
        """
        batch, size = self.batch, self.cache.size
        assert batch.follow_up is not None
        if self.cache.interrupted(self._turn):
            raise RuntimeError("another arm has used the cache since the first turn: generate that again, then this")
        whole = batch.conversation(generated)
        past = size.prompt_tokens + size.new_tokens - 1
        if any(layer.generator is not None for layer in self.layers):
            past = 0
        self._begin(size.new_tokens + batch.follow_up.shape[1])
        return self._read(whole.input_ids[:, past:], past, whole.attention_mask)

    def _read(
        self, ids: torch.Tensor, past: int, attention_mask: torch.Tensor, acts: torch.Tensor | None = None
    ) -> torch.Tensor:
        allowed = self._allowed(past, past + ids.shape[1])
        return self.read(ids, past, attention_mask, self.cache.prompt, allowed, acts)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Takes one more token of each row, int64 [rows]; logits [rows, V] of what follows, until the next step."""
        if self._capture is None:
            logits = self.run(tokens, self._growing_view())
        else:
            self._tokens.copy_(tokens)
            if self._replay is None:
                self._replay = self._capture(weak(self._fixed_step))
            self._replay()
            self._at.add_(1)
            logits = self._logits
        self.steps += 1
        return logits

    def follow(self, sources: torch.Tensor) -> None:
        """Makes row r the continuation of row sources[r], int64 [rows]; only indices move."""
        ancestors = self.cache.ancestors if self._capture else self.cache.ancestors[:, : self.steps]
        ancestors.copy_(ancestors[sources])

    def _fixed_step(self) -> None:
        """The step on what lies in fixed tensors; run twice it does the same."""
        self._compute(self)

    def _write_logits(self) -> None:
        self._logits = self.run(self._tokens, self._fixed_view())

    def _growing_view(self) -> View:
        """The cache up to this step, as far as the host knows it."""
        weights, cache, n = self.weights, self.cache, self._first_place + self.steps
        prompt_tokens, one_beam = cache.size.prompt_tokens, cache.size.beams == 1
        if self._padding is None:
            cos, sin = (t[prompt_tokens + n : prompt_tokens + n + 1] for t in (weights.cos, weights.sin))
        else:
            cos, sin = weights.cos[self._lengths + n], weights.sin[self._lengths + n]
        end = prompt_tokens + n + 1 if one_beam else prompt_tokens
        where = None
        if not one_beam:
            cache.ancestors[:, n] = self._rows
            steps = torch.arange(n + 1, device=self._rows.device)
            where = cache.ancestors[:, : n + 1] + steps * len(self._rows)
        return View(
            cos, sin, entries=[entry[n] for entry in cache.entries], at=None,
            prompt=[entry[:, :, :, :end] for entry in cache.prompt], generated=cache.generated, where=where,
            mask=None if self._padding is None else self._padding[..., :end], filled=None,
        )  # fmt: skip

    def _fixed_view(self) -> View:
        """The whole cache, and on the device how much of it is there."""
        weights, cache, at = self.weights, self.cache, self._at
        positions, filled, where = self._lengths + at, at + 1, None
        length, places = cache.size.prompt_tokens, cache.size.places
        mask = self._mask(self._padding, filled, length, places)
        if cache.size.beams > 1:
            cache.ancestors.index_copy_(1, at, self._rows.unsqueeze(1))
            steps = torch.arange(places, device=at.device)
            where = cache.ancestors + steps * len(self._rows)
        else:
            filled = filled + length
        return View(
            weights.cos[positions], weights.sin[positions], entries=self._entries, at=at,
            prompt=cache.prompt, generated=cache.generated, where=where, mask=mask, filled=filled,
        )  # fmt: skip

    def _allowed(self, past: int, end: int) -> torch.Tensor | None:
        """bool [Q or 1, 1, C, end] of C = end - past tokens, or None for the plain causal mask.

        Padding sees itself, so that no row is empty: its values would be NaN, which no weight of 0 makes harmless.
        """
        if self._padding is None and not past:
            return None
        places = torch.arange(end, device=self._at.device)
        causal, itself = places[past:, None] >= places, places[past:, None] == places
        return causal[None, None] if self._padding is None else (causal & self._padding[..., :end]) | itself

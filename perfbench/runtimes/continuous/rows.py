"""The rows of one cache, each of which holds a request of its own length with its own adapter.

The rows in use are the first ones: where a request ends, another row is moved to its place, so that a decode step reads
and computes nothing for rows that are empty. A request is read in one piece or in several, beside others' steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from perfbench.methods.bank import Bank
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.row_adapters import OfRows, RowAdapters
from perfbench.runtimes.static.cache import CacheSize
from perfbench.runtimes.static.forward import Forward, View
from perfbench.runtimes.static.weights import Weights, fuse


class Step(Forward):
    """A decode step of rows whose tokens go to places of their own."""

    def __init__(self, weights: Weights, some: OfRows, rows: int, kernels: str, cache: Sequence[torch.Tensor]):
        """cache: [>= rows, 2, H_kv, capacity, D] of each layer, contiguous."""
        super().__init__(weights, *some, kernels)
        self._cache = [entry[:rows] for entry in cache]
        self._heads = [entry.view(-1, entry.shape[-1]) for entry in cache]  # [rows x 2 x H_kv x capacity, D]
        entry = self._cache[0]
        self._made = entry.new_empty(entry[:, :, :, 0].shape)
        first = torch.arange(self._made[..., 0].numel(), device=weights.device) * entry.shape[3]
        self._first = first.view(rows, -1)
        self._to: torch.Tensor | None = None

    def take(self, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
        """One more token of each row, int64 [rows], after lengths[row] others; logits [rows, V]."""
        weights, end = self.weights, max(lengths) + 1
        prompt = [entry[:, :, :, :end] for entry in self._cache]
        if min(lengths) == end - 1:
            self._to = None
            entries = [entry[:, :, :, end - 1] for entry in self._cache]
            cos, sin, mask = weights.cos[end - 1 : end], weights.sin[end - 1 : end], None
        else:
            places = torch.tensor(lengths, device=tokens.device)
            self._to = (self._first + places[:, None]).flatten()
            entries = self._heads
            mask = (torch.arange(end, device=tokens.device) <= places[:, None])[:, None, None]
            cos, sin = weights.cos[places], weights.sin[places]
        view = View(cos, sin, entries=entries, at=None, prompt=prompt, generated=(), where=None, mask=mask, filled=None)
        return self.run(tokens, view)

    def _finish_qkv(
        self, i: int, qkv: torch.Tensor, h: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor,
        entry: torch.Tensor, at: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        """Where the rows differ in length, keys and values are made side by side and then go to their places."""
        if self._to is None:
            return super()._finish_qkv(i, qkv, h, cos, sin, entry, at)
        q = super()._finish_qkv(i, qkv, h, cos, sin, self._made, at)
        entry.index_copy_(0, self._to, self._made.view(-1, entry.shape[1]))
        return q


class Rows:
    """Up to `most` rows of at most `capacity` tokens each, over the weights of `backbone` and a bank, or none."""

    def __init__(self, backbone: Backbone, bank: Bank | None, kernels: str, most: int, capacity: int):
        self.weights = fuse(backbone, self)
        self.most, self.capacity = most, capacity
        self.lengths: list[int] = []  # of each row in use: how many tokens it has in the cache
        self.adapters = RowAdapters(bank, self.weights, most, kernels) if bank else None
        self._kernels = kernels
        self.cache = self.weights.cache(CacheSize(most, 1, capacity, 1))
        self._turn = -1
        self._written = [capacity] * most  # how many places of each row may hold what another request has left
        self._bare = [True] * most  # which rows hold requests without an adapter
        self._readers: dict[int, Forward] = {}  # by row
        self._steps: dict[tuple[int, bool], Step] = {}  # by the number of rows, and whether all are bare

    def enter(self, slot: int) -> int:
        """Gives a request whose adapter lies in the bank's `slot`, -1 for none, a row, and returns it."""
        row = len(self.lengths)
        if row == self.most:
            raise ValueError(f"all {self.most} rows are in use")
        if self.cache.interrupted(self._turn):
            if row:
                raise RuntimeError("somebody else has used the cache since the other rows were read")
            self._turn, self._written = self.cache.begin(clear=False), [self.capacity] * self.most
        # What lies behind a row's own tokens is read with the weight 0, and 0 times NaN is NaN.
        for entry in self.cache.prompt:
            entry[row, :, :, : self._written[row]].zero_()
        self._written[row] = 0
        if self.adapters is not None:
            self.adapters.put(row, slot)
            self._bare[row] = slot == -1
        self.lengths.append(0)
        return row

    def read(self, row: int, ids: torch.Tensor) -> torch.Tensor:
        """Reads ids int64 [C] after what `row` has read; logits [V] of what follows them. Scales that are made from
        the prompt's last token come from the last of these, so that such a prompt is to be read in one piece."""
        past = self.lengths[row]
        end = past + len(ids)
        self._grow(row, end)
        allowed = None
        if past:
            places = torch.arange(end, device=ids.device)
            allowed = (places[past:, None] >= places)[None, None]
        cache = [entry[row : row + 1] for entry in self.cache.prompt]
        mask = torch.ones(1, end, dtype=torch.int64, device=ids.device)
        return self._reader(row).read(ids[None], past, mask, cache, allowed)[0]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """One more token int64 [n] of each of the first n rows; logits [n, V] of what follows."""
        count = len(tokens)
        lengths = self.lengths[:count]
        for row in range(count):
            self._grow(row, lengths[row] + 1)
        return self.step_of(count, bare=all(self._bare[:count])).take(tokens, lengths)

    def step_of(self, count: int, *, bare: bool = False) -> Step:
        """The decode step of so many rows, made where nobody has asked for it before; bare: none of them has an
        adapter, so that none is computed."""
        if (count, bare) not in self._steps:
            some = self._of_rows(0, count, bare=bare)
            self._steps[count, bare] = Step(self.weights, some, count, self._kernels, self.cache.prompt)
        return self._steps[count, bare]

    def move(self, source: int, to: int) -> None:
        """Copies all that row `source` holds to row `to`."""
        if source == to:
            return
        length = self.lengths[source]
        most = max(length, self._written[to])
        for entry in self.cache.prompt:
            entry[to, :, :, :most].copy_(entry[source, :, :, :most])
        if self.adapters is not None:
            self.adapters.move(source, to)
            self._bare[to] = self._bare[source]
        self.lengths[to], self._written[to] = length, most

    def tensors(self) -> list[torch.Tensor]:
        """What it holds on the device beside the weights and the bank."""
        return [*self.cache.tensors(), *(self.adapters.tensors() if self.adapters else [])]

    def _grow(self, row: int, length: int) -> None:
        if length > self.capacity:
            raise ValueError(f"row {row}: {length} tokens, more than the {self.capacity} that it has room for")
        self.lengths[row] = length
        self._written[row] = max(self._written[row], length)

    def _reader(self, row: int) -> Forward:
        # Also without an adapter a prompt is read with the row's: what the last one left in the vectors that a prompt
        # makes goes with that.
        if row not in self._readers:
            self._readers[row] = Forward(self.weights, *self._of_rows(row, row + 1, bare=False), self._kernels)
        return self._readers[row]

    def _of_rows(self, first: int, end: int, *, bare: bool) -> OfRows:
        return OfRows([], None) if bare or self.adapters is None else self.adapters.of_rows(first, end)

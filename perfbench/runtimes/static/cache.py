"""The KV cache of one batch: fixed in size, the prompt held once for all beams of a request. Arms take turns in it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from perfbench.kernels.qkv_epilogue import Places
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class CacheSize:
    """What a cache has room for: Q requests, beams for each, S prompt tokens, N new ones; with F > 0 tokens of a second
    turn, them and N more."""

    requests: int
    beams: int
    prompt_tokens: int
    new_tokens: int
    follow_up_tokens: int = 0

    @property
    def places(self) -> int:
        """For what follows the prompt; the last token of all is chosen and never read."""
        turn = self.new_tokens - 1
        return turn + (1 + self.follow_up_tokens + turn if self.follow_up_tokens else 0)


class KVCache:
    """Keys and values of every layer.

    `prompt`: [Q, 2, H_kv, S (+ places with one beam), D] of each layer, where the second dimension is key, value.
    `generated`: with several beams [places, Q x beams, 2, H_kv, D] of each layer; the beams never move in it, instead
    `ancestors` int64 [Q x beams, places] says in which row each earlier step of a beam lies.

    Nothing moves while the cache lives: captured steps read and write where its tensors lie. Whoever generates finds
    in it what the last one left there, and calls `begin`.
    """

    def __init__(self, size: CacheSize, shape: BackboneShape, dtype: torch.dtype, device: torch.device):
        self.size = size
        rows, steps = size.requests * size.beams, size.places
        heads, dim = shape.kv_heads, shape.head_dim
        length = size.prompt_tokens + (steps if size.beams == 1 else 0)

        def room(*sizes: int) -> tuple[torch.Tensor, ...]:
            # Each layer's alone: to a view of what all layers share a compiler writes by way of a copy.
            return tuple(torch.empty(sizes, dtype=dtype, device=device) for _ in range(shape.layers))

        self.prompt = room(size.requests, 2, heads, length, dim)
        self.generated = room(steps, rows, 2, heads, dim) if size.beams > 1 else ()
        # Zeros: a row that is there, whether or not an ancestor lies in it yet.
        self.ancestors = torch.zeros(rows, steps, dtype=torch.int64, device=device)
        # Where what follows the prompt puts its keys and values: [places, Q x beams, 2, H_kv, D] of each layer.
        self.entries = self.generated or tuple(
            entry[:, :, :, size.prompt_tokens :].permute(3, 0, 1, 2, 4) for entry in self.prompt
        )
        self._turns = 0

    def begin(self, *, clear: bool) -> int:
        """Begins somebody's turn, and returns its number: who still has it is not `interrupted`.

        The prefill writes all of the prompt. `clear`, for steps that read what is not there yet and give it the weight
        0: zeros in all places after the prompt, since 0 times the NaN that somebody else may have left is NaN.
        """
        if clear:
            for places in self.entries:
                places.zero_()
        self._turns += 1
        return self._turns

    def whole(self) -> tuple[Places, ...]:
        """The same places as `entries`, for what is compiled."""
        if self.generated:
            return tuple(Places(entry, steps=0, first=0) for entry in self.generated)
        return tuple(Places(entry, steps=3, first=self.size.prompt_tokens) for entry in self.prompt)

    def interrupted(self, turn: int) -> bool:
        """Whether somebody else has begun since `turn`."""
        return turn != self._turns

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds."""
        return [*self.prompt, *self.generated, self.ancestors]

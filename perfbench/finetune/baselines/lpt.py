"""LPT, late prompt tuning (Liu et al. 2022, arXiv 2210.11292): soft tokens that enter the model at a middle layer, made
by a bottleneck of the prompt's hidden states there.

Of the original's generators this is the one that pools: the hidden states of the prompt's tokens are averaged (the
original tries the maximum too) in as many even stretches as there are soft tokens, and every average passes the same
bottleneck. With the FanLoRA paper's bottleneck 1024 and 4 soft tokens (appendix C; it names no generator and prints no
count) that is 8,393,728 parameters on LLaMA-2 7B, near the 8.6M to 10.0M of what it is compared with there; the
original's other generator, of one token's state, would have 20,988,928, like IDPG.

Decided here: the soft tokens enter after half of the layers, as in the original's published runs (12 of 24, 18 of 36),
and stand in front of the row; the stretches cover the prompt only, never the answer; the states are averaged before the
bottleneck, not between its linears, which comes to the same before ReLU; they are the residual stream's, not
normalised; weights start at N(0, 0.02), biases at 0. The original's dropout is left out. The layers before need no
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import relu

from perfbench.finetune.baselines.soft_tokens import Generator, Prompt, SoftTokens, insert
from perfbench.methods.options import SIZE
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class LptOptions:
    """`tokens`: soft tokens; `bottleneck`: width of what makes them; `layer`: after how many layers they enter (by
    default half of them)."""

    tokens: int = field(default=4, metadata=SIZE)
    bottleneck: int = field(default=1024, metadata=SIZE)
    layer: int | None = field(default=None, metadata={"minimum": 1})


class _Late(SoftTokens):
    def __init__(self, hidden: int, options: LptOptions, at: int):
        super().__init__(options.tokens, at)
        self.generator = Generator(hidden, options.bottleneck, hidden, relu)

    def make(self, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        inside = prompt.inside.to(hidden.device)
        states = hidden.float().masked_fill(~inside[..., None], 0)
        made: torch.Tensor = self.generator(stretches(inside, self.count) @ states)
        return made


def stretches(inside: torch.Tensor, count: int) -> torch.Tensor:
    """fp32 [B, count, S]: what each token counts in each of `count` averages over the tokens that are `inside` [B, S].

    Stretch i of n tokens goes from floor(i n / count) to ceil((i + 1) n / count); uneven ones overlap.
    """
    place, tokens = inside.cumsum(dim=1)[:, None] - 1, inside.sum(dim=1)[:, None, None]
    number = torch.arange(count, device=inside.device)[None, :, None]
    start, stop = number * tokens // count, -(-(number + 1) * tokens // count)
    return ((place >= start) & (place < stop) & inside[:, None]) / (stop - start).float()


def attach(model: Any, shape: BackboneShape, options: LptOptions) -> Any:
    """Puts late soft tokens into a frozen model. ValueError where it has too few layers."""
    at = shape.layers // 2 if options.layer is None else options.layer
    if not 1 <= at < shape.layers:
        raise ValueError(f"layer: expected from 1 to {shape.layers - 1}, got {at}; the backbone has {shape.layers}")
    return insert(model, _Late(shape.hidden, options, at))

"""P-tuning as the FanLoRA paper has it (appendix C): 64 soft tokens of 36 numbers each before the prompt, and one
learnable projection to the hidden size.

On LLaMA-2 7B 64 x 36 + 36 x 4096 = 149,760 parameters; the papers' tables don't have it. PEFT's own P-tuning, after the
original (Liu et al. 2021, arXiv 2103.10385), is something else: soft tokens of the hidden size, which an encoder of
three linears with ReLU between them re-makes while they are trained. With hidden layers of 36 that is 562,520
parameters, and what is saved is what the encoder made, 64 x 4096. Its folders are still read.

Not said by the paper and decided here: the projection has no bias, like the paper's bottlenecks; the soft tokens start
at N(0, 1) and the projection at N(0, 0.02).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from perfbench.finetune.baselines.soft_tokens import Prompt, SoftTokens, insert
from perfbench.methods.options import SIZE
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class PTuningOptions:
    """`tokens`: soft tokens before the prompt; `dim`: numbers of each, which are projected to the hidden size."""

    tokens: int = field(default=64, metadata=SIZE)
    dim: int = field(default=36, metadata=SIZE)


class _Projected(SoftTokens):
    def __init__(self, hidden: int, options: PTuningOptions):
        super().__init__(options.tokens)
        self.tokens = nn.Parameter(torch.empty(options.tokens, options.dim).normal_())
        self.projection = nn.Parameter(torch.empty(options.dim, hidden).normal_(std=0.02))

    def make(self, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        return (self.tokens @ self.projection).expand(len(hidden), -1, -1)


def attach(model: Any, shape: BackboneShape, options: PTuningOptions) -> Any:
    """Puts soft tokens before the prompt of a frozen model."""
    return insert(model, _Projected(shape.hidden, options))

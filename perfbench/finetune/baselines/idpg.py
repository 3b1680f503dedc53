"""IDPG, instance-dependent prompt generation (Wu et al. 2022, arXiv 2204.04497): soft tokens before the prompt, which a
bottleneck makes of the prompt's own representation.

That representation is a frozen model's; here it is the backbone's own, so each prompt passes it twice. Bottleneck 1024
and 4 soft tokens are the FanLoRA paper's (appendix C), which prints no count: 20,988,928 parameters on LLaMA-2 7B, of
which the projection to 4 x 4096 has four fifths.

Neither paper says how it is with a decoder, so this was decided here: the representation is the backbone's last hidden
state, normalised, at the last token of the prompt, where the original takes the first token's of an encoder; it never
sees the answer. The soft tokens stand in front (the original has variants). The bottleneck is of two plain linears with
biases and GeLU between them, weights from N(0, 0.02), as in the original's code; its dropout, its PHM layers, which
save parameters, and its variant with soft tokens in every layer are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.functional import gelu

from perfbench.finetune.baselines.soft_tokens import Generator, Prompt, SoftTokens, insert
from perfbench.methods.options import SIZE
from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class IdpgOptions:
    """`tokens`: soft tokens before the prompt; `bottleneck`: width of what makes them."""

    tokens: int = field(default=4, metadata=SIZE)
    bottleneck: int = field(default=1024, metadata=SIZE)


class _Generated(SoftTokens):
    def __init__(self, hidden: int, options: IdpgOptions):
        super().__init__(options.tokens)
        self.generator = Generator(hidden, options.bottleneck, options.tokens * hidden, gelu)

    def make(self, prompt: Prompt, hidden: torch.Tensor) -> torch.Tensor:
        with torch.no_grad(), self.away():
            states = prompt.inner(**prompt.inputs, use_cache=False).last_hidden_state
        last = prompt.last.to(states.device)
        made: torch.Tensor = self.generator(states[torch.arange(len(states), device=states.device), last])
        return made.unflatten(1, (self.count, -1))


def attach(model: Any, shape: BackboneShape, options: IdpgOptions) -> Any:
    """Puts soft tokens of their own before the prompts of a frozen model."""
    return insert(model, _Generated(shape.hidden, options))

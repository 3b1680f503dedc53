"""Products with frozen weights in bf16, while all that is trained stays as it is.

Most of a training step are the backbone's own products. A processor that has bf16 makes them several times as fast.
Autocast would add an adapter's output to a product in bf16, where a small one is rounded away: here the product is
brought back to the input's dtype first, and adapters, sums, norms and attention are left alone.
"""

from __future__ import annotations

import torch
from torch import nn

# `dtype`: as the rest of the model.
KINDS = ("dtype", "bf16")


def in_bf16(model: nn.Module) -> None:
    """Every linear of `model` with a frozen weight, changed in place; the weight itself stays and is what is saved."""
    for module in model.modules():
        if type(module) is nn.Linear and not module.weight.requires_grad:
            module.register_buffer("rounded", module.weight.to(torch.bfloat16), persistent=False)
            module.__class__ = _Linear


class _Linear(nn.Linear):
    rounded: torch.Tensor  # the weight in bf16

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        product = nn.functional.linear(inputs.to(torch.bfloat16), self.rounded).to(inputs.dtype)
        return product if self.bias is None else product + self.bias

"""Full fine-tuning: every weight is trained, in fp32 whatever type the backbone was loaded in.

In bf16 a step of AdamW is smaller than half of the last digit of most weights, and they would not move at all. The
arithmetic is that of the run's dtype: Trainer casts the weights for each product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class FullOptions:
    """None."""


def attach(model: Any, shape: BackboneShape, options: FullOptions) -> Any:
    """Makes fp32 master weights of all weights and lets them want gradients."""
    return model.float().requires_grad_(True)

"""Full fine-tuning: every weight is trained, in the type that the backbone was loaded in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfbench.methods.shape import BackboneShape


@dataclass(frozen=True)
class FullOptions:
    """None."""


def attach(model: Any, shape: BackboneShape, options: FullOptions) -> Any:
    """Lets every weight want gradients."""
    return model.requires_grad_(True)

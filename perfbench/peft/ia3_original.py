"""(IA)3 as Liu et al. (2022) have it, as PEFT's own type IA3."""

from __future__ import annotations

from typing import Any

from peft import IA3Config

from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.shape import MODULE_PATHS, BackboneShape


def config(method: Any, shape: BackboneShape, options: Ia3OriginalOptions) -> IA3Config:
    """The configuration for `peft.get_peft_model`."""
    return IA3Config(
        task_type="CAUSAL_LM",
        target_modules=[MODULE_PATHS[module] for module in options.modules],
        feedforward_modules=[MODULE_PATHS[module] for module in options.scaled_inputs],
    )

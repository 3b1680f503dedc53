"""MiSS as PEFT's own type MISS."""

from __future__ import annotations

from typing import Any

from peft import MissConfig

from perfbench.methods.miss import MissOptions
from perfbench.methods.shape import MODULE_PATHS, BackboneShape


def config(method: Any, shape: BackboneShape, options: MissOptions) -> MissConfig:
    """The configuration for `peft.get_peft_model`."""
    targets = [MODULE_PATHS[module] for module in options.modules]
    return MissConfig(task_type="CAUSAL_LM", r=options.rank, target_modules=targets)

"""VeRA as PEFT's own type VERA."""

from __future__ import annotations

from typing import Any

from peft import VeraConfig

from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.methods.vera import VeraOptions


def config(method: Any, shape: BackboneShape, options: VeraOptions) -> VeraConfig:
    """The configuration for `peft.get_peft_model`."""
    return VeraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        projection_prng_key=options.key,
        target_modules=[MODULE_PATHS[module] for module in options.modules],
    )

"""RoAd as PEFT's own type ROAD."""

from __future__ import annotations

from typing import Any

from peft import RoadConfig

from perfbench.methods.road import RoadOptions, group_size
from perfbench.methods.shape import MODULE_PATHS, BackboneShape


def config(method: Any, shape: BackboneShape, options: RoadOptions) -> RoadConfig:
    """The configuration for `peft.get_peft_model`. ValueError where the outputs are not divisible into the groups."""
    return RoadConfig(
        task_type="CAUSAL_LM",
        variant=options.variant,
        group_size=group_size(shape, options),
        target_modules=[MODULE_PATHS[module] for module in options.modules],
    )

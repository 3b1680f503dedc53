"""FanLoRA as a PEFT type: PEFT's LoRA whose target modules are the kept ones of each layer, named in full.

Its saved folder is an ordinary LoRA checkpoint, which PEFT loads without perfbench and
`perfbench.methods.fanlora.load` serves.
"""

from __future__ import annotations

from typing import Any

from peft import LoraConfig

from perfbench.methods import fanlora
from perfbench.methods.checkpoints.adapter_folder import module_name
from perfbench.methods.registry import FanLoraOptions
from perfbench.methods.shape import BackboneShape


def fanlora_config(shape: BackboneShape, options: FanLoraOptions) -> LoraConfig:
    """The configuration for `peft.get_peft_model`. ValueError where the setting has another depth."""
    setting = fanlora.setting_of(shape, options)
    targets = [module_name(layer, module) for layer, modules in enumerate(setting) for module in modules]
    alpha: Any = options.rank if options.alpha is None else options.alpha
    return LoraConfig(task_type="CAUSAL_LM", r=options.rank, lora_alpha=alpha, target_modules=targets)

"""LoRA, FanLoRA and every method whose parameters are low-rank pairs, as PEFT's own LoRA.

Where the layers keep unlike modules each target is named in full. The saved folder is an ordinary LoRA checkpoint,
which PEFT loads without perfbench and the method's `load` serves.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from peft import LoraConfig

from perfbench.methods.checkpoints.adapter_folder import module_name
from perfbench.methods.shape import MODULE_PATHS, BackboneShape


def config(method: Any, shape: BackboneShape, options: Any, *, use_dora: bool = False) -> LoraConfig:
    """The configuration for `peft.get_peft_model`. `method`: a module with `setting_of(shape, options)`, the modules of
    each layer; `options` have `rank` and `alpha` (None: the rank). ValueError where the setting has another depth."""
    setting = method.setting_of(shape, options)
    if all(modules == setting[0] for modules in setting):
        targets = [MODULE_PATHS[module] for module in setting[0]]
    else:
        targets = [module_name(layer, module) for layer, modules in enumerate(setting) for module in modules]
    alpha: Any = options.rank if options.alpha is None else options.alpha
    return LoraConfig(
        use_dora=use_dora,
        lora_bias=getattr(options, "lora_bias", False),
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=alpha,
        target_modules=targets,
    )


dora_config = partial(config, use_dora=True)


def alora_config(method: Any, shape: BackboneShape, options: Any) -> LoraConfig:
    """Of an activated LoRA. ValueError without the tokens that invoke it."""
    if not options.invocation:
        raise ValueError("invocation: expected the tokens that invoke the adapter, which PEFT trains it by, got none")
    found = config(method, shape, options)
    found.alora_invocation_tokens = list(options.invocation)
    return found

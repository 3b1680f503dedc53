"""The baselines that PEFT itself has, with the papers' settings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft import AdaLoraConfig, PrefixTuningConfig, PromptTuningConfig

from perfbench.methods.options import SIZE
from perfbench.methods.shape import MODULE_PATHS, MODULES, BackboneShape

# AdaLoRA's phases as shares of all steps: all ranks are kept at first, and none is given up any more at last.
_FIRST, _LAST = 0.1, 0.3


@dataclass(frozen=True)
class AdaLoraOptions:
    """`initial_rank` on every linear; ranks are given up until `rank` of them are left on average. ValueError where
    that is not less."""

    initial_rank: int = field(default=8, metadata=SIZE)
    rank: int = field(default=4, metadata=SIZE)

    def __post_init__(self) -> None:
        if self.rank >= self.initial_rank:  # PEFT fails on it only once it prunes
            raise ValueError(f"rank: expected less than initial_rank {self.initial_rank}, got {self.rank}")


@dataclass(frozen=True)
class PromptTuningOptions:
    """`tokens`: soft tokens before the prompt."""

    tokens: int = field(default=64, metadata=SIZE)


@dataclass(frozen=True)
class PTuningV2Options:
    """`tokens`: trained keys and values before the prompt's, in every layer."""

    tokens: int = field(default=64, metadata=SIZE)


def adalora_config(shape: BackboneShape, options: AdaLoraOptions) -> AdaLoraConfig:
    """AdaLoRA on all linears. Its schedule comes with `begin`, once the number of steps is known."""
    return AdaLoraConfig(
        task_type="CAUSAL_LM",
        init_r=options.initial_rank,
        target_r=options.rank,
        lora_alpha=options.initial_rank,
        target_modules=[MODULE_PATHS[module] for module in MODULES],
        total_step=1,
    )


def prompt_tuning_config(shape: BackboneShape, options: PromptTuningOptions) -> PromptTuningConfig:
    """Soft tokens before the prompt."""
    return PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.tokens)


def p_tuning_v2_config(shape: BackboneShape, options: PTuningV2Options) -> PrefixTuningConfig:
    """Keys and values before the prompt's in every layer."""
    return PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=options.tokens)


def _allocator(module: Any) -> Any:
    """AdaLoRA's allocator of ranks, or None for any other method."""
    return getattr(module.base_model, "rankallocator", None) if isinstance(module, peft.PeftModel) else None


def begin(module: Any, steps: int) -> None:
    """Gives AdaLoRA its schedule of `steps` optimiser steps; nothing for other methods."""
    if _allocator(module) is not None:
        config = module.peft_config[module.active_adapter]
        config.total_step = steps
        config.tinit, config.tfinal = int(steps * _FIRST), steps - settled_at(module, steps)


def settled_at(module: Any, steps: int) -> int:
    """After which of `steps` optimiser steps AdaLoRA has given up all the ranks that it will; 0 for other methods."""
    return 0 if _allocator(module) is None else steps - int(steps * _LAST)


@contextmanager
def penalty(module: Any, share: float) -> Iterator[None]:
    """AdaLoRA's orthogonality term, which PEFT adds to every loss of the model, counts `share` of its weight."""
    if _allocator(module) is None:
        yield
        return
    config = module.peft_config[module.active_adapter]
    whole = config.orth_reg_weight
    config.orth_reg_weight = whole * share
    try:
        yield
    finally:
        config.orth_reg_weight = whole


def given_up(module: Any) -> int:
    """Parameters of the ranks that AdaLoRA has given up: they are there as long as it is trained, and are not saved."""
    if _allocator(module) is None:
        return 0
    total = 0
    for name, kept in (module.peft_config[module.active_adapter].rank_pattern or {}).items():
        linear = module.get_base_model().get_submodule(name.split(".lora_E")[0])
        total += kept.count(False) * (linear.in_features + linear.out_features + 1)
    return total


def after_step(module: Any, step: int) -> None:
    """Lets AdaLoRA give up ranks after optimiser step `step` (from 1 on), while the gradients are still there."""
    if _allocator(module) is not None:
        module.base_model.update_and_allocate(step)


_AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")


def extra_state(module: Any) -> dict[str, torch.Tensor]:
    """What AdaLoRA keeps beside its parameters between two steps."""
    allocator = _allocator(module)
    if allocator is None:
        return {}
    found = {f"adalora.{kind}.{n}": t for kind in _AVERAGES for n, t in getattr(allocator, kind).items()}
    pattern = module.peft_config[module.active_adapter].rank_pattern or {}
    return found | {f"adalora.ranks.{name}": torch.tensor(kept) for name, kept in pattern.items()}


def restore_extra_state(module: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `extra_state` gave."""
    allocator = _allocator(module)
    if allocator is None:
        return
    device = next(module.parameters()).device
    for kind in _AVERAGES:
        start = f"adalora.{kind}."
        values = {n.removeprefix(start): t.to(device) for n, t in tensors.items() if n.startswith(start)}
        setattr(allocator, kind, values)
    start = "adalora.ranks."
    pattern = {n.removeprefix(start): t.tolist() for n, t in tensors.items() if n.startswith(start)}
    module.peft_config[module.active_adapter].rank_pattern = pattern or None

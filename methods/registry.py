"""The table of methods: name -> options, module, what it is. Free of torch, so that a scenario is checked fast.

A served method is one file of this folder and one line here. `peft` and `peft-single` are the same LoRA
adapters served by Hugging Face PEFT instead of by perfbench; `none` is the bare backbone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from perfbench.methods.shape import MODULES

# One tuple of module names for each layer.
Setting = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class NoOptions:
    """A method without options."""


@dataclass(frozen=True)
class LoraOptions:
    """`rank` R; `alpha` (default: the rank, so that the scale alpha / rank is 1); the adapted `modules`;
    `adapters`: a folder of PEFT checkpoints, one per tenant, or several folders, in place of random ones."""

    rank: int = 4
    alpha: float | None = None
    modules: tuple[str, ...] = MODULES
    adapters: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class FanLoraOptions:
    """`rank` R; `setting`: the modules kept in each layer (a list for each layer, or the path of a JSON file with
    the key `layers`); without one, FanLoRA's default (see `perfbench.methods.fanlora`)."""

    rank: int = 12
    alpha: float | None = None
    setting: Setting | str | None = None
    adapters: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ia3Options:
    """The papers' variant: l = 1 + z P with z of dimension `dim`."""

    dim: int = 16
    adapters: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Ia3OriginalOptions:
    """(IA)3 as Liu et al. (2022) have it: one vector each for K, V and the input of down."""

    adapters: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class ParaOptions:
    """`rank` of the generator's bottleneck; `pool`: the residual stream (paper) or the normalised input."""

    rank: int = 12
    pool: str = "residual"
    adapters: str | tuple[str, ...] | None = None


@dataclass(frozen=True)
class Method:
    """One line of the table. `module` is imported only when the method is used; `served_by` names what runs it."""

    options: type[Any]
    module: str | None
    served_by: str
    summary: str


METHODS: dict[str, Method] = {
    "none": Method(NoOptions, None, "plan", "the bare backbone; always measured"),
    "lora": Method(LoraOptions, "perfbench.methods.lora", "plan", "LoRA on all seven linears, rank 4"),
    "fanlora": Method(
        FanLoraOptions, "perfbench.methods.fanlora", "plan", "LoRA on at most two linears a layer, rank 12"
    ),
    "ia3": Method(Ia3Options, "perfbench.methods.ia3", "plan", "(IA)3, the papers' variant: scales on Q, K, Up"),
    "ia3-original": Method(
        Ia3OriginalOptions, "perfbench.methods.ia3_original", "plan", "(IA)3: scales on K, V, down's input"
    ),
    "para": Method(ParaOptions, "perfbench.methods.para", "plan", "scales on Q, V, Up made from the prompt, once"),
    "peft": Method(
        LoraOptions, "perfbench.methods.lora", "peft", "the same LoRA in PEFT's mixed batch (adapter_names)"
    ),
    "peft-single": Method(
        LoraOptions, "perfbench.methods.lora", "peft-single", "the same LoRA in PEFT, one tenant at a time"
    ),
}

"""The table of methods: name -> the file that implements it, and what it is. Free of torch.

A served method is one file of this folder and one line here; `perfbench.methods.parameters` says what the file holds.
`peft`, `peft-road` and `peft-single` are the same adapters, served by Hugging Face PEFT instead of by perfbench;
`lora-merged` is LoRA multiplied into the weights; in `mixed` tenants have adapters of several methods; `converted` is
LoRA made of another method's adapters; `none` is the bare backbone. Methods of plugins come beside these when a command
has read them (`perfbench.spec.method_plugins`).
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfbench.methods.options import NoOptions
from perfbench.methods.shape import BackboneShape

# `trained_by` of a method whose trainable parameters are the low-rank pairs themselves: PEFT's LoRA. The method's file
# needs `setting_of(shape, options)`, the modules of each layer, and its options `rank` and `alpha`.
LOW_RANK = "perfbench.peft.low_rank:config"


@dataclass(frozen=True)
class Method:
    """One line of the table.

    `module` is imported only when the method is used, and its `Options` are the method's; `served_by` names what runs
    it; `trained_by` is None, or `module:function` of a function (the method's module, BackboneShape, options) that
    returns the PeftConfig with which `perfbench finetune` trains the method; `peft_types`: what its `load` reads, by
    the `peft_type` of adapter folders, and `peft_field` what is set in their configuration where others of the type are
    another method's; `in_weights`: whether other weights of the backbone would do what the
    adapter does.
    """

    module: str | None
    summary: str
    served_by: str = "plan"
    trained_by: str | None = None
    peft_types: tuple[str, ...] = ()
    peft_field: str | None = None
    in_weights: bool = True

    @property
    def options(self) -> type[Any]:
        """The dataclass of what the method can be told."""
        if self.module is None:
            return NoOptions
        found: type[Any] = importlib.import_module(self.module).Options
        return found

    @property
    def in_bank(self) -> bool:
        """Whether its adapters are layer plans, which lie in one bank and which our own runtimes serve."""
        return self.served_by in ("plan", "mixed", "converted")

    @property
    def has_one_size(self) -> bool:
        """Whether its options alone say what a tenant's adapter in the bank holds."""
        return self.in_bank and self.served_by != "mixed"

    def expect_fit(self, shape: BackboneShape, options: Any) -> None:
        """ValueError where the sizes of a backbone exclude these options."""
        if self.module is not None and hasattr(module := importlib.import_module(self.module), "shapes"):
            module.shapes(shape, options)


METHODS: dict[str, Method] = {
    "none": Method(None, "the baseline: the backbone without adapters; it is always measured"),
    "lora": Method(
        "perfbench.methods.lora",
        "LoRA: a pair on all seven linear modules, rank 4",
        trained_by=LOW_RANK,
        peft_types=("LORA", "ADALORA"),
    ),
    "dora": Method(
        "perfbench.methods.dora",
        "DoRA: LoRA whose result has a trained length, row by row; a pair and a scale when it is served",
        trained_by="perfbench.peft.low_rank:dora_config",
    ),
    "alora": Method(
        "perfbench.methods.alora",
        "activated LoRA: LoRA from an invocation on, so that one cache of what comes before it serves all tenants",
        trained_by="perfbench.peft.low_rank:alora_config",
        peft_types=("LORA",),
        peft_field="alora_invocation_tokens",
        in_weights=False,
    ),
    "fanlora": Method(
        "perfbench.methods.fanlora", "FanLoRA: LoRA on at most two modules of a layer, rank 12", trained_by=LOW_RANK
    ),
    "ia3": Method(
        "perfbench.methods.ia3",
        "(IA)3, the papers' variant: scales on Q, K and Up, made of a matrix and a vector",
        trained_by="perfbench.peft.projected_ia3:config",
        peft_types=("PROJECTED_IA3",),
    ),
    "ia3-original": Method(
        "perfbench.methods.ia3_original",
        "(IA)3 as its authors have it: stored scales on K, V and the input of Down, or on any linears",
        trained_by="perfbench.peft.ia3_original:config",
        peft_types=("IA3",),
    ),
    "para": Method(
        "perfbench.methods.para",
        "PARA: scales on Q, V and Up, made from the prompt once",
        trained_by="perfbench.peft.para:config",
        peft_types=("PARA",),
        in_weights=False,
    ),
    "road": Method(
        "perfbench.methods.road",
        "RoAd: outputs of all seven linear modules, rotated in pairs",
        trained_by="perfbench.peft.road:config",
        peft_types=("ROAD",),
    ),
    "miss": Method(
        "perfbench.methods.miss",
        "MiSS: a matrix on the grouped sum of the input of all seven linear modules",
        trained_by="perfbench.peft.miss:config",
        peft_types=("MISS",),
    ),
    "vera": Method(
        "perfbench.methods.vera",
        "VeRA: two vectors for each of seven linear modules, around a low-rank pair that all tenants share",
        trained_by="perfbench.peft.vera:config",
        peft_types=("VERA",),
    ),
    "mixed": Method(
        "perfbench.methods.mixed", "tenants of several methods in one batch, served from one bank", served_by="mixed"
    ),
    "converted": Method(
        "perfbench.methods.converted", "another method's adapters, converted to LoRA", served_by="converted"
    ),
    "peft": Method(
        "perfbench.methods.lora", "the same LoRA, served by PEFT in a mixed batch (adapter_names)", served_by="peft"
    ),
    "peft-road": Method(
        "perfbench.methods.road", "the same RoAd, served by PEFT in a mixed batch (adapter_names)", served_by="peft"
    ),
    "lora-merged": Method(
        "perfbench.methods.lora", "the same LoRA, merged into the weights of one tenant at a time", served_by="merged"
    ),
    "peft-single": Method(
        "perfbench.methods.lora", "the same LoRA, served by PEFT to one tenant at a time", served_by="peft-single"
    ),
}


def reader_of(described: Mapping[str, Any]) -> str | None:
    """The method that serves an adapter folder with this configuration; None where none does."""
    fitting = {name: one for name, one in METHODS.items() if described.get("peft_type") in one.peft_types}
    marked = [name for name, one in fitting.items() if one.peft_field and described.get(one.peft_field)]
    return next((name for name in (*marked, *fitting)), None)

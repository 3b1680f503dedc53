"""Which methods can be trained: those of the served ones that say how, and baselines. Free of torch and PEFT."""

from __future__ import annotations

from dataclasses import dataclass

from perfbench.errors import nearest
from perfbench.methods.registry import METHODS


@dataclass(frozen=True)
class Baseline:
    """A trained method that is not in the table of served ones: `file` of perfbench.finetune.baselines, where `options`
    is a dataclass and `attach` a function (model, BackboneShape, options) that returns the module to train, or one
    (BackboneShape, options) that returns PEFT's configuration where it is `by_peft`. `served_as`: the method whose
    reader makes a plan for a bank of its checkpoints; None where no bank can hold them."""

    file: str
    options: str
    attach: str
    summary: str
    by_peft: bool = False
    served_as: str | None = None


BASELINES: dict[str, Baseline] = {
    "adalora": Baseline(
        "peft_own",
        "AdaLoraOptions",
        "adalora_config",
        "LoRA that gives up half of its ranks",
        by_peft=True,
        served_as="lora",
    ),
    "prompt-tuning": Baseline(
        "peft_own", "PromptTuningOptions", "prompt_tuning_config", "soft tokens before the prompt", by_peft=True
    ),
    "p-tuning": Baseline("p_tuning", "PTuningOptions", "attach", "narrow soft tokens and their projection"),
    "p-tuning-v2": Baseline(
        "peft_own", "PTuningV2Options", "p_tuning_v2_config", "soft keys and values in every layer", by_peft=True
    ),
    "idpg": Baseline("idpg", "IdpgOptions", "attach", "soft tokens made of the prompt, before it"),
    "lpt": Baseline("lpt", "LptOptions", "attach", "soft tokens made of the prompt, at a middle layer"),
    "houlsby": Baseline("houlsby", "HoulsbyOptions", "attach", "bottlenecks after attention and after the FFN"),
    "learned-adapter": Baseline("learned_adapter", "LearnedAdapterOptions", "attach", "a bottleneck beside each layer"),
    "bitfit": Baseline("bitfit", "BitFitOptions", "attach", "a bias on each linear"),
    "ssp": Baseline("ssp", "SspOptions", "attach", "searched places for LoRA, adapters, biases, scales"),
    "full": Baseline("full", "FullOptions", "attach", "every weight of the backbone"),
}


def trainable() -> dict[str, str]:
    """Name -> summary of every method that can be trained, plugins' included."""
    served = {name: method.summary for name, method in METHODS.items() if method.trained_by is not None}
    return served | {name: baseline.summary for name, baseline in BASELINES.items()}


def served_as(name: str) -> str | None:
    """The served method whose reader makes a plan of an adapter of `name`; None where no bank can hold it."""
    if name in BASELINES:
        return BASELINES[name].served_as
    known = METHODS.get(name)
    return name if known is not None and known.module is not None and known.served_by == "plan" else None


def unknown_method(name: str) -> str:
    """What to tell of a method that can't be trained."""
    known = trainable()
    if name in METHODS:
        return f"{name} can't be trained: its line in the table of methods has no trained_by; {nearest(name, known)}"
    return f"unknown method {name!r}; {nearest(name, known)}"

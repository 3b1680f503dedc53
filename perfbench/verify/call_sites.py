"""The launches of real call sites: every Triton case of the table, and batches of LLaMA-2 7B on runtime static.

Recorded on a CPU in no time: kernels are not run, products not computed, weights not filled.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import linear, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.backbone import Backbone
from perfbench.backbone_config import NAMED_CONFIGS
from perfbench.kernels.ahead_of_time import Launch, recording
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.capture import Step
from perfbench.verify.kernel_cases import CASES
from perfbench.verify.kernel_check import DTYPES, Setting

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan")


def of_cases() -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every case that Triton's kernels can take, in every type."""
    for dtype in DTYPES:
        for case in CASES:
            if "triton" in case.forms:
                with recording() as launches:
                    # Shifted, because what comes out is then not looked at: nothing was computed.
                    case.build(Setting("triton", DTYPES[dtype], "cpu")).run(1)
                yield f"{case.kernel} {case.id} {dtype}", launches


class _ArithmeticLeftOut(TorchFunctionMode):
    """Within it a product, and the attention of a prefill, have their sizes and type, and any values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            x, weight = args[:2]
            return x.new_empty(*x.shape[:-1], len(weight))
        if func is scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def unfilled(backbone: str, layers: int, dtype: torch.dtype) -> Backbone:
    """The named shape with so many layers on the CPU, its weights whatever lay there before."""
    config = NAMED_CONFIGS[backbone] | {"num_hidden_layers": layers}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields), dtype=dtype, attn_implementation="sdpa"
        )
    model.to_empty(device="cpu").eval().requires_grad_(False)
    return Backbone(backbone, BackboneShape.of_config(config), model, dtype, torch.device("cpu"))


@dataclass(frozen=True)
class Generated:
    """What a batch launched in its prefill, and what its captured decode step did."""

    prefill: list[Launch]
    step: list[Launch]


def of_batch(base: Backbone, method: str, batch: Batch) -> Generated:
    """The launches of one batch on runtime static with Triton's kernels and the step that a GPU captures: it runs once
    and its replays do nothing."""
    bank, begun = None, []
    if method != "none":
        layout = parameters.meta_plan(method, base.shape, METHODS[method].options())
        bank = Bank(layout, len(batch.slots), base.dtype, base.device)

    def captured(step: Step) -> Step:
        begun.append(len(launches))
        step()
        return lambda: None

    with recording() as launches, _ArithmeticLeftOut():
        arm = StaticArm(base, bank, "triton", captured)
        arm.generate(batch)
        arm.close()
    (first,) = begun
    return Generated(launches[:first], launches[first:])


def tenants_apart(requests: int, beams: int, *, prompt_tokens: int, new_tokens: int, padded: bool) -> Batch:
    """Requests of as many tenants, in the slots of their numbers; padded: the first prompt is 3 tokens shorter."""
    mask = torch.ones(requests, prompt_tokens, dtype=torch.int64)
    if padded:
        mask[0, :3] = 0
    return Batch(mask.clone(), mask, tuple(range(requests)), beams, new_tokens)

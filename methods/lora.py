"""LoRA (Hu et al., 2021): y = x W + x A B on the chosen linears, never merged.

FanLoRA's equation has no scale, so alpha is the rank unless it is given. Parameters: `layers.<i>.<module>.a`
[R, D_in] and `.b` [D_out, R], as PEFT keeps them; with a bias on B `.bias` [D_out], which is added before the scale.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.methods.checkpoints import lora as lora_checkpoint
from perfbench.methods.options import ALPHA, MODULES_OF_A_LAYER, RANK, MethodOptions
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan, LayerPlan, LowRank
from perfbench.methods.shape import MODULES, BackboneShape, Setting

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LoraOptions(MethodOptions):
    """`rank` R; `alpha` (default: the rank, so that the scale alpha / rank is 1); the adapted `modules`; `lora_bias`:
    y += (x A B + bias) alpha / rank."""

    rank: int = field(default=4, metadata=RANK)
    alpha: float | None = field(default=None, metadata=ALPHA)
    modules: tuple[str, ...] = field(
        default=MODULES,
        metadata={
            **MODULES_OF_A_LAYER,
            "description": "the linear modules that get a low-rank pair in every layer; default: all seven",
        },
    )
    lora_bias: bool = field(
        default=False,
        metadata={"description": "whether each pair adds a bias too, PEFT's lora_bias, which its field `bias` is not"},
    )


Options = LoraOptions


def setting_of(shape: BackboneShape, options: LoraOptions) -> Setting:
    """The adapted modules of each layer, in the order in which they run."""
    return (tuple(m for m in MODULES if m in options.modules),) * shape.layers


def shapes(shape: BackboneShape, options: LoraOptions) -> dict[str, tuple[int, ...]]:
    """Trainable parameters: name -> size."""
    sizes = shapes_of(setting_of(shape, options), options.rank, shape)
    if options.lora_bias:
        sizes |= {f"{name[:-2]}.bias": size[:1] for name, size in sizes.items() if name.endswith(".b")}
    return sizes


def shapes_of(setting: Setting, rank: int, shape: BackboneShape) -> dict[str, tuple[int, ...]]:
    """Low-rank pairs of `rank` at the places of `setting`: name -> size."""
    sizes: dict[str, tuple[int, ...]] = {}
    for index, modules in enumerate(setting):
        for module in modules:
            d_in, d_out = shape.features(module)
            sizes[f"layers.{index}.{module}.a"] = (rank, d_in)
            sizes[f"layers.{index}.{module}.b"] = (d_out, rank)
    return sizes


def initialise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """A Kaiming-uniform with a = sqrt(5), as PEFT has it; B zero, so that the adapter starts as the identity."""
    if name.endswith(".a"):
        bound = 1 / math.sqrt(tensor.shape[1])
        tensor.uniform_(-bound, bound, generator=generator)
    else:
        tensor.zero_()


def randomise(name: str, tensor: torch.Tensor, generator: torch.Generator) -> None:
    """A, B such that x A B has about the size of x W for weights of standard deviation 0.02: a wrong tenant shows; a
    bias of a part of that."""
    if name.endswith(".bias"):
        tensor.normal_(0, 0.2, generator=generator)
        return
    rank = tensor.shape[0] if name.endswith(".a") else tensor.shape[1]
    if name.endswith(".a"):
        tensor.normal_(0, 1 / math.sqrt(tensor.shape[1]), generator=generator)
    else:
        tensor.normal_(0, 0.5 / math.sqrt(rank), generator=generator)


def plan(parameters: Parameters, shape: BackboneShape, options: LoraOptions) -> AdapterPlan:
    """Low-rank pairs with alpha / rank folded into b, where the rank is that of the pair itself; with DoRA's magnitudes
    and biases where there are any."""
    layers = []
    for index in range(shape.layers):
        low_rank, magnitude, biases = {}, {}, {}
        for module in MODULES:
            a = parameters.get(f"layers.{index}.{module}.a")
            if a is not None:
                b = parameters[f"layers.{index}.{module}.b"]
                alpha = a.shape[0] if options.alpha is None else options.alpha
                low_rank[module] = LowRank(a, b.t() * (alpha / a.shape[0]))
                if (length := parameters.get(f"layers.{index}.{module}.magnitude")) is not None:
                    magnitude[module] = length
                if (bias := parameters.get(f"layers.{index}.{module}.bias")) is not None:
                    biases[module] = bias * (alpha / a.shape[0])
        layers.append(LayerPlan(low_rank=low_rank, magnitude=magnitude, bias=biases))
    return tuple(layers)


def save(parameters: Parameters, shape: BackboneShape, options: LoraOptions, folder: Path, backbone: str) -> None:
    """Writes a PEFT LoRA checkpoint folder; with magnitudes one of DoRA, with biases one with `lora_bias`."""
    lora_checkpoint.save(parameters, options.alpha, folder, backbone)


def load(folder: Path, shape: BackboneShape, options: LoraOptions) -> AdapterPlan:
    """The plan of a PEFT LoRA checkpoint folder. Raises AdapterError.

    Ranks, modules, alpha, use_dora and lora_bias are the checkpoint's own, whatever `options` say.
    """
    return plan(lora_checkpoint.load(folder, shape), shape, LoraOptions())

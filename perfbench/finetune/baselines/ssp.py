"""SSP, sparse structure search (Hu et al. 2022): which of many small changes to the model are worth their parameters.

Every layer offers LoRA and a bias on each linear, a bottleneck after attention and after the FFN, and a scale on each
norm. Each of these places has a gate with a hard-concrete distribution. One shift of all gates is found anew after
every step, so that the expected number of parameters is the budget. After the first share of the steps the places
with the highest gates that fit into the budget stay, ungated, and the others are gone.

Two simplifications: gates and weights learn from the same batches in one optimiser, where the original takes turns on
two halves of the set; and the places that stay keep what they have learnt, where the original starts them afresh.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import linear

from perfbench.finetune.baselines.bottleneck import Bottleneck, device_of, first, plus
from perfbench.methods import parameters
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.options import SIZE
from perfbench.methods.shape import MODULE_PATHS, BackboneShape

# Louizos et al. (2018): temperature, and how far the distribution is stretched beyond 0 and 1.
_TEMPERATURE, _BELOW, _ABOVE = 2 / 3, -0.1, 1.1


@dataclass(frozen=True)
class SspOptions:
    """`rank` of each LoRA and width of each `bottleneck` on offer; `budget`: parameters that stay at most (by default
    as many as FanLoRA has, as in the paper); `search_share` of the steps that the search takes."""

    rank: int = field(default=4, metadata=SIZE)
    bottleneck: int = field(default=18, metadata=SIZE)
    budget: int | None = field(default=None, metadata={"minimum": 1})
    search_share: float = field(default=0.3, metadata={"minimum": 0.01, "maximum": 1})


class _LowRank(nn.Module):
    def __init__(self, d_in: int, d_out: int, rank: int):
        super().__init__()
        self.a = nn.Parameter(torch.empty(rank, d_in).uniform_(-1 / math.sqrt(d_in), 1 / math.sqrt(d_in)))
        self.b = nn.Parameter(torch.zeros(d_out, rank))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return linear(linear(x.to(self.a.dtype), self.a), self.b)


class _After(Bottleneck):
    def forward(self, x: torch.Tensor | None, y: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return super().forward(y)


class _Bias(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.bias


class _Scale(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.minus_one = nn.Parameter(torch.zeros(size))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return y * self.minus_one


def _offers(layer: Any, shape: BackboneShape, options: SspOptions) -> Iterable[tuple[str, nn.Module, nn.Module]]:
    """(name, where it is hooked, the change) of each place of one layer."""
    for module, path in MODULE_PATHS.items():
        d_in, d_out = shape.features(module)
        yield f"lora_{module}", layer.get_submodule(path), _LowRank(d_in, d_out, options.rank)
        yield f"bias_{module}", layer.get_submodule(path), _Bias(d_out)
    yield "adapter_attention", layer.self_attn, _After(shape.hidden, options.bottleneck)
    yield "adapter_ffn", layer.mlp, _After(shape.hidden, options.bottleneck)
    yield "norm_attention", layer.input_layernorm, _Scale(shape.hidden)
    yield "norm_ffn", layer.post_attention_layernorm, _Scale(shape.hidden)


class Search(nn.Module):
    """The places of a model and their gates; lies in the model as its module `ssp`."""

    noise: torch.Tensor
    shift: torch.Tensor

    def __init__(self, model: Any, shape: BackboneShape, options: SspOptions):
        super().__init__()
        self.options = options
        self.budget = options.budget or parameters.parameter_count("fanlora", shape, FanLoraOptions())
        self.places = nn.ModuleDict()
        self.steps: int | None = None  # that the search takes
        self._hooks = {}
        for index, layer in enumerate(model.model.layers):
            for kind, hooked, change in _offers(layer, shape, options):
                name = f"{index}_{kind}"
                self.places[name] = change
                self._hooks[name] = hooked.register_forward_hook(partial(self._add, name))
        self._order = {name: i for i, name in enumerate(self.places)}
        self.sizes = torch.tensor([float(_size(p)) for p in self.places.values()], device="cpu")
        self.gates: nn.Parameter | None = nn.Parameter(torch.zeros(len(self._order)))
        self.register_buffer("noise", torch.full((len(self._order),), 0.5), persistent=False)
        self.register_buffer("shift", torch.zeros(()), persistent=False)

    @property
    def searching(self) -> bool:
        """Whether the places are still to be chosen."""
        return self.gates is not None

    def _add(self, name: str, hooked: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        y = first(output)
        delta = self.places[name](args[0] if args else None, y)
        if self.gates is not None:
            delta = delta * self._gate(self._order[name])
        return plus(output, delta.to(y.dtype))

    def _gate(self, index: int) -> torch.Tensor:
        """One gate in [0, 1]: a sample of its hard-concrete distribution in training, the median in evaluation."""
        assert self.gates is not None
        u = self.noise[index] if self.training else torch.full_like(self.shift, 0.5)
        s = torch.sigmoid((u.log() - (-u).log1p() + self.gates[index] - self.shift) / _TEMPERATURE)
        return (s * (_ABOVE - _BELOW) + _BELOW).clamp(0, 1)

    def draw(self, step: int) -> None:
        """New samples for the step after `step`, the same in every run, and the shift that meets the budget."""
        assert self.gates is not None
        generator = torch.Generator().manual_seed(step)
        noise = torch.rand(len(self._order), generator=generator, device="cpu").clamp(1e-6, 1 - 1e-6)
        self.noise.copy_(noise)
        gates = self.gates.detach().float().cpu()
        low, high = -30.0, 30.0
        for _ in range(40):
            middle = (low + high) / 2
            open_ = torch.sigmoid(gates - middle - _TEMPERATURE * math.log(-_BELOW / _ABOVE))
            low, high = (middle, high) if float((open_ * self.sizes).sum()) > self.budget else (low, middle)
        self.shift.fill_(high)

    def choose(self) -> None:
        """Ends the search: the places with the highest gates that fit into the budget stay."""
        assert self.gates is not None
        left, kept = self.budget, set()
        values = self.gates.detach().float().cpu()
        names = list(self._order)
        for index in values.argsort(descending=True, stable=True).tolist():
            if self.sizes[index] <= left:
                left -= int(self.sizes[index])
                kept.add(names[index])
        self.keep(kept)

    def keep(self, kept: set[str]) -> None:
        """Leaves these places, ungated, and nothing else."""
        for name in [name for name in self.places if name not in kept]:
            self._hooks.pop(name).remove()
            # An optimiser may still hold them: without gradients it leaves them alone.
            self.places[name].requires_grad_(False)
            for parameter in self.places[name].parameters():
                parameter.grad = None
            del self.places[name]
        if self.gates is not None:
            self.gates.grad = None
            self.gates.requires_grad_(False)
        self.gates = None


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def attach(model: Any, shape: BackboneShape, options: SspOptions) -> Any:
    """Adds all places to a frozen model."""
    model.requires_grad_(False)
    model.ssp = Search(model, shape, options).to(device_of(model))
    return model


def begin(module: Any, steps: int) -> None:
    """Tells the search how many optimiser steps there will be; nothing for other methods."""
    search = getattr(module, "ssp", None)
    if isinstance(search, Search) and search.searching:
        search.steps = settled_at(module, steps)
        search.draw(0)


def settled_at(module: Any, steps: int) -> int:
    """After which of `steps` optimiser steps the search is over; 0 for other methods."""
    search = getattr(module, "ssp", None)
    return max(1, round(steps * search.options.search_share)) if isinstance(search, Search) else 0


def after_step(module: Any, step: int) -> None:
    """Draws new gates after optimiser step `step` (from 1 on), or ends the search."""
    search = getattr(module, "ssp", None)
    if not isinstance(search, Search) or not search.searching:
        return
    if search.steps is None:
        raise RuntimeError("SSP: call begin() before the first step")
    if step >= search.steps:
        search.choose()
    else:
        search.draw(step)


def extra_state(module: Any) -> dict[str, torch.Tensor]:
    """What the search keeps beside its parameters between two steps."""
    search = getattr(module, "ssp", None)
    if not isinstance(search, Search) or not search.searching:
        return {}
    return {"ssp.noise": search.noise.clone(), "ssp.shift": search.shift.clone()}


def fit(module: Any, names: Iterable[str]) -> None:
    """Leaves the places whose parameters are among `names`, where these come from after the search."""
    search = getattr(module, "ssp", None)
    names = set(names)
    if isinstance(search, Search) and search.searching and "ssp.gates" not in names:
        search.keep({name.split(".")[2] for name in names if name.startswith("ssp.places.")})


def restore_extra_state(module: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Puts back what `extra_state` gave."""
    if "ssp.noise" in tensors:
        module.ssp.noise.copy_(tensors["ssp.noise"])
        module.ssp.shift.copy_(tensors["ssp.shift"])

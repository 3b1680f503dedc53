"""The layer plan: the only form in which a method reaches a runtime.

A plan says, for each layer and module, which operations its input and its output go through, and whether scales are
made by a generator from the prompt. It grows by operations; no runtime and no kernel names a method.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

from perfbench.errors import AdapterError
from perfbench.methods.shape import MODULES

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LowRank:
    """y += (x a^T) b, with a: [R, D_in] and b: [R, D_out]; alpha / rank is folded into b."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Rotation:
    """y_i := y_i l_i + y_j sine_i, where j is the partner of i: in each group of 2 x `half` outputs of a module those
    that lie `half` apart are a pair. l, the other part of the rotation, is the module's scale. sine: [D_out]."""

    sine: torch.Tensor
    half: int


@dataclass(frozen=True)
class Generator:
    """PARA's vector generator (eq. 6): l - 1 = GELU(h w_down) w_up + (bias - 1), split over `modules`.

    w_down: [hidden, R], w_up: [R, D], bias_minus_one: [D], where D is the sum of D_out over `modules`;
    h: the layer's input at the last prompt token, after the layer's input norm if `normalised`.
    """

    w_down: torch.Tensor
    w_up: torch.Tensor
    bias_minus_one: torch.Tensor
    modules: tuple[str, ...]
    normalised: bool = False

    def map(self, make: Callable[[torch.Tensor], torch.Tensor]) -> Generator:
        """The same with `make` of each tensor."""
        return Generator(make(self.w_down), make(self.w_up), make(self.bias_minus_one), self.modules, self.normalised)


@dataclass(frozen=True)
class SharedPair:
    """y += ((x a^T) * of_ranks) b * of_columns, with a: [R, D_in] and b: [R, D_out], which all tenants share and none
    of them pays for, and of_ranks: [R] and of_columns: [D_out], each tenant's own. cut: the half, a or b, of which
    this is one rank's part, if any: it may be as large as the whole of another module's, and is not the same."""

    a: torch.Tensor
    b: torch.Tensor
    of_ranks: torch.Tensor
    of_columns: torch.Tensor
    cut: str = ""

    @property
    def keys(self) -> dict[str, tuple[str | int | bool, ...]]:
        """By half what tells it from others: those of one backbone that are equal in this are one."""
        return {half: (half, *getattr(self, half).shape, half == self.cut) for half in ("a", "b")}


@dataclass(frozen=True)
class LayerPlan:
    """What one layer gets, by module: what is added to the output by a low-rank pair, with a bias [D_out] beside it, by
    a matrix [R, D_out] on the grouped sum of the input, h_j = the sum of all x_k with k % R = j, or by a shared pair;
    then the output's scale and its rotation; and a scale of the input [D_in], which what is added does not see. A scale
    on down's input is one on up's output. l - 1 is kept of scales ([D_out]) because bf16's step just above 1 is 2^-7,
    while near 0 it keeps 8 bits of any difference. All of them are zero where they change nothing, but for `magnitude`
    [D_out], DoRA's: the length that each row of the weight gets together with what its pair adds to it. A bank holds a
    scale in its place. `invocation`: the pairs and their biases act from these tokens on, as they stand last in the
    prompt, and on what is generated, or nowhere; () stands for where a request's own tokens begin, None for all.
    """

    low_rank: dict[str, LowRank] = field(default_factory=dict)
    scale_minus_one: dict[str, torch.Tensor] = field(default_factory=dict)
    generator: Generator | None = None
    rotation: dict[str, Rotation] = field(default_factory=dict)
    input_scale_minus_one: dict[str, torch.Tensor] = field(default_factory=dict)
    grouped: dict[str, torch.Tensor] = field(default_factory=dict)
    shared: dict[str, SharedPair] = field(default_factory=dict)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)
    bias: dict[str, torch.Tensor] = field(default_factory=dict)
    invocation: tuple[int, ...] | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor of the plan that is a tenant's own."""
        found: list[torch.Tensor] = []
        self.map(lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
        return found

    def map(
        self,
        make: Callable[[torch.Tensor], torch.Tensor],
        make_shared: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
    ) -> LayerPlan:
        """The same with `make` of each tensor, called in the order of `tensors`, and `make_shared` of the others."""
        return LayerPlan(
            {module: LowRank(make(pair.a), make(pair.b)) for module, pair in self.low_rank.items()},
            {module: make(scale) for module, scale in self.scale_minus_one.items()},
            None if self.generator is None else self.generator.map(make),
            {module: Rotation(make(own.sine), own.half) for module, own in self.rotation.items()},
            {module: make(scale) for module, scale in self.input_scale_minus_one.items()},
            {module: make(b) for module, b in self.grouped.items()},
            {
                module: SharedPair(make_shared(p.a), make_shared(p.b), make(p.of_ranks), make(p.of_columns), p.cut)
                for module, p in self.shared.items()
            },
            {module: make(length) for module, length in self.magnitude.items()},
            {module: make(added) for module, added in self.bias.items()},
            self.invocation,
        )

    def in_order(self) -> LayerPlan:
        """The same with its modules in the order in which they run: those that read the same input are neighbours."""
        ordered: dict[str, Any] = {
            entry.name: {module: own[module] for module in MODULES if module in own}
            for entry in fields(self)
            if isinstance(own := getattr(self, entry.name), dict)
        }
        return replace(self, **ordered)

    def with_scales(self, linear_of: Callable[[str], Any] | None = None) -> LayerPlan:
        """The same with a scale in the place of each magnitude. linear_of: a module's linear in the backbone; without
        it the sizes alone are right. AdapterError where that one has a bias, which DoRA leaves as it is."""
        scales = dict(self.scale_minus_one)
        for module, length in self.magnitude.items():
            scales[module] = length
            if linear_of is not None:
                scales[module] = length / row_lengths(linear_of(module), module, self.low_rank.get(module)) - 1
        return replace(self, scale_minus_one=scales, magnitude={})

    @property
    def modules(self) -> set[str]:
        """Those that get anything."""
        found = set(self.generator.modules) if self.generator else set()
        return found.union(*(own for own in vars(self).values() if isinstance(own, dict)))


def row_lengths(linear: Any, module: str, pair: LowRank | None) -> torch.Tensor:
    """fp32 [D_out]: how long each row of a linear's weight is together with what `pair`, on any device, adds to it."""
    if linear.bias is not None:
        raise AdapterError(f"{module}: DoRA scales no bias, and this backbone's has one: it can't be served there")
    weight = linear.weight.detach().float()
    if pair is not None:
        weight = weight + (pair.b.T.to(weight) @ pair.a.to(weight))
    lengths: torch.Tensor = weight.norm(dim=1)
    return lengths if pair is None else lengths.to(pair.a.device)


# (layer, module) -> the linear of a backbone.
LinearOf = Callable[[int, str], Any]

# One LayerPlan for each layer of the backbone.
AdapterPlan = tuple[LayerPlan, ...]


def plan_bytes(plan: AdapterPlan, dtype: torch.dtype) -> int:
    """Bytes that one adapter of this plan takes when it is served in `dtype`."""
    return sum(t.numel() for layer in plan for t in layer.tensors()) * dtype.itemsize

"""Linear modules of 8-bit weights: W = q s, q int8 [D_out, D_in] and s fp32 [D_out], one scale for each output.

q and s are those of torchao's Int8WeightOnlyConfig (0.18: compared bit for bit, in fp32 and in bf16): of every
`nn.Linear`, the head included, a tied embedding staying as it is. Inputs are never rounded to 8 bits. torch's own
product for such weights, `_weight_int8pack_mm`, takes 4 to 30 times as long as that of fp32 weights where inputs are
fp32, and ends the process where D_in is 172 (torch 2.13); so this one is made of oneDNN's product of 8-bit numbers,
which is exact in int32. A row of x is written with as many digits of 8 bits as its dtype has bytes,
x = t (d0 + 256 d1 + ...), t the same for the row, and one product reads the weights once for the digits of all rows.

What that cuts off is less than 2^-30 of a row's largest value in fp32 and 2^-15 in bf16; rounding that value itself to
its dtype takes up to 2^-24 and 2^-8 of it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from perfbench.errors import BackboneError

# Without these instructions oneDNN adds pairs of products in 16 bits, where they do not fit.
_EXACT = torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()

# Of a product at a time: the digits of a long prompt would take more memory than the weights.
MOST_ROWS = 256

# The largest value of a row as a whole number. It has 4 digits, of which the first 2 are enough for bf16; by their
# number where each begins, what it counts, and 128 in each (they are stored as uint8) with half of what is left out.
_FULL = 127 * 2**24
_BEGIN = {2: (16, 24), 4: (0, 8, 16, 24)}
_SHIFTS = {n: torch.tensor(begin, dtype=torch.int32).view(n, 1, 1) for n, begin in _BEGIN.items()}
_PLACES = {n: torch.tensor([[2.0**at for at in begin]]) for n, begin in _BEGIN.items()}
_MIDDLE = {2: 0x80808000 - 2**32, 4: 0x80808080 - 2**32}
_NO_POINT = torch.zeros(1, dtype=torch.int64)


class Int8Weight(torch.nn.Module):
    """q [D_out, D_in], packed for oneDNN where it may be, with `scale` [D_out] fp32."""

    scale: torch.Tensor

    def __init__(self, q: torch.Tensor, scale: torch.Tensor):
        super().__init__()
        self.shape = q.shape
        with torch.inference_mode(False):
            stored = torch.ops.onednn.qlinear_prepack(q, None) if _EXACT and q.device.type == "cpu" else q.clone()
            self.stored = torch.nn.Parameter(stored, requires_grad=False)
            self.register_buffer("scale", scale.clone())
        if not torch.equal(self.q, q):
            raise BackboneError(f"int8 weights {list(q.shape)}: oneDNN reads others than were packed; report this")

    @property
    def q(self) -> torch.Tensor:
        """A copy of q in the usual order: what the product makes of each unit vector."""
        if not self.stored.is_mkldnn:
            return self.stored.detach()
        units = torch.eye(self.shape[1], dtype=torch.uint8)
        return _of_bytes(units, 0, self.stored, torch.ones(self.shape[0])).to(torch.int8).t().contiguous()

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, D_in] -> x W^T + bias [rows, D_out], of the dtype of x."""
        if not self.stored.is_mkldnn:
            y = (linear(x, self.stored.to(x.dtype)) * self.scale).to(x.dtype)
        elif len(x) <= MOST_ROWS:
            y = _by_digits(x, self.stored, self.scale)
        else:
            y = torch.cat([_by_digits(part, self.stored, self.scale) for part in x.split(MOST_ROWS)])
        return y if bias is None else y.add_(bias)


def _by_digits(x: torch.Tensor, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    rows, count, wide = len(x), x.element_size(), x.float()
    largest = wide.abs().amax(dim=1, keepdim=True)
    fixed = (wide * (_FULL / largest)).to(torch.int32).add_(_MIDDLE[count])
    digits = (fixed >> _SHIFTS[count]).to(torch.uint8)  # [count, rows, D_in]
    sums = _of_bytes(digits.flatten(0, 1), 128, stored, scale)
    y = (_PLACES[count] @ sums.view(count, rows * len(scale))).view(rows, len(scale))
    return y.mul_(largest / _FULL).to(x.dtype)


def _of_bytes(x: torch.Tensor, zero: int, stored: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """(x - zero) (q s)^T in fp32 of uint8 x [any, D_in]."""
    found: torch.Tensor = torch.ops.onednn.qlinear_pointwise(
        x, 1.0, zero, stored, scale, _NO_POINT, None, 1.0, 0, torch.float32, "none", [], ""
    )
    return found


class Int8Linear(torch.nn.Linear):
    """Outputs of an Int8Weight, from `first` on, that modules with the same input may share.

    A usual Linear for those who look at it from outside, as PEFT does; nobody can write into its weight.
    """

    def __init__(self, int8: Int8Weight, first: int, out_features: int, bias: torch.nn.Parameter | None):
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = int8.shape[1], out_features
        self.bias = bias  # type: ignore[assignment]
        self._own: Callable[[], Int8Weight | None] = _nothing
        self.share(int8, first)

    def share(self, int8: Int8Weight, first: int) -> None:
        """Reads its weight there from now on."""
        self.int8, self.first = int8, first

    @property
    def columns(self) -> slice:
        """Which of the outputs of `int8` are its own."""
        return slice(self.first, self.first + self.out_features)

    @property
    def q(self) -> torch.Tensor:
        """int8 [D_out, D_in]."""
        return self.int8.q[self.columns]

    @property
    def scale(self) -> torch.Tensor:
        """fp32 [D_out]."""
        return self.int8.scale[self.columns]

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """q s in fp32 [D_out, D_in], a copy."""
        return self.q * self.scale[:, None]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.int8.product(x.reshape(-1, x.shape[-1]))[:, self.columns]
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)

    def by_itself(self) -> Int8Weight:
        """Its weight without that of others: the one that somebody holds, or else a copy."""
        if len(self.int8.scale) == self.out_features:
            return self.int8
        found = self._own()
        if found is None:
            found = Int8Weight(self.q, self.scale)
            self._own = weakref.ref(found)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        """A module over the same weight, by itself."""
        return Int8Linear(self.by_itself(), 0, self.out_features, copy.deepcopy(self.bias, memo))


def _nothing() -> None:
    """A reference to what is gone."""


def quantised(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(q int8 [D_out, D_in], s fp32 [D_out]) of a weight: no element of q s is further than s / 2 from its own."""
    least = torch.finfo(torch.float32).eps
    # 255 steps from the lowest to the highest; in the dtype of the weight, as torchao has it.
    scale = (weight.abs().amax(dim=1) / 127.5).clamp_min(least).float()
    return (weight.float() * (1 / scale)[:, None]).round_().clamp_(-128, 127).to(torch.int8), scale


def quantise(model: torch.nn.Module) -> None:
    """Replaces every Linear of `model`, one after the other, so that each original goes before the next one comes."""
    for path in [path for path, module in model.named_modules() if type(module) is torch.nn.Linear]:
        usual: Any = model.get_submodule(path)
        with torch.no_grad():
            int8 = Int8Weight(*quantised(usual.weight))
        model.set_submodule(path, Int8Linear(int8, 0, usual.out_features, usual.bias))


def join(linears: Sequence[Int8Linear]) -> Int8Weight:
    """One weight of those of modules with the same input, which share it from now on."""
    if len(linears) == 1 or any(one.int8 is linears[0].int8 for one in linears[1:]):
        return linears[0].int8
    joined = Int8Weight(torch.cat([one.q for one in linears]), torch.cat([one.scale for one in linears]))
    first = 0
    for one in linears:
        one.share(joined, first)
        first += one.out_features
    return joined


def part(model: torch.nn.Module) -> bool:
    """Gives modules of `model` that share a weight each their own again; whether there were any."""
    found = [one for one in model.modules() if isinstance(one, Int8Linear) and one.int8 is not one.by_itself()]
    for one in found:
        one.share(one.by_itself(), 0)
    return bool(found)

"""Linear modules whose weights lie in oneDNN's own order, in which its product reads them fastest.

Without it the library puts a weight in order anew in each product, or walks it in steps that don't suit the processor:
with the rows of a decode step that took 1.2 to 1.4 times as long in fp32 and in bf16 (AMD EPYC with AVX-512, 2 threads,
SmolLM2-135M), and 1.0 times with one row in fp32 and with the hundreds of a prefill. The packed form takes the place of
the weight: `weight` puts a copy in the usual order, for those who ask now and then, as the oracle does.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import linear

from perfbench.kernels.placement import onednn_has


def _nothing() -> None:
    """A reference to what is gone."""


def is_packed(weight: torch.Tensor) -> bool:
    """Whether `weight` is packed: also within torch.compile, which sees what Python knows of a tensor, and nothing of
    oneDNN's order."""
    return weight.is_mkldnn or getattr(weight, "packed_by_onednn", False)


def address(tensor: torch.Tensor) -> int:
    """Where a tensor, packed or not, lies."""
    found: int = torch.ops.mkldnn.data_ptr(tensor) if tensor.is_mkldnn else tensor.data_ptr()
    return found


def held_bytes(tensor: torch.Tensor) -> int:
    """What a tensor, packed or not, takes: packed 8-bit weights have sums of theirs beside them, and may be padded."""
    found: int = torch.ops.mkldnn._nbytes(tensor) if tensor.is_mkldnn else tensor.nbytes
    return found


def packed_form(weight: torch.Tensor) -> torch.Tensor | None:
    """weight [D_out, D_in], packed: an opaque tensor of the same shape, for `torch.ops.mkldnn._linear_pointwise`. None
    where oneDNN has no product for it, or would pad it: its bytes are then more than those that are reported."""
    if not onednn_has(weight):
        return None
    with torch.inference_mode(False):
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)
    return packed if torch.ops.mkldnn._nbytes(packed) == weight.nbytes else None


class PackedLinear(torch.nn.Module):
    """Some outputs of a packed weight [any, D_in] that modules with the same input share; `first`: which is the first
    of them. It stands where `replaced` did."""

    def __init__(self, replaced: torch.nn.Linear, packed: torch.nn.Parameter, first: int):
        super().__init__()
        self.in_features, self.out_features = replaced.in_features, replaced.out_features
        self.packed, self.first = packed, first
        self.bias = replaced.bias
        # Arms on modules of their own may still read the weight as it lay: it must not be made a second time.
        self._usual: Callable[[], torch.Tensor | None] = weakref.ref(replaced.weight)

    @property
    def weight(self) -> torch.Tensor:
        """The weight [D_out, D_in] in the usual order: the one that somebody holds, or else a copy."""
        found = self._usual()
        if found is None:
            with torch.inference_mode(False):
                own = self.packed.to_dense()[self.first : self.first + self.out_features].clone()
                found = torch.nn.Parameter(own, requires_grad=False)
            self._usual = weakref.ref(found)
        return found

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return linear(x, self.weight, self.bias)

    def usual(self) -> torch.nn.Linear:
        """A usual module over `weight`."""
        made = torch.nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        made.weight, made.bias = self.weight, self.bias
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> torch.nn.Linear:
        """A usual module, over the same weight where `memo` has the packed form for what copies share."""
        made = self.usual()
        shared = {id(made.weight): made.weight} if id(self.packed) in memo else {}
        copied: torch.nn.Linear = copy.deepcopy(made, {**memo, **shared})
        return copied


def pack(model: torch.nn.Module, paths: Sequence[str]) -> torch.nn.Parameter | None:
    """Packs the weights of the linear modules of `model` at `paths`, one below the other, and replaces the modules;
    what an earlier call has packed stays. None, and nothing is replaced, where `packed_form` has none."""
    linears: list[Any] = [model.get_submodule(path) for path in paths]
    if isinstance(linears[0], PackedLinear):
        return linears[0].packed
    joined = torch.cat([linear.weight.detach() for linear in linears]) if len(linears) > 1 else linears[0].weight
    found = packed_form(joined.detach())
    if found is None:
        return None
    packed, first = torch.nn.Parameter(found, requires_grad=False), 0
    packed.packed_by_onednn = True  # type: ignore[attr-defined]
    for path, replaced in zip(paths, linears, strict=True):
        model.set_submodule(path, PackedLinear(replaced, packed, first))
        first += replaced.out_features
    return packed


def unpack(model: torch.nn.Module) -> bool:
    """Puts usual modules in the place of the packed ones of `model`; whether there were any."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    for path, module in found:
        model.set_submodule(path, module.usual())
    return bool(found)


def overwrite(linears: Sequence[Any], weights: Sequence[torch.Tensor]) -> None:
    """Writes weights [D_out, D_in] into linear modules that are, where they are packed, all that share their form."""
    if not isinstance(linears[0], PackedLinear):
        for usual, weight in zip(linears, weights, strict=True):
            usual.weight.copy_(weight)
        return
    packed = linears[0].packed
    # Outside of inference mode, in which a tensor is made that can't take the place of one made before.
    with torch.inference_mode(False), torch.no_grad():
        joined = torch.cat([weight.to(packed.dtype) for weight in weights])
        packed.data = torch.ops.mkldnn._reorder_linear_weight(joined)
    for module in linears:
        module._usual = _nothing

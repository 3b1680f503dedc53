"""x W^T, by the fastest way that reads W as it lies.

A packed W leaves no choice: with the rows of a decode step it won, and with those of a prefill it was about level.
For one that has to stay in the usual order, since it is the embedding too or would be padded, there are two ways in
fp32. torch's `linear` on a CPU asks MKL for a product that reached 5 to 9 GB/s of the weights with the few rows of a
decode step, where the machine reads 20 (AMD EPYC, 2 threads). With little on the other side the same library reaches
15 to 30 when W is the left factor, one stretch of it for each thread; else oneDNN's product takes 0.5 to 0.9 of the
time, and a multiple of it for a small W, such as the first half of a pair. In bf16 oneDNN's product takes 0.95 of the
time of `linear` at any number of rows.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx.traceback import annotate
from torch.nn.functional import linear

from perfbench.kernels import few_rows_product
from perfbench.kernels.low_rank import MANY_VALUES
from perfbench.kernels.placement import on_gpu, onednn_has
from perfbench.runtimes.int8_linear import Int8Weight
from perfbench.runtimes.packed_linear import is_packed

# With more values than this in x oneDNN is faster.
FEW_VALUES = 3072


def takes_tail(x: torch.Tensor) -> bool:
    """Whether a decode step gets the ranks out of the base product. On a CPU a product of their own is no slower with
    a few rows, and with more the ranks of every row with every adapter would cost arithmetic."""
    return on_gpu(x)


def product(x: torch.Tensor, weight: torch.Tensor | Int8Weight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, D_in], weight [D_out, D_in], packed or not, bias [D_out] or None -> [rows, D_out], contiguous."""
    if isinstance(weight, Int8Weight):
        return weight.product(x, bias)
    packed = is_packed(weight)
    if not packed and not onednn_has(x):
        return linear(x, weight, bias)
    many = x.numel() > FEW_VALUES
    if many and not packed and x.dtype == torch.float32 and weight.numel() <= MANY_VALUES:
        return linear(x, weight, bias)
    if packed or x.dtype != torch.float32 or many:
        if not torch.compiler.is_compiling():
            return _by_onednn(x, weight, bias)
        # Inductor writes a product of its own only for weights that it has packed; this one it has to call.
        with annotate({"fallback_to_eager": True}):
            return _by_onednn(x, weight, bias)
    threads = computing_threads()
    stretches = threads if weight.shape[0] % threads == 0 else 1
    columns = torch.bmm(weight.unflatten(0, (stretches, -1)), x.t().expand(stretches, -1, -1))
    y = columns.flatten(0, 1).t().contiguous()
    return y if bias is None else y.add_(bias)


def computing_threads() -> int:
    """Those of torch. A function of ours, which torch.compile can be told not to follow."""
    return torch.get_num_threads()


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _by_triton(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Triton's interpreter, which alone runs it on a CPU, can't read what is packed there."""
    return (product if weight.is_mkldnn else few_rows_product.FORMS["triton"])(x, weight, bias)


# Of a decode step, by the kernel set.
OF_FEW_ROWS: dict[str, Callable[..., torch.Tensor]] = {"eager": product, "triton": _by_triton, "compiled": product}

"""x W^T, by the fastest way that reads W as it lies.

torch's `linear` in fp32 on a CPU asks MKL for a product that reached 5 to 9 GB/s of the weights with the few rows of a
decode step, where the machine reads 20 (AMD EPYC, 2 threads). With little on the other side the same library reaches 15
to 30 when W is the left factor, one stretch of it for each thread; else oneDNN's product takes 0.5 to 0.9 of the time.
"""

from __future__ import annotations

import torch
from torch.nn.functional import linear

# With more values than this in x oneDNN is faster.
FEW_VALUES = 3072


def product_with_tail(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, columns: int, ranks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [rows, D_in], weight [columns + tail, D_in] -> ([rows, columns], [rows, ranks]), parts of one result; the
    tail may be longer than `ranks`."""
    if _few(x):
        both = _weight_first(x, weight)
        y = both[:columns].t().contiguous()
        # One view in place of three, of a microsecond each.
        tail = both.as_strided((len(x), ranks), (1, len(x)), columns * len(x))
        return y if bias is None else y.add_(bias[:columns]), tail
    both = linear(x, weight, bias)
    return both[:, :columns], both[:, columns : columns + ranks]


def takes_tail(x: torch.Tensor) -> bool:
    """Whether a decode step is fastest with the ranks out of the base product. With more rows on a CPU a product of
    their own is: there each row's ranks with every adapter cost arithmetic."""
    return x.is_cuda or _few(x)


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [rows, D_in], weight [D_out, D_in], bias [D_out] or None -> [rows, D_out], contiguous."""
    if _few(x):
        y = _weight_first(x, weight).t().contiguous()
        return y if bias is None else y.add_(bias)
    if x.device.type != "cpu" or x.dtype != torch.float32 or not torch.backends.mkldnn.is_available():
        return linear(x, weight, bias)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found


def _few(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() <= FEW_VALUES


def _weight_first(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[D_out, rows], one stretch of the weight for each thread."""
    threads = torch.get_num_threads()
    stretches = threads if weight.shape[0] % threads == 0 else 1
    return torch.bmm(weight.unflatten(0, (stretches, -1)), x.t().expand(stretches, -1, -1)).flatten(0, 1)

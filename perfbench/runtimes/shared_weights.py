"""The weights that all arms of a comparison share: whether somebody wrote into them.

PEFT can (its PiSSA takes the principal part out of the weights as it loads); every arm that is measured afterwards
would then run on another model, and agree with itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from perfbench.errors import AdapterError
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.int8_linear import Int8Linear
from perfbench.runtimes.packed_linear import PackedLinear


@contextmanager
def unchanged(backbone: Backbone, who: str) -> Iterator[None]:
    """AdapterError at the end of the block where it changed a weight or a buffer of the backbone; `who` stands first
    in the message. The weights can't be brought back then: the process should end."""
    before = exact_sums(backbone.model)
    yield
    after = exact_sums(backbone.model)
    changed = [name for name, sums in before.items() if name not in after or not torch.equal(sums, after[name])]
    if changed:
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise AdapterError(
            f"{who}: expected PEFT to leave the weights that all arms share as they are, but it changed "
            f"{changed[0]}{more}; remove the adapter from the run"
        )


def exact_sums(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """For each parameter and buffer the sums of its rows' bits, as int64: any change of one value shows. Of a packed
    weight, what other runtimes read: the one in the usual order."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found = {name: _sums_of_rows(tensor.detach()) for name, tensor in tensors if not tensor.is_mkldnn}
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear):
            found[f"{path}.weight"] = _sums_of_rows(module.weight.detach())
        elif isinstance(module, Int8Linear):
            found[f"{path}.q"] = _sums_of_rows(module.q)
    return found


def _sums_of_rows(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    rows = tensor.reshape(-1, tensor.shape[-1]) if tensor.dim() > 1 else tensor.reshape(1, -1)
    rows = rows if rows.is_contiguous() else rows.contiguous()
    # Eight bytes at a time where they divide a row, so that nothing is widened: the sum may wrap, and is exact still.
    size = rows.element_size()
    whole = rows.shape[1] * size % 8 == 0 and rows.storage_offset() * size % 8 == 0
    return rows.view(torch.int64 if whole else torch.uint8).sum(dim=1, dtype=torch.int64)

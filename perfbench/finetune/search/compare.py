"""The shared evaluation beside the naive one: equal figures, and how much faster, against what FLOPs allow."""

from __future__ import annotations

import time

import torch

from perfbench.errors import FinetuneError
from perfbench.finetune.search import flops
from perfbench.finetune.search.evaluate import Ablations, Batch, ablations, naive_ablations
from perfbench.finetune.search.gates import GatedModel

# Most that the mean loss may differ between the two, in nats per token: they add up the same products in another order.
AGREEMENT = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 2e-2}


def compare(model: GatedModel, rank: int, batch: Batch, tokens_per_forward: int) -> dict[str, float]:
    """Seconds of the naive and of the shared evaluation of `batch`, how far their mean losses lie apart in nats per
    token, and the bound of the speed-up. FinetuneError where they don't agree."""
    shared = ablations(model, batch, tokens_per_forward)  # warms up
    start = time.perf_counter()
    naive = naive_ablations(model, batch)
    naive_s = time.perf_counter() - start
    start = time.perf_counter()
    ablations(model, batch, tokens_per_forward)
    shared_s = time.perf_counter() - start
    apart = difference(shared, naive, batch)
    if apart > AGREEMENT[model.dtype]:
        raise FinetuneError(
            f"the shared evaluation differs from the naive one by {apart:.2g} nats per token, more than "
            f"{AGREEMENT[model.dtype]:g}, so its scores can't be trusted; use dtype fp32, and report this"
        )
    bound = bound_of(model, rank, batch)
    return {"naive_s": naive_s, "shared_s": shared_s, "speed_up": naive_s / shared_s, "bound": bound, "apart": apart}


def difference(one: Ablations, other: Ablations, batch: Batch) -> float:
    """The largest difference of a setting's mean loss over the batch, in nats per token."""
    tokens = float(batch.answer_tokens().sum())
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return max(float((a.sum(-1) - b.sum(-1)).abs().max()) for a, b in pairs) / tokens


def bound_of(model: GatedModel, rank: int, batch: Batch) -> float:
    """The speed-up that FLOPs allow on this batch, padding counted as it is computed."""
    answers = float(batch.answer_tokens().sum()) / batch.rows
    return flops.work(model.shape, rank, batch.ids.shape[1], answers).bound

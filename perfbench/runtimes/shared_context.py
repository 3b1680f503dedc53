"""What a batch whose prompts begin with the same tokens may share, and on which tokens its adapters act."""

from __future__ import annotations

import torch

from perfbench.methods.bank import Bank
from perfbench.runtimes.generation import Batch


def reusable(batch: Batch, bank: Bank | None) -> bool:
    """Whether one cache of the shared tokens is right for every request: no adapter of the batch acts on them."""
    return batch.shared_tokens > 0 and (bank is None or all(map(bank.leaves_shared_tokens, batch.slots)))


def acting(batch: Batch, bank: Bank) -> torch.Tensor | None:
    """bool [Q, S]: on which tokens of the prompts the low-rank pairs act; None: on all of them."""
    if not batch.shared_tokens or not any(slot != -1 and bank.leaves_shared_tokens(slot) for slot in batch.slots):
        return None
    acts = torch.ones_like(batch.input_ids, dtype=torch.bool)
    late = [request for request, slot in enumerate(batch.slots) if bank.leaves_shared_tokens(slot)]
    acts[late, : batch.shared_tokens] = False
    return acts

"""On which tokens the adapters of a batch act, and what of prompts that begin with the same tokens may be shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from perfbench.errors import AdapterError
from perfbench.methods.bank import Bank
from perfbench.runtimes.generation import Batch


def invoked(batch: Batch, bank: Bank | None) -> Batch:
    """The same with `acts_from`, by what invokes the adapters in the bank. A request whose prompt lacks its adapter's
    tokens has none (-1), as PEFT leaves it off. AdapterError on two turns, which those tokens would part anew."""
    invocations = [None if bank is None else bank.invocation_of(slot) for slot in batch.slots]
    if not any(invocations):
        return replace(batch, acts_from=tuple(0 if own is None else batch.shared_tokens for own in invocations))
    if batch.follow_up is not None:
        raise AdapterError("an adapter that tokens invoke is served one turn: leave follow_up_tokens out")
    slots, starts = list(batch.slots), []
    for request, own in enumerate(invocations):
        start = batch.shared_tokens if own == () else 0 if own is None else place_of(own, batch, request)
        if start is None:
            slots[request] = -1
        starts.append(start or 0)
    return replace(batch, slots=tuple(slots), acts_from=tuple(starts))


def place_of(tokens: Sequence[int], batch: Batch, request: int) -> int | None:
    """Where in that request's row of `input_ids` the last of these tokens stand, their first one; None where nowhere.
    A GPU is waited for."""
    ids, there = batch.input_ids[request].cpu(), batch.attention_mask[request].cpu().bool()
    if len(tokens) > len(ids):
        return None
    windows = ids.unfold(0, len(tokens), 1)
    found = (windows == torch.tensor(list(tokens))).all(dim=1) & there[: len(windows)]
    return int(found.nonzero()[-1]) if bool(found.any()) else None


def reusable(batch: Batch, bank: Bank | None) -> bool:
    """Whether one cache of the shared tokens is right for all requests: no adapter of an `invoked` batch acts on it."""
    own = zip(batch.slots, batch.acts_from, strict=True) if bank is not None else ()
    return batch.shared_tokens > 0 and all(slot == -1 or start >= batch.shared_tokens for slot, start in own)


def acting(batch: Batch) -> torch.Tensor | None:
    """bool [Q, S]: on which tokens of the prompts of an `invoked` batch the low-rank pairs act; None: on all."""
    if not any(batch.acts_from):
        return None
    device = batch.input_ids.device
    places = torch.arange(batch.input_ids.shape[1], device=device)
    return places >= torch.tensor(batch.acts_from, device=device).unsqueeze(1)

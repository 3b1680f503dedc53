"""The batch that every arm of a comparison gets: prompts, and which request belongs to which tenant."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from perfbench.errors import AdapterError, ScenarioError
from perfbench.measure.on_device.prompts import read_records, tokenise
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.shared_context import place_of
from perfbench.spec.cases import Workload


def make(workload: Workload, backbone: Backbone, seed: int) -> Batch:
    """The batch of a workload on the backbone's device; the same seed gives the same batch. ScenarioError."""
    if workload.prompts is None:
        if workload.prompt_tokens is None:
            raise ScenarioError("workload: expected prompt_tokens or prompts")
        generator = torch.Generator().manual_seed(seed)
        size = (workload.requests, workload.prompt_tokens)
        ids = torch.randint(3, backbone.shape.vocab, size, generator=generator)
        ids[:, : workload.shared_tokens] = ids[:1, : workload.shared_tokens]
        mask = torch.ones_like(ids)
    else:
        places, texts = zip(*read_records(Path(workload.prompts)), strict=True)
        tokenizer, vocabulary = backbone.tokenizer(), backbone.shape.vocab
        ids, mask = tokenise(
            texts, tokenizer, workload.requests, workload.prompt_tokens, vocabulary=vocabulary, places=places
        )
        second = workload.follow_up_tokens + workload.new_tokens if workload.follow_up_tokens else 0
        longest = ids.shape[1] + workload.new_tokens + second
        if longest > backbone.shape.context:
            follow = workload.new_tokens + second
            raise ScenarioError(
                f"{workload.prompts}: the longest of the prompts takes {ids.shape[1]} tokens, with "
                f"{follow} that follow more than the {backbone.shape.context} of {backbone.name}; "
                f"set workload.prompt_tokens to cut them"
            )
    follow_up = None
    if workload.follow_up_tokens:
        generator = torch.Generator().manual_seed(seed + 1)
        size = (workload.requests, workload.follow_up_tokens)
        follow_up = torch.randint(3, backbone.shape.vocab, size, generator=generator).to(backbone.device)
    return Batch(
        ids.to(backbone.device),
        mask.to(backbone.device),
        assign_slots(workload, seed),
        workload.beams,
        workload.new_tokens,
        follow_up=follow_up,
        shared_tokens=workload.shared_tokens,
        drawn=workload.prompts is None,
    )


def invoked(batch: Batch, invocation_of: Callable[[int], tuple[int, ...] | None]) -> Batch:
    """The same with the tokens that invoke the adapter in each request's slot: prompts that are drawn get them where
    the request's own tokens begin, prompts of a file have to have them. AdapterError where they are not there, or do
    not fit. invocation_of: slot -> as `LayerPlan.invocation`."""
    owned = [() if slot == -1 else invocation_of(slot) or () for slot in batch.slots]
    if not any(owned):
        return batch
    ids, kept = batch.input_ids.clone(), []
    for request, tokens in enumerate(owned):
        first = batch.shared_tokens if batch.drawn or not tokens else place_of(tokens, batch, request)
        if first is None or first + len(tokens) > ids.shape[1]:
            raise AdapterError(
                f"request {request}: expected the tokens {list(tokens)}, which invoke its adapter, "
                + (
                    f"to fit into its own {ids.shape[1] - batch.shared_tokens} tokens"
                    if batch.drawn
                    else "in its prompt"
                )
            )
        kept.append((first, first + len(tokens)))
        if batch.drawn:
            ids[request, first : first + len(tokens)] = torch.tensor(tokens, dtype=ids.dtype, device=ids.device)
    return replace(batch, input_ids=ids, kept=tuple(kept))


def fresh(batch: Batch, seed: int, turn: int) -> Batch:
    """`batch` with other prompts of the same lengths, drawn for this turn from the tokens of its own prompts: nothing
    that an arm kept from another turn can serve it. The same seed and turn give the same prompts to every arm."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + turn + 1)
    pool = batch.input_ids[batch.attention_mask.bool()]

    def drawn(size: torch.Size) -> torch.Tensor:
        return pool[torch.randint(len(pool), size, generator=generator).to(pool.device)]

    follow_up = None if batch.follow_up is None else drawn(batch.follow_up.shape)
    ids = drawn(batch.input_ids.shape)
    ids[:, : batch.shared_tokens] = ids[:1, : batch.shared_tokens].clone()
    for request, (first, end) in enumerate(batch.kept):
        ids[request, first:end] = batch.input_ids[request, first:end]
    return replace(batch, input_ids=ids * batch.attention_mask, follow_up=follow_up)


def assign_slots(workload: Workload, seed: int) -> tuple[int, ...]:
    """The bank slot of each request, -1 for the bare backbone.

    The tenants of the batch lie anywhere among the residents, and the requests without an adapter anywhere in the
    batch: both are drawn with the seed.
    """
    draw = random.Random(seed)
    slots = draw.sample(range(workload.resident), workload.tenants)
    requests = range(workload.requests)
    if workload.tenant_mix == "distinct":
        tenants = [i % workload.tenants for i in requests]
    elif workload.tenant_mix == "identical":
        tenants = [0 for _ in requests]
    else:
        exponent = (workload.zipf_exponent or 0.0) if workload.tenant_mix == "zipf" else 0.0
        weights = [1 / rank**exponent for rank in range(1, workload.tenants + 1)]
        tenants = draw.choices(range(workload.tenants), weights, k=workload.requests)
    bare = set(draw.sample(requests, round(workload.without_adapter * workload.requests)))
    return tuple(-1 if i in bare else slots[tenant] for i, tenant in enumerate(tenants))

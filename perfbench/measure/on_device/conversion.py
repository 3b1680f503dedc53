"""Arm `converted`: adapters of other methods as LoRA, and what they lose by that.

What a method does to a linear is, by definition, the weight that it would be merged into, less the backbone's own. PEFT
converts so too, but for the methods alone whose layers tell it that difference, and with the whole decomposition; here
a randomised one finds the largest singular values, which for large weights is many times faster.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.methods.converted import expect_rank
from perfbench.methods.parameters import Parameters
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.shape import MODULES
from perfbench.proof import oracle
from perfbench.proof.best_choices import served
from perfbench.proof.check import relative_difference
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.merged import merged

# Of the randomised decomposition: directions beyond the rank, and how often they turn towards the largest ones.
MORE_DIRECTIONS, TURNS = 8, 4

# What is lost is seen by so many requests, and at so many tokens of each prompt's end.
COMPARED_REQUESTS, COMPARED_TOKENS = 4, 32


def as_lora(plan: AdapterPlan, backbone: Backbone, rank: int) -> Parameters:
    """`layers.<i>.<module>.a` [R, D_in] and `.b` [D_out, R], fp32 on the backbone's device, of every module that `plan`
    changes; the same in every call. AdapterError where scales hang on the prompt, or the rank is too large."""
    values = {}
    for index, module, change in _changes(plan, backbone):
        try:
            expect_rank(rank, module, backbone.shape)
        except ValueError as error:
            raise AdapterError(str(error)) from None
        name = f"layers.{index}.{module}"
        values[f"{name}.a"], values[f"{name}.b"] = nearest_pair(change, rank)
    return values


def nearest_pair(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(a [R, D_in], b [D_out, R]) for which b a is as near to `change` [D_out, D_in] as a pair can be, or nearly."""
    directions = min(rank + MORE_DIRECTIONS, *change.shape)
    generator = torch.Generator(change.device).manual_seed(0)
    basis = torch.randn(change.shape[1], directions, generator=generator, device=change.device)
    for _ in range(TURNS):
        basis = torch.linalg.qr(change.T @ torch.linalg.qr(change @ basis).Q).Q
    left, values, right = torch.linalg.svd(change @ basis, full_matrices=False)
    return (right @ basis.T)[:rank], left[:, :rank] * values[:rank]


def loss(
    backbone: Backbone, batch: Batch, source_of: Callable[[int], AdapterPlan], plan_of: Callable[[int], AdapterPlan]
) -> dict[str, Any]:
    """What the adapters `plan_of` have lost of those that they were converted from, slot by slot.

    conversion_errors: module of a layer -> |change - what the pair makes of it| / |change| in Frobenius' norm, the mean
    over a few tenants; conversion_error: their mean; conversion_logit_distance: of those tenants' requests, each with
    either adapter, the largest relative difference of a token's logits, the mean over the requests. Both fp32.
    """
    requests = [request for request, slot in enumerate(batch.slots) if slot != -1][:COMPARED_REQUESTS]
    errors, distances = defaultdict(list), []
    for request in requests:
        source, own = source_of(batch.slots[request]), plan_of(batch.slots[request])
        for module, error in lost(source, own, backbone).items():
            errors[module].append(error)
        distances.append(_logit_distance(backbone, batch, request, source, own))
    means = {name: sum(found) / len(found) for name, found in errors.items()}
    return {
        "conversion_errors": means,
        "conversion_error": sum(means.values()) / len(means) if means else None,
        "conversion_logit_distance": sum(distances) / len(distances) if distances else None,
    }


def lost(source: AdapterPlan, own: AdapterPlan, backbone: Backbone) -> dict[str, float]:
    """Module of a layer -> the share of what `source` changes of its weight, in Frobenius' norm, that `own`, to which
    it was converted, does not."""
    found = {}
    for (index, module, change), (_, _, pair) in zip(_changes(source, backbone), _changes(own, backbone), strict=True):
        size = change.norm().item()
        found[f"layers.{index}.{module}"] = (pair - change).norm().item() / size if size else 0.0
    return found


def _changes(plan: AdapterPlan, backbone: Backbone) -> Iterator[tuple[int, str, torch.Tensor]]:
    """(layer, module, what `plan` adds to its weight [D_out, D_in], fp32) of each that it changes."""

    def wide(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(backbone.device, torch.float32)

    for index, layer in enumerate(plan):
        own = layer.map(wide, wide)
        for module in sorted(layer.modules, key=MODULES.index):
            weight = backbone.linear(index, module).weight.detach().float()
            yield index, module, merged(weight, None, own, module)[0] - weight


def _logit_distance(backbone: Backbone, batch: Batch, request: int, source: AdapterPlan, own: AdapterPlan) -> float:
    """Between the two adapters, of the request's prompt. Neither makes anything of the whole prompt, so that each of
    its tokens may stand for a chosen one."""
    prompt = served(batch, request, batch.input_ids[request][:1], None).prompt
    cut = max(1, len(prompt) + 1 - COMPARED_TOKENS)
    chosen = torch.cat([prompt[cut:], prompt[:1]])
    asked = [oracle.Served(prompt[:cut], chosen, plan) for plan in (source, own)]
    expected, found = oracle.logits(backbone, asked, torch.float32)
    return relative_difference(found, expected)

"""Products with frozen weights in bf16: what changes, what does not, and that small adapters still count."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from perfbench.finetune import trained
from perfbench.finetune.frozen_products import in_bf16
from tests.perfbench.finetune.models import other_llama


def test_only_linears_whose_weight_is_frozen_change() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Embedding(4, 8))
    model[0].requires_grad_(False)
    inputs = torch.randn(3, 8)
    before = [layer(inputs) for layer in model[:2]]
    in_bf16(model)
    after = [layer(inputs) for layer in model[:2]]
    weight, bias = model[0].weight, model[0].bias
    rounded = (inputs.bfloat16() @ weight.bfloat16().T).float() + bias
    assert torch.equal(after[0], rounded)
    assert not torch.equal(after[0], before[0])
    assert after[0].dtype == torch.float32
    assert torch.equal(after[1], before[1])
    assert weight.dtype == torch.float32, "what is saved stays as it was"


def test_an_adapter_too_small_for_bf16_still_changes_the_loss() -> None:
    """Where autocast rounds it away: sums with products that are in bf16 already leave them as they were."""
    model: Any = other_llama()
    module = trained.attach(model, "lora", None, seed=0).eval()
    ids = torch.arange(3, 23)[None]

    def logits(small: float, autocast: bool) -> torch.Tensor:
        for name, parameter in module.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(small)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found: torch.Tensor = module(input_ids=ids).logits.float()
        return found

    exact = logits(1e-4, False) - logits(0.0, False)
    lost = logits(1e-4, True) - logits(0.0, True)
    in_bf16(module)
    kept = logits(1e-4, False) - logits(0.0, False)
    similar = nn.functional.cosine_similarity
    assert similar(kept.flatten(), exact.flatten(), dim=0) > similar(lost.flatten(), exact.flatten(), dim=0)

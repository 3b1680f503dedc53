"""What the tests of this folder share: a tiny backbone of another shape, batches, and a few steps of training."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from perfbench.finetune import trained

# The first token of every prompt of `examples`.
INVOKING = 2
# Of the methods that are not trained without.
OPTIONS: dict[str, dict[str, Any]] = {"alora": {"invocation": [INVOKING]}}


def other_llama(**fields: Any) -> Any:
    """A random Llama with two layers of 32; `fields` of its configuration."""
    sizes = {
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 64,
        "max_position_embeddings": 64,
    }
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**sizes, **fields})).eval()


def examples(
    rows: int = 3, prompt: int = 6, answer: int = 3, vocab: int = 64, seed: int = 4
) -> dict[str, torch.Tensor]:
    """Prompts of `prompt`, `prompt` - 1, ... tokens and answers of `answer`, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    width = prompt + answer
    ids = torch.randint(3, vocab, (rows, width), generator=generator)
    ids[:, 0] = INVOKING
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for row in range(rows):
        start = prompt - row
        mask[row, : start + answer] = 1
        labels[row, start : start + answer] = ids[row, start : start + answer]
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def train(module: Any, batch: dict[str, torch.Tensor], steps: int, learning_rate: float = 1e-2) -> list[float]:
    """The loss at each of `steps` optimiser steps on the same batch."""
    optimiser = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=learning_rate)
    trained.begin(module, steps)
    losses = run(module, batch, optimiser, range(1, steps + 1))
    module.eval()
    return losses


def run(module: Any, batch: dict[str, torch.Tensor], optimiser: torch.optim.Optimizer, steps: range) -> list[float]:
    """The same steps with an optimiser that is there already."""
    module.train()
    losses = []
    for step in steps:
        loss = module(**batch).loss
        loss.backward()
        optimiser.step()
        trained.after_step(module, step)
        optimiser.zero_grad()
        losses.append(float(loss.detach()))
    return losses

"""One step of training, forward, backward and AdamW: the methods beside each other at the papers' sizes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from perfbench.finetune import trained
from perfbench.finetune.trained_table import trainable
from perfbench.runtimes import backbone
from tests.benchmarks.conftest import DEVICE

ROWS, PROMPT, ANSWER = 4, 48, 16
# The first token of every prompt, from which on an activated LoRA acts.
INVOKING = 3


def make_examples(vocab: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, vocab, (ROWS, PROMPT + ANSWER), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    ids[:, 0] = INVOKING
    labels = ids.clone()
    labels[:, :PROMPT] = -100
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@pytest.mark.parametrize("method", [name for name in trainable() if name != "full"])
@pytest.mark.benchmark(group="training: one step of 4 examples of 64 tokens")
def test_training_step(benchmark: Any, base: backbone.Backbone, method: str) -> None:
    options = {"invocation": [INVOKING]} if method == "alora" else None
    module = trained.attach(base.skeleton(), method, options, seed=0).train()
    parameters = [p for p in module.parameters() if p.requires_grad]
    optimiser, examples, losses = torch.optim.AdamW(parameters, lr=1e-4), make_examples(base.shape.vocab), []
    trained.begin(module, steps=1_000_000)

    def step() -> None:
        loss = module(**examples, use_cache=method == "p-tuning-v2").loss
        loss.backward()
        optimiser.step()
        trained.after_step(module, len(losses) + 1)
        optimiser.zero_grad()
        losses.append(loss.detach())
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark(step)
    benchmark.extra_info["trainable_parameters"] = sum(p.numel() for p in parameters)
    assert torch.isfinite(torch.stack(losses)).all()

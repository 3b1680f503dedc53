"""PEFT's own reading of an adapter's folder is held against ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.methods import parameters
from perfbench.methods.registry import METHODS
from perfbench.proof import by_peft
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch

OPTIONS = METHODS["lora"].options(rank=4, alpha=8)


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def save(base: backbone.Backbone, folder: Path, seed: int, method: str = "lora", options: Any = OPTIONS) -> Path:
    values = parameters.make(method, base.shape, options, seed=seed)
    parameters.implementation(method).save(values, base.shape, options, folder, base.name)
    return folder


@pytest.mark.parametrize("method", ["ia3-original", "road", "miss", "vera", "para", "ia3"])
def test_every_type_is_held_against_peft_s_or_our_training_s_form_of_it(
    base: backbone.Backbone, tmp_path: Path, method: str
) -> None:
    options, implementation = METHODS[method].options(), parameters.implementation(method)
    folders = [save(base, tmp_path / str(seed), seed, method, options) for seed in range(2)]
    plans = [implementation.load(folder, base.shape, options) for folder in folders]
    ids = torch.arange(3, 11)[None]
    batch = Batch(ids, torch.ones_like(ids), (0,), 1, 4)
    fresh = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    for slot, folder in enumerate(folders):
        found = by_peft.fault_of(fresh, base, batch, {0: folder}, lambda _: plans[0])
        assert (found is None) is (slot == 0), found


@pytest.mark.parametrize("served", [(6, 7), (5,)])
def test_an_activated_lora_is_held_against_peft_s_generation(
    base: backbone.Backbone, tmp_path: Path, served: tuple[int, ...]
) -> None:
    """The tokens after the prompt, which do not hold those that invoke it, are adapted too."""
    wanted, other = (METHODS["alora"].options(lora_bias=True, invocation=tokens) for tokens in ((6, 7), served))
    folder = save(base, tmp_path / "adapter", 0, "alora", wanted)
    values = parameters.make("alora", base.shape, other, seed=0)
    plan = parameters.implementation("alora").plan(values, base.shape, other)
    ids = torch.arange(3, 11)[None]
    batch = Batch(ids, torch.ones_like(ids), (0,), 1, 3)
    fresh = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    found = by_peft.fault_of(fresh, base, batch, {0: folder}, lambda _: plan)
    assert (found is None) is (served == (6, 7)), found


@pytest.mark.parametrize("fault", [None, "alpha", "another tenant"])
def test_what_is_read_otherwise_than_by_peft_is_found(
    base: backbone.Backbone, tmp_path: Path, fault: str | None
) -> None:
    """(alpha / r) squared, or the next tenant's adapter, on every runtime alike: they would all agree."""
    folders = [save(base, tmp_path / f"t{tenant}", tenant) for tenant in range(2)]
    ids = torch.arange(3, 19).view(2, 8)
    batch = Batch(ids, torch.ones_like(ids), (0, 1), 1, 4)
    plans = [parameters.implementation("lora").load(folder, base.shape, OPTIONS) for folder in folders]
    if fault == "another tenant":
        plans.reverse()
    if fault == "alpha":
        config = folders[1] / "adapter_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 16}))
    fresh = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    found = by_peft.fault_of(fresh, base, batch, dict(enumerate(folders)), lambda slot: plans[slot])
    assert (found is None) is (fault is None), found
    if found is not None:
        assert str(folders[1 if fault == "alpha" else 0]) in found

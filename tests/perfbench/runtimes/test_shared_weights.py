"""The weights that all arms share: PEFT writes into them for a PiSSA, and that is found out, if it gets that far."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.measure.on_device import arms
from perfbench.methods.checkpoints import peft_fields
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.shared_weights import exact_sums, unchanged
from perfbench.spec.cases import Case


@pytest.fixture
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def checkpoint(folder: Path, **values: Any) -> Path:
    torch.manual_seed(0)
    model = backbone.load("llama-tiny", "fp32", "cpu", seed=0).model
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], **values)
    for tenant in range(2):
        peft.get_peft_model(model, config).save_pretrained(str(folder / f"t{tenant}"))
        model = backbone.load("llama-tiny", "fp32", "cpu", seed=0).model
    return folder


def build(base: backbone.Backbone, method: str, adapters: Path, scratch: Path) -> arms.BuiltArm:
    ids = torch.arange(3, 11).view(2, 4)
    case = Case("c", method, method, METHODS[method].options(adapters=str(adapters)), "transformers", "eager")
    slots = (0, 1) if method == "peft" else (0, 0)
    return arms.build(case, base, Batch(ids, torch.ones_like(ids), slots, 1, 3), 2, 0, scratch)


@pytest.mark.parametrize("method", ["peft", "peft-single"])
def test_a_pissa_is_refused_before_peft_touches_the_weights(
    base: backbone.Backbone, method: str, tmp_path: Path
) -> None:
    folder = checkpoint(tmp_path / "pissa", init_lora_weights="pissa")
    before = exact_sums(base.model)
    with pytest.raises(AdapterError, match="init_lora_weights"):
        build(base, method, folder, tmp_path)
    assert all(torch.equal(sums, before[name]) for name, sums in exact_sums(base.model).items())


@pytest.mark.parametrize("method", ["peft", "peft-single"])
def test_one_that_gets_past_the_reader_is_found_out(
    base: backbone.Backbone, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(tmp_path / "pissa", init_lora_weights="pissa")
    monkeypatch.setattr(peft_fields, "check_initialisation", lambda config, path: None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(AdapterError, match=r"changed .*\.0\.self_attn\.q_proj\.weight and 2 more") as raised:
            build(base, method, folder, tmp_path)
    assert f"{folder}/t0" in str(raised.value)


def test_a_plain_lora_leaves_them_alone(base: backbone.Backbone, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "plain")
    assert build(base, "peft", folder, tmp_path).arm.tensors() == []


def test_adapters_on_parameters_are_for_one_tenant_at_a_time(base: backbone.Backbone, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "weights", target_parameters=["up_proj.weight"])
    with pytest.raises(AdapterError, match=r"target_parameters: expected null, since .*got \['up_proj\.weight'\]"):
        build(base, "peft", folder, tmp_path)


def change(tensor: torch.Tensor) -> None:
    tensor.view(-1)[-1] = torch.nextafter(tensor.view(-1)[-1].float() + 1, torch.tensor(9.0)).to(tensor.dtype)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["model.norm.weight", "lm_head.weight", "model.rotary_emb.inv_freq"])
def test_one_changed_value_is_enough(dtype: str, name: str) -> None:
    base = backbone.load("llama-tiny", dtype, "cpu", seed=0)
    tensors = dict([*base.model.named_parameters(), *base.model.named_buffers()])
    with pytest.raises(AdapterError, match=f"^someone: .* changed {name}"), unchanged(base, "someone"):
        change(tensors[name])


def test_odd_sizes_and_views_have_sums_too() -> None:
    model = torch.nn.Module()
    whole = torch.arange(70, dtype=torch.bfloat16).view(10, 7)
    model.register_buffer("odd", whole)
    model.register_buffer("part", whole[1:, 2:6])
    model.register_buffer("none", torch.empty(0))
    model.register_buffer("one", torch.tensor(3.0))
    before = exact_sums(model)
    whole[1, 3] += 1
    after = exact_sums(model)
    assert [name for name in before if not torch.equal(before[name], after[name])] == ["odd", "part"]

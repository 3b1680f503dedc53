"""Real weights are loaded whole or not at all: transformers would fill in random ones without a word."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.errors import BackboneError
from perfbench.runtimes import backbone
from perfbench.spec.backbone_config import WEIGHTS, find_config

Tensors = dict[str, torch.Tensor]
Plant = Callable[[Path], None]

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 11,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 64,
}
UP_3 = "model.layers.3.mlp.up_proj.weight"


def make(folder: Path, family: str, **values: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **SIZES | values), dtype=torch.float32)
    model.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good"), "llama", tie_word_embeddings=False)


def tensors(edit: Callable[[Tensors], Tensors]) -> Plant:
    def plant(folder: Path) -> None:
        found = edit(load_file(folder / WEIGHTS))
        save_file({k: v.contiguous() for k, v in found.items()}, folder / WEIGHTS, metadata={"format": "pt"})

    return plant


def config(**values: Any) -> Plant:
    def plant(folder: Path) -> None:
        found = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        (folder / "config.json").write_text(json.dumps(found | values), encoding="utf-8")

    return plant


def without(part: str) -> Plant:
    return tensors(lambda t: {name: tensor for name, tensor in t.items() if part not in name})


FAULTS: dict[str, tuple[Plant, str]] = {
    "one tensor less": (without(UP_3), rf"the file lacks {UP_3};"),
    "no head": (without("lm_head"), r"the file lacks lm_head\.weight;"),
    "a layer less": (without("layers.2."), r"lacks model\.layers\.2\.input_layernorm.* and 6 more \(9 in all\)"),
    "a tensor more": (tensors(lambda t: t | {"model.layers.0.x": torch.ones(2)}), r"no use for model\.layers\.0\.x;"),
    "config has more layers": (config(num_hidden_layers=12), r"lacks model\.layers\.11\.input_layernorm"),
    "config has fewer layers": (config(num_hidden_layers=2), r"no use for model\.layers\.2\.input_layernorm"),
    "config is wider": (config(intermediate_size=50), r"sizes .* for model\.layers\.0\.mlp\.down_proj\.weight .32,"),
    "other names": (tensors(lambda t: {f"x.{name}": v for name, v in t.items()}), r"\(102 in all\)"),
    "not a number": (tensors(lambda t: t | {UP_3: t[UP_3] * float("nan")}), rf"got NaN .* fp32, in {UP_3};"),
    "infinity": (tensors(lambda t: t | {UP_3: t[UP_3] / 0}), rf"expected finite weights, .* in {UP_3};"),
}  # fmt: skip


def copy(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_are_not_those_of_the_config_are_refused_by_name(fault: str, good: Path, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    folder = copy(good, tmp_path)
    plant(folder)
    with pytest.raises(BackboneError, match=message) as raised:
        backbone.load(str(folder), "fp32", "cpu", seed=0)
    assert str(raised.value).startswith(f"{folder}: expected ")
    assert "\n" not in str(raised.value)


def test_a_value_that_the_dtype_can_t_hold_is_refused(good: Path, tmp_path: Path) -> None:
    folder = copy(good, tmp_path)
    tensors(lambda t: t | {UP_3: t[UP_3] * 1e8})(folder)
    backbone.load(str(folder), "bf16", "cpu", seed=0)
    with pytest.raises(BackboneError, match=rf"once they are fp16, in {UP_3}"):
        backbone.load(str(folder), "fp16", "cpu", seed=0)


WHOLE: dict[str, Plant] = {
    "as it is": lambda folder: None,
    "sixteen bits": tensors(lambda t: {name: v.bfloat16() for name, v in t.items()}),
    "old rotary buffers": tensors(lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_is_whole_is_loaded(kind: str, good: Path, tmp_path: Path) -> None:
    folder = copy(good, tmp_path)
    WHOLE[kind](folder)
    expected = load_file(folder / WEIGHTS)
    loaded = backbone.load(str(folder), "fp32", "cpu", seed=0).model.state_dict()
    assert all(torch.equal(tensor, expected[name].float()) for name, tensor in loaded.items())


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "gemma"])
def test_a_tied_head_is_not_missing(family: str, tmp_path: Path) -> None:
    folder = make(tmp_path, family, tie_word_embeddings=True, head_dim=8)
    assert "lm_head.weight" not in load_file(folder / WEIGHTS)
    model = backbone.load(str(folder), "fp32", "cpu", seed=0).model
    assert model.lm_head.weight is model.model.embed_tokens.weight


def beside_an_adapter(good: Path, tmp_path: Path) -> Path:
    """A merged model's folder in which the adapter was left."""
    folder = copy(good, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(str(good))
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(str(folder))
    return folder


def test_an_adapter_that_was_left_beside_the_weights_is_refused(good: Path, tmp_path: Path) -> None:
    folder = beside_an_adapter(good, tmp_path)
    for read in (find_config, lambda name: backbone.load(name, "fp32", "cpu", seed=0)):
        with pytest.raises(BackboneError, match="expected a model without an adapter, got one with adapter_config"):
            read(str(folder))


def test_so_is_one_that_only_transformers_finds(good: Path, tmp_path: Path) -> None:
    """On the hub, the configuration of an adapter is seen only once it is loaded."""
    with pytest.raises(BackboneError, match="expected a model without an adapter"):
        backbone._real(str(beside_an_adapter(good, tmp_path)), torch.float32, "cpu")

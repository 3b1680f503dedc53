"""What a full read of the inputs finds before a run: here, what is served and told of all the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench.measure import inputs
from perfbench.methods import parameters
from perfbench.methods.lora import LoraOptions
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes import backbone
from perfbench.spec import cases, scenario

SCENARIO = """\
backbone: {backbone}
dtype: fp32
device: cpu
methods: [{{lora: {{adapters: {adapters}}}}}, {{peft: {{adapters: {adapters}}}}}]
workload: {{prompt_tokens: 6, new_tokens: 3, requests: 2, tenants: 2}}
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "Tiny-Llama"
    backbone.load("llama-tiny", "fp32", "cpu", seed=0).model.save_pretrained(str(folder))
    return folder


def notes(model: str, trained_on: str, folder: Path) -> list[str]:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    shape: BackboneShape = base.shape
    method = parameters.implementation("lora")
    for tenant in range(2):
        values = parameters.make("lora", shape, LoraOptions(), seed=tenant)
        method.save(values, shape, LoraOptions(), folder / f"t{tenant}", trained_on)
    path = folder / "s.yaml"
    path.write_text(SCENARIO.format(backbone=model, adapters=folder), encoding="utf-8")
    resolved = scenario.resolve(scenario.load(path, []), "cpu", "given")
    return inputs.check(cases.expand(resolved))


def test_adapters_of_a_backbone_of_another_name_are_served_with_one_note(model: Path, tmp_path: Path) -> None:
    (note,) = notes(str(model), "mistralai/Mistral-7B-v0.1", tmp_path)
    assert f"{tmp_path / 't0'}: trained on 'mistralai/Mistral-7B-v0.1', served on {model}" in note


@pytest.mark.parametrize("trained_on", ["", "someone/tiny-llama", "/elsewhere/Tiny-Llama/"])
def test_a_copy_of_the_backbone_is_no_other(trained_on: str, model: Path, tmp_path: Path) -> None:
    assert notes(str(model), trained_on, tmp_path) == []


def test_a_named_shape_is_nobody_s_backbone(tmp_path: Path) -> None:
    assert notes("llama-tiny", "mistralai/Mistral-7B-v0.1", tmp_path) == []

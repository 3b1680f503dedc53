"""What a runtime can't do is refused before anything is loaded, with the way out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import ScenarioError
from perfbench.machine import compiler
from perfbench.spec import backbone_config, cases, scenario
from perfbench.spec.runtime_support import unsupported

TINY = backbone_config.NAMED_CONFIGS["llama-tiny"]
REFUSED = {
    "rope": (TINY | {"rope_parameters": {"rope_type": "dynamic"}}, "rope_type dynamic"),
    "old-rope": ({**TINY, "rope_parameters": None, "rope_scaling": {"rope_type": "longrope"}}, "rope_type longrope"),
    "activation": (TINY | {"hidden_act": "relu"}, "hidden_act relu"),
    "window": (TINY | {"model_type": "mistral", "sliding_window": 128}, "sliding_window 128"),
    "window-by-default": (TINY | {"model_type": "mistral", "max_position_embeddings": 8192}, "sliding_window 4096"),
    "norms of heads": (TINY | {"model_type": "qwen3"}, "model_type qwen3"),
    "qwen2-window": (
        TINY | {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
        "sliding_window 64",
    ),
}
SCENARIO = """
backbone: {backbone}
dtype: fp32
runtime: {runtime}
methods: [lora, peft]
workload: {{prompt_tokens: 4, new_tokens: 4, requests: 2, tenants: 2}}
"""


def resolved(folder: Path, runtime: str, backbone: str = "llama-tiny") -> scenario.Scenario:
    path = folder / "x.yaml"
    path.write_text(SCENARIO.format(backbone=backbone, runtime=runtime))
    return scenario.resolve(scenario.load(path), "cpu")


@pytest.mark.parametrize("case", REFUSED)
def test_static_refuses_what_it_does_not_have(case: str) -> None:
    config, problem = REFUSED[case]
    found = unsupported("static", config)
    assert found is not None
    assert found.startswith(problem)
    assert "runtime transformers" in found
    assert unsupported("transformers", config) is None


@pytest.mark.parametrize("name", backbone_config.NAMED_CONFIGS)
def test_static_runs_every_named_shape(name: str) -> None:
    assert unsupported("static", backbone_config.NAMED_CONFIGS[name]) is None


def test_a_window_wider_than_the_context_never_slides() -> None:
    assert unsupported("static", TINY | {"model_type": "mistral", "sliding_window": 4096}) is None
    above_its_layers = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64, "max_window_layers": 3}
    assert unsupported("static", TINY | above_its_layers) is None


def test_the_scenario_names_file_and_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config: dict[str, Any] = TINY | {"hidden_act": "relu"}
    monkeypatch.setitem(backbone_config.NAMED_CONFIGS, "odd", config)
    with pytest.raises(ScenarioError, match=r"x\.yaml:4: runtime: odd: hidden_act relu: .*choose runtime transformers"):
        scenario.check_against_backbone(resolved(tmp_path, "[transformers, static]", "odd"))
    scenario.check_against_backbone(resolved(tmp_path, "transformers", "odd"))


def test_triton_on_a_cpu_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(SCENARIO.format(backbone="llama-tiny", runtime="transformers") + "kernels: [eager, triton]\n")
    document = scenario.load(path)
    with pytest.raises(ScenarioError, match=r"x\.yaml:7: kernels: triton: .*CUDA.*choose kernels eager"):
        scenario.resolve(document, "cpu")
    assert scenario.resolve(document, "cuda").kernels == ("eager", "triton")


def test_an_arm_that_no_runtime_serves_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"x\.yaml:5: methods: peft is served on runtime transf"):
        resolved(tmp_path, "static")


def test_an_arm_is_left_out_aloud_where_another_runtime_serves_it(tmp_path: Path) -> None:
    found = resolved(tmp_path, "[transformers, static]")
    assert "runtime static: without peft, which it can't serve" in found.notes
    arms = {c.runtime: [case.arm for case in c.cases] for c in cases.expand(found)}
    assert arms == {"transformers": ["none", "lora", "peft"], "static": ["none", "lora"]}


QUANTISED = """
backbone: llama-tiny
dtype: fp32
quantisation: [none, int8]
runtime: static
kernels: {kernels}
methods: [lora, {method}]
workload: {{prompt_tokens: 4, new_tokens: 4, requests: 1, tenants: 1}}
"""


@pytest.mark.parametrize(
    ("fields", "kind", "message"),
    [
        ({"method": "lora-merged"}, "cpu", "methods: lora-merged: weights of quantisation int8 would have to"),
        ({"kernels": "triton"}, "cuda", "quantisation: int8: its products run on a CPU, this run is on cuda"),
        ({}, "cuda", "quantisation: int8: its products run on a CPU, this run is on cuda"),
        ({"kernels": "compiled"}, "cpu", "kernels: compiled: it reads no weights of quantisation int8; choose"),
    ],
)  # fmt: skip
def test_what_reads_no_8_bit_weights_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: dict[str, str], kind: str, message: str
) -> None:
    monkeypatch.setattr(compiler, "problem", lambda: None)
    path = tmp_path / "x.yaml"
    path.write_text(QUANTISED.format(**({"kernels": "eager", "method": "ia3"} | fields)))
    with pytest.raises(ScenarioError, match=message):
        scenario.resolve(scenario.load(path), kind)
    assert scenario.resolve(scenario.load(path, ["quantisation=none"]), kind).quantisation == ("none",)


RANKS = """
backbone: llama-tiny
dtype: fp32
runtime: static
tensor_parallel_size: [1, 2]
methods: [lora]
workload: {prompt_tokens: 4, new_tokens: 4, requests: 2, tenants: 2}
"""


def of_ranks(folder: Path, *sets: str, device: str = "cpu") -> scenario.Scenario:
    path = folder / "x.yaml"
    path.write_text(RANKS)
    found = scenario.resolve(scenario.load(path, list(sets)), device)
    scenario.check_against_backbone(found)
    return found


def test_ranks_are_an_axis_of_their_own_comparisons(tmp_path: Path) -> None:
    one, two = cases.expand(of_ranks(tmp_path))
    assert (one.tensor_parallel_size, two.tensor_parallel_size) == (1, 2)
    assert (one.id.split("/")[0], two.id.split("/")[0]) == ("llama-tiny-fp32-cpu", "llama-tiny-fp32-cpux2")
    assert cases.from_json(cases.to_json(two)) == two
    older = {key: value for key, value in cases.to_json(one).items() if key != "tensor_parallel_size"}
    assert cases.from_json(older) == one


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("runtime=transformers", r"transformers: .*accelerate's device map.* is not there yet; choose runtime static"),
        ("runtime=continuous", r"continuous: only runtime static is spread over several ranks; choose"),
        ("kernels=triton", r"triton: .*no place for the sum over ranks; choose kernels eager"),
        ("quantisation=int8", r"int8: .*8 bits.*not dealt out to ranks; choose quantisation none"),
        ("methods=[lora-merged]", r"lora-merged: .*whole weights.*choose tensor_parallel_size 1"),
        ("tensor_parallel_size=4", r"llama-tiny: 4 ranks: expected a divisor of its 2 kv_heads"),
        ("tensor_parallel_size=0", r"expected an integer >= 1, got 0"),
    ],
)
def test_what_several_ranks_can_not_do_is_refused(tmp_path: Path, setting: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=f"^--set {re.escape(setting)}: {message}"):
        of_ranks(tmp_path, setting, device="cpu" if "int8" in setting else "cuda")

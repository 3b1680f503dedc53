"""Adapter folders: what we write we read, what PEFT writes we serve alike, and what can't be served is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from perfbench.errors import AdapterError
from perfbench.methods import parameters
from perfbench.methods.alora import AloraOptions
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.para import ParaOptions
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULES, BackboneShape
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.backbone_config import find_config

TINY = BackboneShape.of_config(find_config("llama-tiny"))
CASES: dict[str, tuple[str, Any]] = {
    "lora": ("lora", LoraOptions()),
    "lora-alpha": ("lora", LoraOptions(rank=3, alpha=7.0, modules=("v", "down"))),
    "lora-bias": ("lora", LoraOptions(rank=3, alpha=7.0, lora_bias=True)),
    "alora": ("alora", AloraOptions(invocation=(5, 6))),
    "alora-bias": ("alora", AloraOptions(rank=3, alpha=7.0, lora_bias=True, invocation=(7,))),
    "dora": ("dora", METHODS["dora"].options()),
    "dora-alpha": ("dora", METHODS["dora"].options(rank=3, alpha=7.0, modules=("v", "down"))),
    "fanlora": ("fanlora", FanLoraOptions()),
    "fanlora-empty-layer": ("fanlora", FanLoraOptions(rank=2, setting=(("k", "gate"), (), ("o",)))),
    "ia3": ("ia3", METHODS["ia3"].options()),
    "ia3-original": ("ia3-original", METHODS["ia3-original"].options()),
    "ia3-all": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=("o", "gate", "up", "down"))),
    "road": ("road", RoadOptions()),
    "road-4": ("road", RoadOptions(variant="road_4", group_size=8, modules=("k", "o"))),
    "miss": ("miss", METHODS["miss"].options()),
    "miss-16": ("miss", METHODS["miss"].options(rank=16, modules=("k", "down"))),
    "vera": ("vera", METHODS["vera"].options()),
    "vera-16": ("vera", METHODS["vera"].options(rank=16, modules=("k", "down"), key=3)),
    "para": ("para", ParaOptions()),
    "para-normalised": ("para", ParaOptions(rank=3, pool="normalised")),
}
SERVED = tuple(name for name, method in METHODS.items() if method.peft_types)


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def write(case: str, folder: Path) -> AdapterPlan:
    method, options = CASES[case]
    values = parameters.make(method, TINY, options, seed=8)
    parameters.implementation(method).save(values, TINY, options, folder, "llama-tiny")
    plan: AdapterPlan = parameters.implementation(method).plan(values, TINY, options)
    return plan


def load(method: str, folder: Path) -> AdapterPlan:
    plan: AdapterPlan = parameters.implementation(method).load(folder, TINY, METHODS[method].options())
    return plan


def logits(tiny: backbone.Backbone, plan: AdapterPlan) -> torch.Tensor:
    """[1, N, V] of our own arm, teacher-forced."""
    bank = Bank(union_layout([plan]), 1, tiny.dtype, tiny.device, tiny.linear)
    bank.admit(plan)
    ids = torch.arange(3, 12).unsqueeze(0)
    batch = Batch(ids[:, :6], torch.ones_like(ids[:, :6]), (0,), beams=1, new_tokens=4)
    forced = torch.cat([ids[:, 6:], ids[:, :1]], dim=1)
    return PlanArm(tiny, bank, "eager").generate(batch, forced=forced, with_logits=True).logits


def assert_agree(tiny: backbone.Backbone, plan: AdapterPlan, theirs: Any) -> None:
    """Our arm and PEFT's forward of the same tokens; and the adapter does something."""
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.inference_mode():
        expected = theirs.eval()(ids).logits[:, 5:]
        bare = tiny.model(ids).logits[:, 5:]
    found = logits(tiny, plan)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((bare - expected).norm() / expected.norm()) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_what_is_written_is_read_again(case: str, tmp_path: Path) -> None:
    written = write(case, tmp_path / "adapter")
    found = load(CASES[case][0], tmp_path / "adapter")
    assert len(found) == len(written)
    for new, old in zip(found, written, strict=True):
        kinds = [{name: set(own) for name, own in vars(layer).items() if isinstance(own, dict)} for layer in (new, old)]
        assert kinds[0] == kinds[1]
        assert new.invocation == old.invocation
        for one, other in zip(new.in_order().tensors(), old.in_order().tensors(), strict=True):
            torch.testing.assert_close(one, other)
        for module, pair in old.low_rank.items():
            torch.testing.assert_close(new.low_rank[module].a, pair.a, rtol=0, atol=0)
        if old.generator is not None:
            assert new.generator is not None
            assert new.generator.modules == old.generator.modules
            assert new.generator.normalised == old.generator.normalised
            for one, other in zip(new.tensors(), old.tensors(), strict=True):
                assert torch.equal(one, other)


def test_writing_again_leaves_nothing_else_in_the_folder(tmp_path: Path) -> None:
    for case in ("lora", "fanlora"):
        write(case, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed")  # of merging, which is asked of nobody
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("para")])
def test_peft_serves_what_we_write(tiny: backbone.Backbone, case: str, tmp_path: Path) -> None:
    write(case, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny.skeleton(), str(tmp_path / "adapter"))
    assert_agree(tiny, load(CASES[case][0], tmp_path / "adapter"), theirs)


PEFT_CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "down_proj"]},
    "all-linear": {"r": 2, "lora_alpha": 2, "target_modules": "all-linear"},
    "rslora": {"r": 4, "lora_alpha": 6, "use_rslora": True, "target_modules": ["k_proj", "gate_proj"]},
    "patterns": {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj", "v_proj", "up_proj"],
        "rank_pattern": {"v_proj": 2, "model.layers.1.self_attn.q_proj": 7},
        "alpha_pattern": {"v_proj": 5, "layers.2.mlp.up_proj": 1},
    },
}


@pytest.mark.parametrize("kind", PEFT_CONFIGS)
def test_we_serve_what_peft_writes(tiny: backbone.Backbone, kind: str, tmp_path: Path) -> None:
    torch.manual_seed(2)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **PEFT_CONFIGS[kind])
    theirs = peft.get_peft_model(tiny.skeleton(), config)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.3)
    theirs.save_pretrained(str(tmp_path))
    assert_agree(tiny, load("lora", tmp_path), theirs)


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / WEIGHTS)
    edit(tensors)
    save_file(tensors, folder / WEIGHTS)


def edit_config(folder: Path, **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    (folder / CONFIG).write_text(json.dumps(config | values), encoding="utf-8")


def pickle_instead(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def truncate(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def spoil(value: float) -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        tensors[min(tensors)].view(-1)[0] = value

    return lambda folder: edit_tensors(folder, edit)


def cut_columns(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            tensors[name] = tensor[..., :-1].contiguous() if tensor.shape[-1] > 1 else tensor[:-1].contiguous()

    edit_tensors(folder, edit)


def rename_layer(folder: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if ".layers.2." in n]:
            tensors[name.replace(".layers.2.", ".layers.3.")] = tensors.pop(name)

    edit_tensors(folder, edit)


def unknown_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"base_model.model.lm_head.weight": torch.ones(2)}))


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "pickle": (pickle_instead, "a pickle can run code"),
    "truncated": (truncate, "not a whole safetensors file"),
    "empty": (lambda folder: (folder / WEIGHTS).write_bytes(b"") and None, "not a whole safetensors file"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), f"no {WEIGHTS}"),
    "no config": (lambda folder: (folder / CONFIG).unlink(), "no such file"),
    "broken config": (lambda folder: (folder / CONFIG).write_text("{") and None, "not readable as JSON"),
    "config is a list": (lambda folder: (folder / CONFIG).write_text("[]") and None, "expected a JSON object"),
    "not a number": (spoil(float("nan")), "expected finite values"),
    "infinity": (spoil(float("-inf")), "expected finite values"),
    "peft_type": (lambda folder: edit_config(folder, peft_type="PREFIX_TUNING"), "got 'PREFIX_TUNING'"),
    "other width": (cut_columns, "expected size"),
    "other depth": (rename_layer, "made for another backbone"),
    "unknown tensor": (unknown_tensor, "lm_head"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("method", SERVED)
def test_a_faulty_folder_is_refused_in_one_line_that_names_it(method: str, fault: str, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    folder = tmp_path / "adapter"
    write(method, folder)
    plant(folder)
    with pytest.raises(AdapterError, match=message) as raised:
        load(method, folder)
    assert str(folder) in str(raised.value)
    assert "\n" not in str(raised.value)


LORA_FAULTS: dict[str, tuple[dict[str, Any], str]] = {
    "dora without magnitudes": ({"use_dora": True}, "lora_magnitude_vector and 20 more: expected by"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "bias": ({"bias": "all"}, "bias: expected 'none', got 'all'"),
}


@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_a_lora_that_is_more_than_a_low_rank_pair_is_refused(fault: str, tmp_path: Path) -> None:
    values, message = LORA_FAULTS[fault]
    write("lora", tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(AdapterError, match=message) as raised:
        load("lora", tmp_path)
    assert str(tmp_path) in str(raised.value)


DORA_FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor], str], Any], str]] = {
    "one is missing": (lambda tensors, name: tensors.pop(name), "q_proj.lora_magnitude_vector: expected by"),
    "one too many": (
        lambda tensors, name: [tensors.pop(name.replace("magnitude_vector", f"{half}.weight")) for half in "AB"],
        "layers.0.q.magnitude: expected the pair that belongs to it, got none",
    ),
    "another size": (lambda tensors, name: tensors.update({name: torch.ones(3)}), r"expected size \[64\], got \[3\]"),
}


@pytest.mark.parametrize("fault", DORA_FAULTS)
def test_magnitudes_that_do_not_fit_their_pairs_are_refused(fault: str, tmp_path: Path) -> None:
    edit, message = DORA_FAULTS[fault]
    write("dora", tmp_path)
    edit_tensors(tmp_path, lambda t: edit(t, "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"))
    with pytest.raises(AdapterError, match=message):
        load("dora", tmp_path)


def test_magnitudes_of_a_plain_lora_are_refused(tmp_path: Path) -> None:
    write("dora", tmp_path)
    edit_config(tmp_path, use_dora=False)
    with pytest.raises(AdapterError, match=r"expected lora_A.weight or lora_B.weight, got lora_magnitude_vector"):
        load("lora", tmp_path)


def test_half_a_pair_is_refused(tmp_path: Path) -> None:
    write("lora", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop(min(tensors)))
    with pytest.raises(AdapterError, match="partner is missing"):
        load("lora", tmp_path)


def test_no_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder"):
        load("lora", tmp_path / "none")


@pytest.mark.parametrize("values", [{"rank": None}, {"rank": 0}, {"pool": "mean"}], ids=str)
def test_para_s_own_fields_are_checked(values: dict[str, Any], tmp_path: Path) -> None:
    write("para", tmp_path)
    edit_config(tmp_path, **values)
    with pytest.raises(AdapterError, match=f"{next(iter(values))}: expected"):
        load("para", tmp_path)

"""Every method that is trained: where it starts, what it changes, what a folder of it keeps, and how large it is."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from perfbench.errors import AdapterError, FinetuneError
from perfbench.finetune import trained
from perfbench.finetune.trained_table import BASELINES, trainable
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.para import ParaOptions
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import find_config
from tests.perfbench.finetune.models import OPTIONS, examples, other_llama, run, train

METHOD_NAMES = tuple(trainable())
# Soft tokens that are not there at first change the output from the start.
SOFT = ("prompt-tuning", "p-tuning", "p-tuning-v2", "idpg", "lpt")
# Those of them that PEFT keeps, in a form that can't be trained further.
SOFT_BY_PEFT = ("prompt-tuning", "p-tuning-v2")

# Every seed has the same initial values.
ALIKE = ("ia3-original", "road", "miss", "vera", "bitfit", "full")

# On LLaMA-2 7B: exact, and what the papers print, in millions.
COUNTS: dict[str, tuple[int, float | None]] = {
    "lora": (9_994_240, 10.0),
    "dora": (11_354_112, None),  # LoRA's, and a magnitude for each of the 1,359,872 outputs
    "alora": (9_994_240, None),
    "fanlora": (8_613_888, 8.6),
    "ia3": (9_831_936, 9.8),
    "ia3-original": (614_400, None),
    "para": (9_560_064, None),  # 8.9 without b, checked below
    "road": (1_359_872, None),
    "miss": (10_878_976, None),
    "vera": (1_417_216, None),
    "adalora": (19_990_272, None),  # before half of the ranks is given up, see test_baselines
    "prompt-tuning": (262_144, None),
    "p-tuning": (149_760, None),  # 64 x 36 + 36 x 4096; PEFT's own encoder would have 562,520
    "p-tuning-v2": (16_777_216, None),
    "idpg": (20_988_928, None),
    "lpt": (8_393_728, None),
    "houlsby": (9_437_184, 9.4),
    "learned-adapter": (9_437_504, None),  # the paper's 9.5 is 0.7% more
    "bitfit": (1_359_872, None),
    "ssp": (21_054_016, None),  # before the search, see test_baselines
    "full": (6_738_415_616, None),
}


@pytest.fixture(scope="module")
def base() -> Any:
    return other_llama()


def attached(base: Any, name: str, options: Any = None, seed: int = 0) -> Any:
    return trained.attach(copy.deepcopy(base), name, OPTIONS.get(name) if options is None else options, seed)


def logits(module: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = module.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def test_the_table_has_every_method_that_is_served_and_says_so() -> None:
    served = {name for name, method in METHODS.items() if method.served_by == "plan" and method.trained_by}
    assert trainable().keys() - BASELINES.keys() == served
    assert not BASELINES.keys() & METHODS.keys()
    assert all(trained.find(name).options is METHODS[name].options for name in served)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_parameters_on_llama2_7b(name: str) -> None:
    exact, printed = COUNTS[name]
    assert trained.parameter_count(name, find_config("llama2-7b"), OPTIONS.get(name)) == exact
    if printed is not None:
        assert round(exact / 1e6, 1) == printed


def test_para_s_printed_count_leaves_b_out() -> None:
    assert COUNTS["para"][0] - 32 * (4096 + 4096 + 11008) == 8_945_664


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in SOFT])
def test_training_starts_from_the_backbone(base: Any, name: str) -> None:
    batch = examples()
    torch.testing.assert_close(logits(attached(base, name), batch), logits(base, batch), rtol=0, atol=0)


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_only_the_adapter_learns_and_the_loss_goes_down(base: Any, name: str) -> None:
    module, before = attached(base, name), copy.deepcopy(base)
    losses = train(module, examples(), steps=8, learning_rate=2e-3 if name == "full" else 2e-2)
    assert losses[-1] < losses[0]
    inner = module.get_base_model() if isinstance(module, peft.PeftModel) else module
    kept = dict(before.named_parameters())
    changed = {
        n for n, p in inner.named_parameters()
        if n.replace(".base_layer.", ".") in kept and not torch.equal(p, kept[n.replace(".base_layer.", ".")])
    }  # fmt: skip
    assert changed == (set(kept) if name == "full" else set())


@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_folder_gives_the_module_back(base: Any, name: str, tmp_path: Path) -> None:
    batch, module = examples(), attached(base, name)
    train(module, batch, steps=4)
    trained.save(module, tmp_path / "adapter")
    assert sorted(p.name for p in tmp_path.rglob("*") if p.is_file()) == [CONFIG, WEIGHTS]
    again = trained.load(copy.deepcopy(base), tmp_path / "adapter")
    assert not any(p.requires_grad for p in again.parameters())
    if name == "adalora":  # the ranks that were given up are zeros in the one, and not there in the other
        torch.testing.assert_close(logits(again, batch), logits(module, batch), rtol=0, atol=1e-5)
    else:
        assert torch.equal(logits(again, batch), logits(module, batch))
    assert not torch.equal(logits(again, batch), logits(base, batch))


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in (*SOFT_BY_PEFT, "adalora")])
def test_training_goes_on_from_a_folder(base: Any, name: str, tmp_path: Path) -> None:
    batch, module = examples(), attached(base, name)
    train(module, batch, steps=4)
    trained.save(module, tmp_path)
    again = trained.load(copy.deepcopy(base), tmp_path, trainable=True)
    assert train(again, batch, steps=3) == train(module, batch, steps=3)


@pytest.mark.parametrize("name", SOFT_BY_PEFT)
def test_soft_tokens_refuse_to_go_on_from_a_folder(base: Any, name: str, tmp_path: Path) -> None:
    trained.save(attached(base, name), tmp_path)
    with pytest.raises(FinetuneError, match="can't go on training soft tokens"):
        trained.load(copy.deepcopy(base), tmp_path, trainable=True)


@pytest.mark.parametrize("stop", [2, 7])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_a_checkpoint_goes_on_as_if_nothing_had_happened(base: Any, name: str, stop: int) -> None:
    batch, steps, states = examples(), 10, []
    modules = [attached(base, name), attached(base, name, seed=1)]
    for module in modules:
        trained.begin(module, steps)
    optimisers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in modules]
    run(modules[0], batch, optimisers[0], range(1, stop + 1))
    states = {n: t.clone() for n, t in trained.training_state(modules[0]).items()}
    trained.restore_training_state(modules[1], states)
    if name == "ssp" and stop == 7:  # parameters that are gone have no state to hand over
        optimisers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2) for m in modules]
    else:
        optimisers[1].load_state_dict(copy.deepcopy(optimisers[0].state_dict()))
    rest = range(stop + 1, steps + 1)
    assert run(modules[1], batch, optimisers[1], rest) == run(modules[0], batch, optimisers[0], rest)
    assert torch.equal(logits(modules[0], batch), logits(modules[1], batch))


def test_a_checkpoint_of_something_else_is_refused(base: Any) -> None:
    state = trained.training_state(attached(base, "para", {"rank": 3}))
    with pytest.raises(FinetuneError, match="para_w_down"):
        trained.restore_training_state(attached(base, "para"), state)


@pytest.mark.parametrize("name", [name for name in METHOD_NAMES if name not in ALIKE])
def test_the_seed_decides_the_initial_values_and_nothing_else(base: Any, name: str) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    one, again, other = (trained.training_state(attached(base, name, seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(one[n], again[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("fields", [{"hidden_size": 48}, {"num_hidden_layers": 3}], ids=["width", "depth"])
@pytest.mark.parametrize("name", METHOD_NAMES)
def test_an_adapter_of_another_backbone_is_refused_in_one_line(
    base: Any, name: str, fields: dict[str, int], tmp_path: Path
) -> None:
    if name in SOFT and name != "p-tuning-v2" and "num_hidden_layers" in fields:
        pytest.skip("soft tokens know nothing of the layers")
    trained.save(attached(other_llama(**fields), name), tmp_path)
    model = copy.deepcopy(base)
    with pytest.raises(AdapterError, match="made for another") as raised:
        trained.load(model, tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]


FOLDERS: dict[str, tuple[dict[str, Any], str]] = {
    "of an unknown type": ({"peft_type": "NONSENSE"}, "peft_type: got 'NONSENSE'"),
    "of an unknown baseline": ({"peft_type": "PERFBENCH", "method": "nonsense"}, "method: got 'nonsense'"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_can_t_be_loaded_is_refused(base: Any, kind: str, tmp_path: Path) -> None:
    values, message = FOLDERS[kind]
    trained.save(attached(base, "bitfit"), tmp_path)
    (tmp_path / CONFIG).write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(AdapterError, match=message):
        trained.load(base, tmp_path)


def test_no_folder_is_refused(base: Any, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder"):
        trained.load(base, tmp_path / "missing")


def test_a_folder_that_can_t_be_written_is_named(base: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for name in ("para", "bitfit"):
        with pytest.raises(AdapterError, match="can't write the adapter"):
            trained.save(attached(base, name), tmp_path / "file" / "adapter")


def test_options_come_from_a_mapping_a_dataclass_or_nowhere() -> None:
    assert trained.options_of("para", {"rank": 3}) == ParaOptions(rank=3)
    assert trained.options_of("lora", LoraOptions(rank=2)) == LoraOptions(rank=2)
    assert trained.options_of("fanlora", None) == FanLoraOptions()


OPTIONS_THAT_DO_NOT_FIT: dict[str, tuple[str, dict[str, Any], str]] = {
    "depth": ("fanlora", {"setting": [["q"]]}, "the setting has 1 layers, the backbone 2"),
    "pool": ("para", {"pool": "mean"}, "pool: expected one of residual, normalised, got 'mean'"),
    "rank": ("lora", {"rank": 0}, "`r` should be a positive integer"),
    "no tokens": ("alora", {}, "invocation: expected the tokens that invoke the adapter, which PEFT trains it by, got"),
    "a bias of DoRA": ("dora", {"lora_bias": True}, "lora_bias: PEFT has none with DoRA"),
}


@pytest.mark.parametrize("case", OPTIONS_THAT_DO_NOT_FIT)
def test_options_that_do_not_fit_are_refused_in_one_line(base: Any, case: str) -> None:
    name, options, message = OPTIONS_THAT_DO_NOT_FIT[case]
    with pytest.raises(FinetuneError, match=message) as raised:
        attached(base, name, options)
    assert str(raised.value).startswith(f"method.{name}: ")
    assert "\n" not in str(raised.value)


def test_a_baseline_that_was_loaded_to_be_used_is_not_saved_empty(base: Any, tmp_path: Path) -> None:
    trained.save(attached(base, "houlsby"), tmp_path)
    with pytest.raises(AdapterError, match="nothing of the module is trainable"):
        trained.save(trained.load(copy.deepcopy(base), tmp_path), tmp_path)


def test_a_setting_may_leave_a_layer_empty(base: Any, tmp_path: Path) -> None:
    batch, module = examples(), attached(base, "fanlora", {"rank": 2, "setting": [[], ["q", "down"]]})
    train(module, batch, steps=3)
    trained.save(module, tmp_path)
    again = trained.load(copy.deepcopy(base), tmp_path)
    assert torch.equal(logits(again, batch), logits(module, batch))
    assert {n.split(".lora_")[0] for n, _ in again.named_parameters() if "lora_" in n} == {
        "base_model.model.model.layers.1.self_attn.q_proj",
        "base_model.model.model.layers.1.mlp.down_proj",
    }


def test_unknown_names_and_options_are_refused_with_the_nearest(base: Any) -> None:
    with pytest.raises(FinetuneError, match="unknown method 'parra'; did you mean 'para'"):
        trained.attach(base, "parra", None, 0)
    with pytest.raises(FinetuneError, match="unknown option 'ranks'; did you mean 'rank'"):
        trained.options_of("para", {"ranks": 3})
    with pytest.raises(FinetuneError, match="adapters"):
        trained.options_of("para", ParaOptions(adapters="folder"))
    with pytest.raises(FinetuneError, match="adapters"):
        trained.options_of("lora", {"adapters": "folder"})

"""Checkpoints that PEFT itself makes: each is served as PEFT serves it on weights of its own, or refused by name."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from perfbench.errors import AdapterError
from perfbench.kernels import grouped_sum, rotation
from perfbench.methods import ia3_original, parameters, vera
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.checkpoints import module_patterns
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.backbone_config import NAMED_CONFIGS, find_config

TINY = BackboneShape.of_config(find_config("llama-tiny"))


def load(method: str, folder: Path) -> AdapterPlan:
    plan: AdapterPlan = parameters.implementation(method).load(folder, TINY, METHODS[method].options())
    return plan


def fresh() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def make(folder: Path, config: Any) -> Path:
    """A checkpoint as after some training, by PEFT."""
    torch.manual_seed(1)
    model = peft.get_peft_model(fresh().model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += (0.5 if "ia3" in name else 0.1) * torch.randn_like(parameter)
    model.save_pretrained(str(folder))
    return folder


def assert_served_as_by_peft(folder: Path, plan: AdapterPlan) -> None:
    ids = torch.arange(3, 12).unsqueeze(0)
    with torch.inference_mode():
        expected = peft.PeftModel.from_pretrained(fresh().model, str(folder)).eval()(ids).logits[:, 5:]
        bare = fresh().model(ids).logits[:, 5:]
    base = fresh()
    bank = Bank(union_layout([plan]), 1, base.dtype, base.device, base.linear)
    bank.admit(plan)
    batch = Batch(ids[:, :6], torch.ones_like(ids[:, :6]), (0,), beams=1, new_tokens=4)
    forced = torch.cat([ids[:, 6:], ids[:, :1]], dim=1)
    found = PlanArm(base, bank, "eager").generate(batch, forced=forced, with_logits=True).logits
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    assert float((bare - expected).norm() / expected.norm()) > 1e-3


def edit_config(folder: Path, drop: str = "", **values: Any) -> None:
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8")) | values
    config.pop(drop, None)
    (folder / CONFIG).write_text(json.dumps(config), encoding="utf-8")


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = edit(load_file(folder / WEIGHTS))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def lora(**values: Any) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]} | values)


SERVED: dict[str, Callable[[], Any]] = {
    "regex": lambda: lora(target_modules=r".*layers\.[01]\.self_attn\.(q|v)_proj"),
    "patterns": lambda: lora(
        rank_pattern={r"layers\.[01]\.self_attn\.q_proj": 8, "down_proj": 2, "^model.layers.2.self_attn.v_proj": 6},
        alpha_pattern={"q_proj": 32, r"model\.layers\.2\.mlp\.down_proj": 3.5},
    ),
    "rslora": lambda: lora(use_rslora=True, rank_pattern={"down_proj": 8}),
    "layers": lambda: lora(layers_to_transform=[0, 2]),
    "one layer": lambda: lora(layers_to_transform=1, layers_pattern="layers"),
    "layers by pattern": lambda: lora(layers_to_transform=[1], layers_pattern=["blocks", "lay.rs"]),
    "excluded": lambda: lora(target_modules="all-linear", exclude_modules=r".*layers\.0\..*", lora_alpha=7.5),
    "excluded by name": lambda: lora(exclude_modules=["layers.1.mlp.down_proj", "v_proj"]),
    "weights": lambda: lora(
        target_modules=["q_proj"], target_parameters=["up_proj.weight"], alpha_pattern={"up_proj.weight": 3}
    ),
    "gaussian": lambda: lora(init_lora_weights="gaussian"),
    "orthogonal": lambda: lora(init_lora_weights="orthogonal"),
    "dora": lambda: lora(use_dora=True),
    "dora of unlike ranks": lambda: lora(use_dora=True, use_rslora=True, rank_pattern={"down_proj": 8}),
    "bias": lambda: lora(lora_bias=True, use_rslora=True, alpha_pattern={"q_proj": 3}),
    "default modules": lambda: lora(target_modules=None),
}


# PEFT knows a parameter by its name when it takes alpha, and does not when it warns.
@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
# Of merging, which is asked of nobody, and of sizes, which for PEFT are those of matrices.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
@pytest.mark.parametrize("kind", SERVED)
def test_it_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path, SERVED[kind]())
    assert_served_as_by_peft(folder, load("lora", folder))


def adalora(folder: Path, kept: Callable[[int, int], bool] | None = None, **values: Any) -> Path:
    """An AdaLoRA checkpoint by PEFT; `kept`: whether the n-th adapted linear has kept rank r, all of them without."""
    torch.manual_seed(1)
    fields: dict[str, Any] = {"init_r": 4, "total_step": 1, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    config = peft.AdaLoraConfig(**fields | values)
    model = peft.get_peft_model(fresh().model, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    places = [n.removeprefix("base_model.model.") for n, _ in model.named_parameters() if "lora_E" in n]
    if kept is not None:
        pattern = {name: [kept(n, rank) for rank in range(config.init_r)] for n, name in enumerate(places)}
        model.peft_config["default"].rank_pattern = pattern
    with warnings.catch_warnings():  # PEFT's, of modules that have no rank left
        warnings.simplefilter("ignore")
        model.save_pretrained(str(folder))
    return folder


ADALORA: dict[str, dict[str, Any]] = {
    "unpruned": {"lora_alpha": 16},
    "uneven": {"kept": lambda n, rank: (n + rank) % 3 != 0, "lora_alpha": 5},
    "modules without a rank": {"kept": lambda n, rank: n % 2 == 0 and rank == 3},
    "default modules": {"target_modules": None},
    "by pattern": {"target_modules": r".*layers\.[01]\.mlp\.(up|down)_proj", "use_rslora": True},
}


@pytest.mark.filterwarnings("ignore:The following rank_pattern keys did not match")
@pytest.mark.parametrize("kind", ADALORA)
def test_adalora_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    folder = adalora(tmp_path, **ADALORA[kind])
    plan = load("lora", folder)
    assert_served_as_by_peft(folder, plan)
    if kind == "modules without a rank":
        ranks = [pair.a.shape[0] for layer in plan for pair in layer.low_rank.values()]
        assert ranks
        assert set(ranks) == {1}


def test_adaloras_and_loras_of_other_ranks_share_a_bank(tmp_path: Path) -> None:
    """Each is served as alone."""
    folders = [adalora(tmp_path / kind, **ADALORA[kind]) for kind in ("uneven", "modules without a rank")]
    folders.append(make(tmp_path / "lora", lora(r=3)))
    plans = [load("lora", folder) for folder in folders]
    base = fresh()
    ids = torch.arange(3, 9).unsqueeze(0)
    together = Bank(union_layout(plans), 3, base.dtype, base.device, base.linear)
    slots = tuple(together.admit(plan) for plan in plans)
    batch = Batch(ids.expand(3, -1), torch.ones(3, 6, dtype=torch.int64), slots, beams=1, new_tokens=4)
    forced = ids[:, :4].expand(3, -1)
    found = PlanArm(base, together, "eager").generate(batch, forced=forced, with_logits=True).logits
    for row, plan in enumerate(plans):
        own = Bank(union_layout([plan]), 1, base.dtype, base.device, base.linear)
        single = Batch(ids, torch.ones(1, 6, dtype=torch.int64), (own.admit(plan),), beams=1, new_tokens=4)
        alone = PlanArm(base, own, "eager").generate(single, forced=forced[:1], with_logits=True).logits
        torch.testing.assert_close(found[row : row + 1], alone, rtol=1e-4, atol=1e-5)


Q = "model.layers.0.self_attn.q_proj"
ADALORA_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a rank too few": (
        lambda folder: edit_config(folder, rank_pattern={f"{Q}.lora_E": [True] * 3 + [False]}),
        f"{Q}.lora_A: expected 3 ranks, which rank_pattern or init_r in {CONFIG} leave it, got size [4, ",
    ),
    "a pattern of another length": (
        lambda folder: edit_config(folder, rank_pattern={f"{Q}.lora_E": [True] * 3}),
        "expected init_r 4 times true or false, got [True, True, True]",
    ),
    "numbers": (lambda folder: edit_config(folder, rank_pattern={f"{Q}.lora_E": [1] * 4}), "got [1, 1, 1, 1]"),
    "another module": (
        lambda folder: edit_config(folder, rank_pattern={"model.norm.lora_E": [True] * 4}),
        "rank_pattern['model.norm.lora_E']: expected a module of",
    ),
    "LoRA's pattern": (lambda folder: edit_config(folder, rank_pattern=[4]), "expected null or an object"),
    "another rank": (lambda folder: edit_config(folder, init_r=5), "expected 5 ranks"),
    "no scale": (lambda folder: edit_config(folder, lora_alpha=0), "lora_alpha: expected more than 0, got 0"),
    "by weight": (lambda folder: edit_config(folder, target_parameters=["q"]), "target_parameters: expected None"),
    "no values": (
        lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if f"{Q}.lora_E" not in n}),
        f"{Q}.lora_E: expected beside its partners",
    ),
    "a flat value": (
        lambda folder: edit_tensors(folder, lambda t: {n: v[:, 0] if "lora_E" in n else v for n, v in t.items()}),
        "lora_E: expected size [4, 1], got [4]",
    ),
    "LoRA's names": (
        lambda folder: edit_tensors(folder, lambda t: {f"{n}.weight": v for n, v in t.items()}),
        "expected lora_A, lora_B or lora_E, got lora_",
    ),
}


@pytest.mark.parametrize("fault", ADALORA_FAULTS)
def test_a_damaged_adalora_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    damage, message = ADALORA_FAULTS[fault]
    folder = adalora(tmp_path)
    damage(folder)
    with pytest.raises(AdapterError) as raised:
        load("lora", folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


ALL = [path.rsplit(".", 1)[1] for path in MODULE_PATHS.values()]
IA3: dict[str, tuple[str, list[str], list[str]]] = {
    "original": ("ia3-original", ["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "papers'": ("ia3", ["q_proj", "k_proj", "up_proj"], []),
    "outputs of all": ("ia3-original", ALL, []),
    "up and the input of down": ("ia3-original", ["up_proj", "down_proj"], ["down_proj"]),
    # As PEFT's own comparison of methods has it.
    "all, and the inputs of the feedforward": ("ia3-original", ALL, ["gate_proj", "up_proj", "down_proj"]),
    "inputs of all": ("ia3-original", ALL, ALL),
}


@pytest.mark.parametrize("kind", IA3)
def test_ia3_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    method, modules, feedforward = IA3[kind]
    folder = make(tmp_path, peft.IA3Config(target_modules=modules, feedforward_modules=feedforward))
    assert_served_as_by_peft(folder, load(method, folder))


B_BIAS = f"base_model.model.{Q}.lora_B.bias"
INVOKED = {"task_type": "CAUSAL_LM", "lora_bias": True, "alora_invocation_tokens": [5, 6]}
LORA_FAULTS: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "a bias that is not said": (
        "alora", lambda folder: edit_config(folder, lora_bias=False), "expected lora_A.weight or lora_B.weight",
    ),
    "a bias that is not there": (
        "alora", lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n != B_BIAS}),
        f"{Q}.lora_B.bias: expected by {CONFIG}, got no such tensor",
    ),
    "a bias of other sizes": (
        "alora", lambda folder: edit_tensors(folder, lambda t: t | {B_BIAS: t[B_BIAS][:3]}), "size [64], got [3]",
    ),
    "a bias and DoRA": ("alora", lambda folder: edit_config(folder, use_dora=True), "lora_bias: expected false, "),
    "the base's bias": (
        "lora", lambda folder: edit_config(folder, bias="lora_only"), "of biases LoRA's lora_bias alone is served",
    ),
    "method lora": ("lora", lambda folder: None, "tokens: expected null, got [5, 6]; method alora serves it"),
    "no tokens": (
        "alora", lambda folder: edit_config(folder, alora_invocation_tokens=None),
        "alora_invocation_tokens: expected the tokens that invoke the adapter, got none; method lora serves it",
    ),
    "tokens that are none": (
        "alora", lambda folder: edit_config(folder, alora_invocation_tokens=[5, 256]),
        "alora_invocation_tokens: expected null or a list of tokens from 0 to 255, got [5, 256]",
    ),
    "an empty list": (
        "alora", lambda folder: edit_config(folder, alora_invocation_tokens=[]), "tokens from 0 to 255, got []",
    ),
}  # fmt: skip


# Of merging, which is asked of nobody, and of sizes, which for PEFT are those of matrices.
@pytest.mark.filterwarnings("ignore:`lora_bias=True` was passed", "ignore:Adapter 'default'")
@pytest.mark.parametrize("fault", LORA_FAULTS)
def test_a_lora_that_is_another_one_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    method, damage, message = LORA_FAULTS[fault]
    folder = make(tmp_path, lora(**INVOKED))
    options = METHODS["alora"].options(adapters=str(folder))
    parameters.implementation("alora").load(folder, TINY, options)
    damage(folder)
    with pytest.raises(AdapterError) as raised:
        parameters.implementation(method).load(folder, TINY, options)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


ROAD: dict[str, dict[str, Any]] = {
    "1": {"variant": "road_1", "group_size": 4, "target_modules": "all-linear"},
    "2": {"variant": "road_2", "group_size": 8, "target_modules": ["q_proj", "v_proj"]},
    "4": {"variant": "road_4", "group_size": 2, "target_modules": ["o_proj", "gate_proj", "down_proj"]},
    "PEFT's own size": {"target_modules": ["q_proj", "o_proj", "down_proj"]},
    "of pairs across heads": {"variant": "road_4", "group_size": 32, "target_modules": ["q_proj", "k_proj"]},
    "random": {"group_size": 4, "init_weights": False},
}


@pytest.mark.parametrize("kind", ROAD)
def test_road_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path, peft.RoadConfig(**ROAD[kind]))
    assert_served_as_by_peft(folder, load("road", folder))


def turned_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    own = rotation.partners
    monkeypatch.setattr(rotation, "partners", lambda y, half: -own(y, half))


def turned_with_the_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    own = rotation.partners
    monkeypatch.setattr(rotation, "partners", lambda y, half: own(y, 1))


@pytest.mark.parametrize(
    ("kind", "plant"),
    [
        ("1", turned_the_other_way),
        ("2", turned_with_the_neighbour),
        ("1", turned_with_the_neighbour),
        ("4", turned_the_other_way),
    ],
)
def test_a_rotation_that_is_another_one_is_seen(
    kind: str, plant: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make(tmp_path, peft.RoadConfig(**ROAD[kind]))
    plan = load("road", folder)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        assert_served_as_by_peft(folder, plan)


Q_THETA = f"base_model.model.{Q}.road_theta"
ROAD_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another variant": (lambda folder: edit_config(folder, variant="road_3"), "expected one of road_1, road_2, road_4"),
    "variants": (lambda folder: edit_config(folder, variant=["road_1"]), "expected one of road_1, road_2, road_4"),
    "a variant of other sizes": (
        lambda folder: edit_config(folder, variant="road_2"), "expected size [64], got [32]",
    ),
    "an odd group": (lambda folder: edit_config(folder, group_size=3), "group_size: expected an even number, got 3"),
    "a group that does not divide": (
        lambda folder: edit_config(folder, group_size=48), "group_size: expected a divisor of the 64 outputs of",
    ),
    "half a pair": (
        lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if n != Q_THETA}),
        f"{Q}.road_theta: expected by {CONFIG}, got no such tensor",
    ),
    "another name": (
        lambda folder: edit_tensors(folder, lambda t: {n.replace("theta", "phi"): v for n, v in t.items()}),
        "expected road_theta or road_alpha, got road_phi",
    ),
    "fewer modules": (lambda folder: edit_config(folder, target_modules=["v_proj"]), f"expected it to name {Q}"),
    "an option of LoRA's": (lambda folder: edit_config(folder, r=8), "r: expected a field that perfbench serves"),
}  # fmt: skip


@pytest.mark.parametrize("fault", ROAD_FAULTS)
def test_a_damaged_road_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    damage, message = ROAD_FAULTS[fault]
    folder = make(tmp_path, peft.RoadConfig(group_size=4, target_modules=["q_proj", "v_proj"]))
    damage(folder)
    with pytest.raises(AdapterError) as raised:
        load("road", folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


MISS: dict[str, dict[str, Any]] = {
    "all": {"r": 8, "target_modules": "all-linear"},
    "ranks that divide no input": {"r": 6, "target_modules": ["q_proj", "o_proj", "down_proj"]},
    "small blocks": {"r": 4, "mini_r": 8, "init_weights": "mini", "target_modules": ["q_proj", "v_proj"]},
    "random": {"r": 3, "init_weights": False, "target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
}


@pytest.mark.parametrize("kind", MISS)
def test_miss_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path, peft.MissConfig(**MISS[kind]))
    assert_served_as_by_peft(folder, load("miss", folder))


def test_groups_the_other_way_round_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours added up in place of every R-th value."""
    folder = make(tmp_path, peft.MissConfig(**MISS["all"]))
    plan = load("miss", folder)

    def transposed(x: torch.Tensor, rank: int, groups: int) -> torch.Tensor:
        return grouped_sum.eager(x.unflatten(1, (rank, -1)).transpose(1, 2).flatten(1), rank, groups)

    monkeypatch.setitem(grouped_sum.FORMS, "eager", lambda x, rank, groups: (
        grouped_sum.eager(x, rank, groups) if x.shape[1] % rank else transposed(x, rank, groups)
    ))  # fmt: skip
    with pytest.raises(AssertionError):
        assert_served_as_by_peft(folder, plan)


MISS_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "made of the weights": (lambda folder: edit_config(folder, init_weights="bat"), "expected true, false or 'mini'"),
    "initial values of another kind": (lambda folder: edit_config(folder, init_weights=[]), "or 'mini', got []"),
    "another rank": (lambda folder: edit_config(folder, r=5), "miss_block: expected size [5, 64], got [4, 64]"),
    "more ranks than inputs": (lambda folder: edit_config(folder, r=65), "r: expected what model.layers.0"),
    "small blocks that are none": (
        lambda folder: edit_config(folder, init_weights="mini", mini_r=16), "expected size [4, 16], got [4, 64]",
    ),
    "small blocks that do not fit": (
        lambda folder: edit_config(folder, init_weights="mini", mini_r=48), "mini_r: expected what model.layers.0",
    ),
    "biases": (lambda folder: edit_config(folder, bias="all"), "bias: expected 'none', got 'all'"),
    "a module too few": (
        lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if Q not in n}),
        f"{Q}.miss_block: expected by {CONFIG}",
    ),
    "another name": (
        lambda folder: edit_tensors(folder, lambda t: {n.replace("miss_", "bone_"): v for n, v in t.items()}),
        "expected miss_block, got bone_block",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", MISS_FAULTS)
def test_a_damaged_miss_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    damage, message = MISS_FAULTS[fault]
    folder = make(tmp_path, peft.MissConfig(r=4, target_modules=["q_proj", "v_proj"]))
    damage(folder)
    with pytest.raises(AdapterError) as raised:
        load("miss", folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


VERA: dict[str, dict[str, Any]] = {
    "all": {"r": 16, "target_modules": "all-linear"},
    "another key": {"r": 7, "projection_prng_key": 5, "target_modules": ["q_proj", "down_proj"]},
    "some layers": {"target_modules": ["up_proj"], "layers_to_transform": [0, 2]},
    "without its matrices": {"r": 8, "save_projection": False, "projection_prng_key": 2, "target_modules": ["v_proj"]},
}


@pytest.mark.filterwarnings("ignore:Specified to not")
@pytest.mark.parametrize("kind", VERA)
def test_vera_is_served_as_by_peft(kind: str, tmp_path: Path) -> None:
    folder = make(tmp_path, peft.VeraConfig(**VERA[kind]))
    assert_served_as_by_peft(folder, load("vera", folder))


def test_vera_s_matrices_are_those_that_peft_draws(tmp_path: Path) -> None:
    folder = make(tmp_path, peft.VeraConfig(**VERA["another key"]))
    tensors = load_file(folder / WEIGHTS)
    drawn = vera.shared(TINY, METHODS["vera"].options(rank=7, modules=("q", "down"), key=5))
    assert torch.equal(drawn[0], tensors["base_model.vera_A"])
    assert torch.equal(drawn[1], tensors["base_model.vera_B"])


def test_matrices_of_another_key_are_seen(tmp_path: Path) -> None:
    folder = make(tmp_path, peft.VeraConfig(**VERA["another key"]))
    own = load_file(folder / WEIGHTS)
    edit_tensors(folder, lambda t: t | dict(zip(
        ("base_model.vera_A", "base_model.vera_B"),
        vera.shared(TINY, METHODS["vera"].options(rank=7, modules=("q", "down"), key=6)), strict=True,
    )))  # fmt: skip
    plan = load("vera", folder)
    edit_tensors(folder, lambda _: own)
    with pytest.raises(AssertionError):
        assert_served_as_by_peft(folder, plan)


def test_tenants_of_unlike_matrices_can_not_share_a_bank(tmp_path: Path) -> None:
    plans = [
        load(
            "vera", make(tmp_path / str(key), peft.VeraConfig(r=4, projection_prng_key=key, target_modules=["q_proj"]))
        )
        for key in (0, 1)
    ]
    bank = Bank(union_layout(plans), 2, torch.float32, "cpu")
    bank.admit(plans[0])
    before = [tensor.clone() for tensor in bank.tensors()]
    with pytest.raises(AdapterError, match="the shared matrices that the bank's other adapters have, got another a"):
        bank.admit(plans[1])
    assert bank.free == [1]
    assert all(map(torch.equal, before, bank.tensors()))
    bank.evict(0)
    bank.admit(plans[1])
    other = load("vera", make(tmp_path / "r", peft.VeraConfig(r=8, target_modules=["q_proj"])))
    with pytest.raises(AdapterError, match="must share one pair of matrices, got ranks 4, 8"):
        union_layout([plans[0], other])
    with pytest.raises(AdapterError, match="layer 0: the bank shares a pair of rank 4 on q, not 8"):
        bank.admit(other)


VERA_FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "another rank": (lambda folder: edit_config(folder, r=5), "vera_lambda_d: expected size [5], got [4]"),
    "no matrices": (
        lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if not n.endswith("vera_A")}),
        "base_model.vera_A: expected by save_projection",
    ),
    "a matrix that is too small": (
        lambda folder: edit_tensors(folder, lambda t: {n: v[:, :9] if n.endswith("_A") else v for n, v in t.items()}),
        "base_model.vera_A: expected at least size [4, 64], got [4, 9]",
    ),
    "half of the vectors": (
        lambda folder: edit_tensors(folder, lambda t: {n: v for n, v in t.items() if f"{Q}.vera_lambda_b" not in n}),
        f"{Q}.vera_lambda_b: expected by {CONFIG}",
    ),
    "no key": (lambda folder: edit_config(folder, projection_prng_key="a"), "0 to 2^63 - 1, got 'a'"),
    "a key too large": (lambda folder: edit_config(folder, projection_prng_key=2**63), "expected an integer from 0 to"),
    "perhaps saved": (lambda folder: edit_config(folder, save_projection="yes"), "expected true or false, got 'yes'"),
    "biases": (lambda folder: edit_config(folder, bias="vera_only"), "bias: expected 'none', got 'vera_only'"),
    "another name": (
        lambda folder: edit_tensors(folder, lambda t: {n.replace("lambda_d", "lambda_c"): v for n, v in t.items()}),
        "expected vera_lambda_d or vera_lambda_b, got vera_lambda_c",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", VERA_FAULTS)
def test_a_damaged_vera_is_refused_by_name(fault: str, tmp_path: Path) -> None:
    damage, message = VERA_FAULTS[fault]
    folder = make(tmp_path, peft.VeraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    damage(folder)
    with pytest.raises(AdapterError) as raised:
        load("vera", folder)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_groups_of_unlike_sizes_can_not_share_a_bank(tmp_path: Path) -> None:
    plans = [
        load("road", make(tmp_path / str(size), peft.RoadConfig(group_size=size, target_modules=["q_proj"])))
        for size in (4, 8)
    ]
    with pytest.raises(AdapterError, match="must share the size of the groups that they rotate, got 4, 8"):
        union_layout(plans)
    bank = Bank(union_layout(plans[:1]), 1, torch.float32, "cpu")
    with pytest.raises(AdapterError, match="layer 0: the bank rotates q in groups of 4, not 8"):
        bank.admit(plans[1])
    assert bank.free == [0]


def test_a_scale_on_o_s_input_is_one_on_v_where_every_head_has_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = NAMED_CONFIGS["llama-tiny"] | {"num_key_value_heads": 4}
    monkeypatch.setitem(NAMED_CONFIGS, "llama-tiny", config)
    folder = make(tmp_path, peft.IA3Config(target_modules=["v_proj", "o_proj"], feedforward_modules=["o_proj"]))
    plan = ia3_original.load(folder, BackboneShape.of_config(config), METHODS["ia3-original"].options())
    assert all(set(layer.scale_minus_one) == {"v"} and not layer.input_scale_minus_one for layer in plan)
    assert_served_as_by_peft(folder, plan)


@pytest.mark.parametrize(
    ("method", "modules", "feedforward", "now", "expected"),
    [
        ("ia3", ["q_proj", "up_proj"], ["up_proj"], ["up_proj"], "not to name model.layers.0.mlp.up_proj"),
        ("ia3-original", ["v_proj", "down_proj"], ["down_proj"], [], "to name model.layers.0.mlp.down_proj"),
        ("ia3-original", ["v_proj", "o_proj"], [], ["o_proj"], "not to name model.layers.0.self_attn.o_proj"),
    ],
)
def test_ia3_on_the_other_side_is_refused_for_that(
    method: str, modules: list[str], feedforward: list[str], now: list[str], expected: str, tmp_path: Path
) -> None:
    """Of the file, or of what the method serves."""
    make(tmp_path, peft.IA3Config(target_modules=modules, feedforward_modules=feedforward))
    edit_config(tmp_path, feedforward_modules=now)
    with pytest.raises(AdapterError, match=f"feedforward_modules: expected it {expected}") as raised:
        load(method, tmp_path)
    assert "another backbone" not in str(raised.value)


@pytest.mark.parametrize("kind", ["pissa", "pissa_niter_4", "olora"])
def test_an_initialisation_that_changed_the_backbone_is_refused(kind: str, tmp_path: Path) -> None:
    make(tmp_path, lora(init_lora_weights=kind))
    with pytest.raises(AdapterError, match=rf"init_lora_weights: expected true, .*, got '{kind}'") as raised:
        load("lora", tmp_path)
    assert str(tmp_path / CONFIG) in str(raised.value)


@pytest.mark.parametrize("kind", ["loftq", "corda", "lora_ga", "PISSA", "Magic", 3, ["pissa"]])
def test_so_is_one_that_is_not_known_to_leave_it(kind: Any, tmp_path: Path) -> None:
    make(tmp_path, lora())
    edit_config(tmp_path, init_lora_weights=kind)
    with pytest.raises(AdapterError, match="init_lora_weights: expected true"):
        load("lora", tmp_path)


@pytest.mark.filterwarnings("ignore:PiSSA changes the base weights")
def test_a_pissa_that_peft_made_plain_is_served(tmp_path: Path) -> None:
    model = peft.get_peft_model(fresh().model, lora(init_lora_weights="pissa"))
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(str(tmp_path / "start"))
    model.peft_config["default"].init_lora_weights = "pissa"
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(str(tmp_path), path_initial_model_for_weight_conversion=str(tmp_path / "start"))
    assert_served_as_by_peft(tmp_path, load("lora", tmp_path))


def test_without_alpha_it_is_peft_s_default(tmp_path: Path) -> None:
    make(tmp_path, lora())
    edit_config(tmp_path, drop="lora_alpha")
    assert_served_as_by_peft(tmp_path, load("lora", tmp_path))


def without_layer(number: int) -> Callable[[Path], None]:
    return lambda f: edit_tensors(f, lambda t: {k: v for k, v in t.items() if f".layers.{number}." not in k})


def with_all(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    return lambda f: edit_tensors(f, lambda t: {name: change(tensor) for name, tensor in t.items()})


def with_one(change: Callable[[torch.Tensor], torch.Tensor], name: str = "lora_A") -> Callable[[Path], None]:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        one = min(n for n in tensors if name in n)
        return tensors | {one: change(tensors[one])}

    return lambda folder: edit_tensors(folder, edit)


def with_config(**values: Any) -> Callable[[Path], None]:
    return lambda folder: edit_config(folder, **values)


NOT_WHOLE, DAMAGED, OTHER = "the file is not whole", "so the file is damaged", "made for another backbone"
FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "alpha null": (with_config(lora_alpha=None), "lora_alpha: expected a finite number, got None"),
    "alpha text": (with_config(lora_alpha="16"), "lora_alpha: expected a finite number, got '16'"),
    "alpha nan": (with_config(lora_alpha=float("nan")), "lora_alpha: expected a finite number, got nan"),
    "alpha huge": (with_config(lora_alpha=10**400), "lora_alpha: expected a finite number, got 1000"),
    "alpha beyond fp32": (with_config(lora_alpha=1e300), "lora_alpha: expected a finite adapter"),
    "rank lies": (with_config(r=8), "r: expected 4, the rank of model.layers.0.mlp.down_proj in adapter_model"),
    "rank text": (with_config(r="4"), "r: expected an integer >= 1, got '4'"),
    "rslora text": (with_config(use_rslora="false"), "use_rslora: expected true or false, got 'false'"),
    "rank pattern lies": (with_config(rank_pattern={"q_proj": 2}), r"rank_pattern\['q_proj'\]: expected 4"),
    "rank pattern text": (with_config(rank_pattern={"q_proj": "4"}), r"rank_pattern\['q_proj'\]: expected an integer"),
    "alpha pattern null": (with_config(alpha_pattern=None), "alpha_pattern: expected an object"),
    "alpha pattern text": (with_config(alpha_pattern={"q_proj": "x"}), r"alpha_pattern\['q_proj'\]: expected a finite"),
    "no pattern": (with_config(alpha_pattern={"layers.(0.q_proj": 4}), "alpha_pattern: expected a regular expression"),
    "no target pattern": (with_config(target_modules="*"), "target_modules: expected a regular expression, got '*'"),
    "targets number": (with_config(target_modules=7), "target_modules: expected a list of names, got 7"),
    "targets less": (with_config(target_modules=["q_proj"]), "target_modules: expected it to name model.layers.0.mlp"),
    "targets more": (with_config(target_modules=["q_proj", "v_proj", "down_proj", "o_proj"]), NOT_WHOLE),
    "targets the head": (with_config(target_modules=["lm_head", "q_proj", "v_proj"]), "also means lm_head"),
    "targets all": (with_config(target_modules=".*"), "target_modules: expected only modules like"),
    "layers, pattern": (with_config(target_modules=".*q_proj", layers_to_transform=[0]), "expected null beside"),
    "layers text": (with_config(layers_to_transform=["0"]), "layers_to_transform: expected null or numbers"),
    "layers pattern alone": (with_config(layers_pattern="layers"), "layers_to_transform: expected numbers of layers"),
    "another parameter": (with_config(target_parameters=["norm.weight"]), "target_parameters: expected only"),
    "empty": (lambda f: edit_tensors(f, lambda t: {}), NOT_WHOLE),
    "a layer less": (without_layer(1), NOT_WHOLE),
    "the last layer less": (without_layer(2), f"the first 2 layers only: it is not whole, or was {OTHER}"),
    "complex": (with_all(lambda t: t.to(torch.complex64)), "expected one of fp64, fp32, bf16, fp16, got complex64"),
    "float8": (with_all(lambda t: t.to(torch.float8_e4m3fn)), "got float8_e4m3fn"),
    "integers": (with_all(lambda t: t.to(torch.int8)), "got int8"),
    "beyond fp32": (with_one(lambda t: t.double() * 1e300), "expected finite values"),
    "rank 0": (with_all(lambda t: t[:0] if t.shape[0] == 4 else t[:, :0]), "expected a rank of at least 1"),
    "one dimension": (with_one(lambda t: t[0]), r"expected two dimensions, got size \[172\]"),
    "one damaged": (with_one(lambda t: t[:, :-1]), DAMAGED),
    "one transposed": (with_one(lambda t: t.t()), "it is transposed"),
    "halves apart": (with_one(lambda t: t[:3]), "lora_B.weight: expected size .64, 3., .* got .64, 4.; the"),
    "all narrower": (with_all(lambda t: t[:, :-1] if t.shape[0] == 4 else t[:-1]), OTHER),
    "deeply nested": (lambda f: (f / CONFIG).write_text("[" * 100_000) and None, "not readable as JSON"),
    "a number without end": (lambda f: (f / CONFIG).write_text("9" * 5000) and None, "not readable as JSON"),
}  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("good"), lora())


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_refused_for_what_it_is(fault: str, good: Path, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    plant(tmp_path)
    with pytest.raises(AdapterError, match=message) as raised:
        load("lora", tmp_path)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert (OTHER in str(raised.value)) == (OTHER in message)


def test_a_pattern_without_end_is_refused(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "LIMIT_S", 1.5)
    for name in (CONFIG, WEIGHTS):
        (tmp_path / name).write_bytes((good / name).read_bytes())
    edit_config(tmp_path, rank_pattern={r"(\w*[\w.]*)*(\w*[\w.]*)*-": 3})
    with pytest.raises(AdapterError, match=r"rank_pattern: expected a pattern that is matched within 1\.5 s"):
        load("lora", tmp_path)

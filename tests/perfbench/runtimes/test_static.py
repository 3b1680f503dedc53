"""Runtime static against runtime transformers: every family, every method, real weights; and its own promises."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.errors import BackboneError
from perfbench.kernels import qkv_epilogue, row_scale
from perfbench.measure.on_device import prompts
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.miss import MissOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULES
from perfbench.methods.vera import VeraOptions
from perfbench.runtimes import backbone, packed_linear
from perfbench.runtimes.generation import PAD, Batch, end
from perfbench.runtimes.static.adapters import Adapters, rooms
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.cache import CacheSize, KVCache
from perfbench.runtimes.static.decoder import Decoder
from perfbench.runtimes.static.weights import fuse
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec import backbone_config
from perfbench.verify.on_device.runtimes import make_bank

TINY = backbone_config.NAMED_CONFIGS["llama-tiny"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": TINY,
    "llama-biases": TINY | {"attention_bias": True, "mlp_bias": True},
    "llama3-rope": TINY
    | {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": TINY | {"model_type": "mistral", "sliding_window": None},
    "qwen2": TINY | {"model_type": "qwen2", "use_sliding_window": False},
    "gemma": TINY
    | {
        "model_type": "gemma",
        "hidden_act": "gelu_pytorch_tanh",
        "head_dim": 32,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
    },
}
METHOD_NAMES = [name for name, method in METHODS.items() if method.served_by == "plan"]
RESIDENT = 4
# Every operation of a plan, by a method and the options with which it is made of it.
OPERATIONS: dict[str, tuple[str, Any]] = {
    "none": ("none", None),
    "lora": ("lora", None),
    "fanlora": ("fanlora", None),
    "lora-bias": ("lora", LoraOptions(lora_bias=True, modules=("q", "v", "up"))),
    "para": ("para", None),
    "ia3-outputs": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=())),
    "ia3-inputs": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=("gate", "up", "o", "down"))),
    "road": ("road", None),
    "vera": ("vera", VeraOptions(rank=16)),
    "vera-of-some": ("vera", VeraOptions(rank=33, modules=("q", "v", "up", "down"))),
    "miss": ("miss", None),
    "miss-odd": ("miss", MissOptions(rank=5, modules=("q", "v", "up"))),
    "road-across-heads": ("road", RoadOptions(variant="road_4", group_size=32, modules=("q", "v", "o"))),
}


def load(config: dict[str, Any], dtype: str, monkeypatch: pytest.MonkeyPatch) -> backbone.Backbone:
    """A backbone of this config in which no weight has the value that hides a fault: no bias 0, no norm 1."""
    monkeypatch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", config)
    base = backbone.load("of-a-test", dtype, "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data + noise.to(parameter.dtype)
    return base


def make_batch(beams: int, *, ragged: bool = True) -> Batch:
    ids = torch.randint(3, 256, (5, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, :8] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3, 0), beams, new_tokens=8)


def difference(base: backbone.Backbone, bank: Bank | None, batch: Batch) -> tuple[bool, float]:
    """(whether both runtimes choose the same tokens, largest relative difference of their logits on them)."""
    plain, static = PlanArm(base, bank, "eager"), StaticArm(base, bank, "eager")
    tokens = plain.generate(batch).tokens
    same = torch.equal(static.generate(batch).tokens, tokens)
    expected, found = (arm.generate(batch, forced=tokens, with_logits=True).logits for arm in (plain, static))
    return same, float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "even"])
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_transformers_does(
    family: str, beams: int, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(FAMILIES[family], "fp32", monkeypatch)
    for method in ("none", "lora", "para"):
        same, worst = difference(base, make_bank(base, method), make_batch(beams, ragged=ragged))
        assert same, method
        assert worst < 1e-5, method


@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_sixteen_bits_differ_by_their_rounding_only(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES[family], "bf16", monkeypatch)
    for method in ("none", "ia3-original"):
        assert difference(base, make_bank(base, method), make_batch(1))[1] < 3e-2, method


@pytest.mark.interpreter
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("case", OPERATIONS)
def test_triton_s_kernels_generate_what_plain_torch_does(
    case: str, beams: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the interpreter where there is no GPU, so a layer, few tokens and few requests."""
    pytest.importorskip("triton", reason="triton is not there for this platform")
    base = load(TINY | {"num_hidden_layers": 1}, "fp32", monkeypatch)
    ids = torch.randint(3, 256, (2, 3), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1, 1, 1], [0, 1, 1]])
    batch, bank = Batch(ids * mask, mask, (2, -1), beams, new_tokens=3), make_bank(base, *OPERATIONS[case])
    eager, triton = StaticArm(base, bank, "eager"), StaticArm(base, bank, "triton")
    tokens = eager.generate(batch).tokens
    assert torch.equal(triton.generate(batch).tokens, tokens)
    expected, found = (arm.generate(batch, forced=tokens, with_logits=True).logits for arm in (eager, triton))
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


@pytest.mark.parametrize("captured", [False, True], ids=["growing", "captured"])
@pytest.mark.parametrize("kernels", ["eager", pytest.param("triton", marks=pytest.mark.interpreter)])
def test_tenants_of_unlike_methods_share_a_bank(kernels: str, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """(IA)3 scales some of what PARA scales too: each gets its own alone, beside pairs and the bare backbone."""
    pytest.importorskip("triton", reason="triton is not there for this platform")
    base = load(TINY | {"num_hidden_layers": 1}, "fp32", monkeypatch)
    # VeRA's own 256 ranks take the interpreter long.
    chosen: dict[str, dict[str, Any]] = {"lora": {"lora_bias": True}, "vera": {"rank": 16}}
    plans = []
    for method in ("para", "ia3", "lora", "road", "miss", "vera"):
        options = METHODS[method].options(**chosen.get(method, {}))
        values = parameters.make(method, base.shape, options, seed=1)
        plans.append(parameters.implementation(method).plan(values, base.shape, options))
    bank = Bank(union_layout(plans), len(plans), base.dtype, base.device, base.linear)
    slots = [bank.admit(plan) for plan in plans]
    ids = torch.randint(3, 256, (len(plans) + 2, 3), generator=torch.Generator().manual_seed(4))
    batch = Batch(ids, torch.ones_like(ids), (*slots, -1, slots[1]), 1, new_tokens=2)
    arm = StaticArm(base, bank, kernels, capture=(lambda step: step) if captured else None)
    found = arm.generate(batch, forced=ids[:, :2], with_logits=True).logits
    for request, slot in enumerate(batch.slots):
        own = None if slot == -1 else Bank(union_layout([plans[slot]]), 1, base.dtype, base.device, base.linear)
        if own is not None:
            own.admit(plans[slot])
        alone = replace(batch.alone(request), slots=(-1 if own is None else 0,))
        expected = PlanArm(base, own, "eager").generate(alone, forced=ids[request : request + 1, :2], with_logits=True)
        assert float((found[request] - expected.logits[0]).norm() / expected.logits.norm()) < 1e-5, request


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", METHOD_NAMES)
def test_a_real_checkpoint_answers_real_prompts_alike(
    method: str, beams: int, stories260k: Path, test_data: Path
) -> None:
    base = backbone.load(str(stories260k), "fp32", "cpu", seed=0)
    texts = prompts.read_prompts(test_data / "mt_bench" / "question.jsonl")
    ids, mask = prompts.tokenise(texts, base.tokenizer(), 6, 100)
    assert not mask.all(), "the prompts should be ragged"
    same, worst = difference(base, make_bank(base, method), Batch(ids, mask, (2, 0, -1, 3, 0, 1), beams, 16))
    assert same
    assert worst < 1e-4


@pytest.mark.parametrize("ends", [1, 2])
@pytest.mark.parametrize("beams", [1, 2, 3])
@pytest.mark.parametrize("family", ["llama", "gemma"])
def test_requests_end_where_transformers_ends_them(
    family: str, beams: int, ends: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With tokens that the requests really come to; those of a request in the middle of its way, and of the last."""
    base = load(FAMILIES[family], "fp32", monkeypatch)
    bank, batch = make_bank(base, "lora"), replace(make_batch(beams), new_tokens=12)
    plain, static = PlanArm(base, bank, "eager"), StaticArm(base, bank, "eager")
    free = plain.generate(batch).tokens
    ended = 0
    for request in range(len(free)):
        eos = (int(free[request, 3]), int(free[-1, 8]))[:ends]
        with_end = replace(batch, eos=eos)
        expected, found = plain.generate(with_end).tokens, static.generate(with_end).tokens
        assert torch.equal(found, expected), (request, eos)
        ended += int((expected[:, -1] == PAD).sum())
    assert ended


def test_a_scale_after_rope_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    own = qkv_epilogue.eager

    def late(qkv: Any, h: Any, b: Any, scale: Any, *rest: Any) -> torch.Tensor:
        q = own(qkv, h, b, None, *rest)
        if scale is not None:
            row_scale.scale_columns(qkv, scale)
        return q

    monkeypatch.setitem(qkv_epilogue.FORMS, "eager", late)
    assert difference(base, make_bank(base, "ia3"), make_batch(1))[1] > 1e-3


def test_the_neighbour_s_scale_on_an_input_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    bank, batch = make_bank(base, *OPERATIONS["ia3-inputs"]), make_batch(1)
    assert difference(base, bank, batch)[1] < 1e-5
    own = row_scale.scaled_rows
    monkeypatch.setitem(row_scale.SCALED_ROWS, "eager", lambda x, minus_one, _: own(x, minus_one.roll(1, 0)))
    assert difference(base, bank, batch)[1] > 1e-3


def test_beams_that_follow_the_wrong_row_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    assert difference(base, None, make_batch(3))[0]
    monkeypatch.setattr(Decoder, "follow", lambda self, sources: None)
    assert not difference(base, None, make_batch(3))[0]


def test_what_follows_the_end_is_padding() -> None:
    tokens = torch.tensor([[5, 7, 5, 9], [1, 2, 3, 4], [9, 9, 9, 9], [1, 2, 3, 7]])
    assert end(tokens, (7, 9)).tolist() == [[5, 7, 0, 0], [1, 2, 3, 4], [9, 0, 0, 0], [1, 2, 3, 7]]


def test_weights_are_held_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_linear, "onednn_has", lambda tensor: False)  # as on a GPU, weights stay as they are
    base = load(FAMILIES["qwen2"], "fp32", monkeypatch)
    ids = make_batch(1, ragged=False).input_ids
    with torch.inference_mode():
        before = base.model(ids).logits
    held = base.bytes
    weights = fuse(base)
    assert fuse(base) is weights
    assert base.bytes == held
    attention, qkv = base.model.model.layers[0].self_attn, weights.layers[0].projections["qkv"]
    assert attention.q_proj.weight.data_ptr() == qkv.weight.data_ptr()
    assert torch.equal(qkv.weight[: attention.q_proj.out_features], attention.q_proj.weight)
    assert torch.equal(qkv.weight[-attention.v_proj.out_features :], attention.v_proj.weight)
    with torch.inference_mode():
        assert torch.equal(base.model(ids).logits, before)


def test_tails_grow_and_go_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """An arm that makes the weights move leaves another arm's results as they were, and gives its room back."""
    monkeypatch.setattr(packed_linear, "onednn_has", lambda tensor: False)  # as on a GPU, weights stay as they are
    base = load(FAMILIES["qwen2"], "fp32", monkeypatch)
    batch = make_batch(1)
    bare, small = StaticArm(base, None, "eager"), StaticArm(base, make_bank(base, "lora"), "eager")
    projection = bare.weights.layers[0].projections["qkv"]
    assert len(projection.tail) == 0
    expected = [bare.generate(batch).tokens, small.generate(batch.alone(0)).tokens]
    room = len(projection.tail)
    held = base.bytes
    large = StaticArm(base, make_bank(base, "lora"), "eager")
    large.generate(batch)
    assert len(projection.tail) > room > 0
    assert base.bytes == held, "a tail counts with the arm that holds it"
    assert torch.equal(bare.generate(batch).tokens, expected[0])
    assert torch.equal(small.generate(batch.alone(0)).tokens, expected[1])
    large.close()
    assert len(projection.tail) == room
    small.close()
    assert len(projection.tail) == 0
    assert torch.equal(bare.generate(batch).tokens, expected[0])


@pytest.mark.parametrize("method", ["lora", "fanlora"])
def test_rows_of_the_fused_product_stay_aligned(method: str) -> None:
    """As many values of any type as Triton wants a row to be divisible by, for its wide loads: 16."""
    base = backbone.load("llama-256x8", "fp32", "cpu", seed=0)
    bank = make_bank(base, method)
    assert bank is not None
    for adapters in (1, 3, 4):
        fused = fuse(base)
        fused.hold(bank, rooms(bank, adapters))
        taken = Adapters(bank, fused, adapters, adapters, "eager")
        ends = [
            (bound.weight, bound.a, fused.layers[i].projections[name].columns)
            for i, layer in enumerate(taken.layers)
            for name, bound in layer.projections.items()
        ]
        with_tail = [(len(weight), a.numel() // weight.shape[1], n) for weight, a, n in ends if weight is not None]
        assert with_tail
        assert all(rows % 16 == 0 and 0 <= rows - columns - ranks < 16 for rows, ranks, columns in with_tail)


def cache_bytes(base: backbone.Backbone, beams: int) -> int:
    cache = KVCache(CacheSize(1, beams, 274, 32), base.shape, base.dtype, base.device)
    return sum(t.nbytes for t in cache.tensors())


def test_beams_share_the_prompt_s_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    shape = base.shape
    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 4
    # The last token is chosen and never read; the table of ancestors takes 8 bytes a row and step.
    assert cache_bytes(base, 1) == (274 + 31) * token + 31 * 8
    assert cache_bytes(base, 3) == (274 + 3 * 31) * token + 3 * 31 * 8


def test_the_cache_stays_from_call_to_call_and_gives_way_to_another_size(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    arm, batch = StaticArm(base, make_bank(base, "para"), "eager"), make_batch(1)
    first = arm.generate(batch).tokens
    assert arm.decoder is not None
    cache = arm.decoder.cache
    other = arm.generate(replace(batch, slots=(0, 1, 2, 3, -1))).tokens
    assert arm.decoder.cache is cache
    assert not torch.equal(first, other)
    arm.generate(batch.alone(0))
    assert arm.decoder.cache is not cache
    assert torch.equal(arm.generate(batch).tokens, first)


def test_nothing_of_the_last_batch_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache full of NaN, as uninitialised memory may be, changes nothing."""
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    for beams in (1, 3):
        arm, batch = StaticArm(base, make_bank(base, "lora"), "eager"), make_batch(beams)
        tokens = arm.generate(batch).tokens
        assert arm.decoder is not None
        with torch.inference_mode():
            for tensor in (*arm.decoder.cache.prompt, *arm.decoder.cache.generated):
                tensor.fill_(float("nan"))
        assert torch.equal(arm.generate(batch).tokens, tokens)


def test_what_it_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(TINY | {"hidden_act": "relu"}, "fp32", monkeypatch)
    with pytest.raises(BackboneError, match=r"of-a-test: hidden_act relu: .*choose runtime transformers"):
        StaticArm(base, None, "eager")


def with_follow_up(batch: Batch) -> Batch:
    ids = torch.randint(3, 256, (len(batch.slots), 4), generator=torch.Generator().manual_seed(6))
    return replace(batch, follow_up=ids)


@pytest.mark.parametrize("capture", [None, lambda step: step], ids=["growing", "fixed"])
@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "even"])
@pytest.mark.parametrize("method", ["none", "lora", "ia3", "para"])
def test_a_second_turn_says_what_reading_everything_again_would(
    method: str, ragged: bool, capture: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    bank, batch = make_bank(base, method), with_follow_up(make_batch(1, ragged=ragged))
    plain, static = PlanArm(base, bank, "eager"), StaticArm(base, bank, "eager", capture)
    for _ in range(2):
        first = static.generate(batch).tokens
        expected = plain.generate(batch.conversation(first)).tokens
        assert torch.equal(static.follow_up(first).tokens, expected)
    again = static.follow_up(first, forced=expected, with_logits=True).logits
    other = plain.generate(batch.conversation(first), forced=expected, with_logits=True).logits
    assert again is not None
    assert float(((again - other).norm(dim=-1) / other.norm(dim=-1)).max()) < 1e-5


def test_only_generated_scales_make_the_second_turn_read_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what the layers are given: one token and the follow-up after 9 + 7 in the cache, or all 21."""
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    read: list[tuple[int, int]] = []
    own = Decoder._read

    def noted(self: Decoder, ids: torch.Tensor, past: int, *rest: Any) -> torch.Tensor:
        read.append((past, ids.shape[1]))
        return own(self, ids, past, *rest)

    monkeypatch.setattr(Decoder, "_read", noted)
    for method, second in (("lora", (16, 5)), ("ia3", (16, 5)), ("fanlora", (16, 5)), ("para", (0, 21))):
        arm, batch = StaticArm(base, make_bank(base, method), "eager"), with_follow_up(make_batch(1))
        read.clear()
        arm.follow_up(arm.generate(batch).tokens)
        assert read == [(0, 9), second], method


def test_generated_scales_on_the_first_turn_s_cache_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that re-using the cache under PARA would be."""
    base = load(FAMILIES["llama"], "fp32", monkeypatch)
    arm, batch = StaticArm(base, make_bank(base, "para"), "eager"), with_follow_up(make_batch(1))
    first = arm.generate(batch).tokens
    expected = arm.follow_up(first, with_logits=True).logits
    assert expected is not None
    arm.generate(batch)
    assert arm.decoder is not None
    arm.decoder.layers = [replace(layer, generator=None) for layer in arm.decoder.layers]
    found = arm.follow_up(first, with_logits=True).logits
    assert found is not None
    differences = ((found - expected).norm(dim=-1) / expected.norm(dim=-1))[:, 0]
    assert float(differences[[0, 1, 3, 4]].min()) > 1e-3
    assert float(differences[2]) < 1e-5, "this request has no adapter"

"""Backbones of 8-bit weights: how they are rounded, what their product gives, what is held, and what a fault looks like
to the proof."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch

from perfbench.errors import BackboneError
from perfbench.figures.roof import decode_step
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan, row_lengths
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import MODULES
from perfbench.proof import check, oracle
from perfbench.runtimes import backbone, int8_linear
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.arm import ContinuousArm
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.int8_linear import Int8Linear, Int8Weight, quantised
from perfbench.runtimes.packed_linear import held_bytes
from perfbench.runtimes.shared_weights import exact_sums
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.weights import fuse
from perfbench.runtimes.transformers_plan import AdaptedLinear, PlanArm
from perfbench.spec.backbone_config import NAMED_CONFIGS

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan")
RUNTIMES = {"transformers": PlanArm, "static": StaticArm, "continuous": ContinuousArm}
RESIDENT = 4
DTYPES = ("fp32", "bf16")

exact = pytest.mark.skipif(not int8_linear._EXACT, reason="needs VNNI")


def load(dtype: str = "fp32") -> Backbone:
    return backbone.load("llama-tiny", dtype, "cpu", 0, "int8")


@pytest.fixture(scope="module")
def backbones() -> dict[str, Backbone]:
    return {dtype: load(dtype) for dtype in DTYPES}


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


# The weights.


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_weight_is_further_than_half_a_step_from_its_own(dtype: str) -> None:
    weight = random(65, 172).to(backbone.DTYPES[dtype])
    weight[3] = 0
    q, scale = quantised(weight)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    off = (weight.double() - q.double() * scale.double()[:, None]).abs()
    assert (off <= scale.double()[:, None] * (0.5 + 2**-16)).all()  # of q, up to 127.5, fp32 rounds 2^-17
    assert (off[3] == 0).all()
    # A scale of its own for each output: with the next one's, most are further off.
    off = (weight.double() - q.double() * scale.roll(1).double()[:, None]).abs()
    assert not (off <= scale.double()[:, None]).all()


def test_scales_are_torchao_s() -> None:
    """As Int8WeightOnlyConfig of torchao 0.18 has them: 255 steps, so that the largest is -128 or is cut to 127."""
    q, scale = quantised(torch.tensor([[-2.55, 1.0, 0.0], [2.55, -1.0, 0.01]]))
    assert torch.allclose(scale, torch.tensor([0.02, 0.02]))
    assert q.tolist() == [[-128, 50, 0], [127, -50, 0]] or q.tolist() == [[-127, 50, 0], [127, -50, 0]]


@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_are_those_of_8_bits(backbones: dict[str, Backbone], dtype: str) -> None:
    base, config = backbones[dtype], NAMED_CONFIGS["llama-tiny"]
    linears = [base.linear(layer, module) for layer in range(3) for module in MODULES]
    linears.append(base.model.get_output_embeddings())
    assert all(isinstance(one, Int8Linear) for one in linears)
    counts = sum(one.in_features * one.out_features for one in linears)
    outputs = sum(one.out_features for one in linears)
    size = base.dtype.itemsize
    others = base.parameters - counts
    # Beside them oneDNN keeps a sum of each output, and pads outputs to whole blocks of 64.
    least = others * size + counts + 4 * outputs
    assert least <= base.bytes <= least + sum(4 * one.out_features + 64 * (one.in_features + 4) for one in linears)
    assert base.parameters == backbone.load("llama-tiny", dtype, "cpu", 0).parameters
    embedding = config["vocab_size"] * config["hidden_size"] * size
    work = decode_step(config, dtype, prompt_tokens=[4], generated_tokens=1, beams=1, quantisation="int8")
    assert work.weight_bytes == least - embedding
    plain = decode_step(config, dtype, prompt_tokens=[4], generated_tokens=1, beams=1)
    assert (work.cache_bytes, work.flops) == (plain.cache_bytes, plain.flops)


def test_a_tied_embedding_stays_as_it_is() -> None:
    config = NAMED_CONFIGS["llama-tiny"] | {"tie_word_embeddings": True}
    model = backbone._random(config, torch.float32, "cpu", 0)
    before = model.get_input_embeddings().weight.clone()
    int8_linear.quantise(model)
    assert isinstance(model.get_output_embeddings(), Int8Linear)
    assert torch.equal(model.get_input_embeddings().weight, before)
    read = decode_step(config, "fp32", prompt_tokens=[4], generated_tokens=1, beams=1, quantisation="int8")
    assert (
        read.weight_bytes
        == decode_step(
            NAMED_CONFIGS["llama-tiny"], "fp32", prompt_tokens=[4], generated_tokens=1, beams=1, quantisation="int8"
        ).weight_bytes
    )


# The product.


@pytest.mark.parametrize("stored", ["packed", "as it is"])
@pytest.mark.parametrize("size", [(64, 64), (51, 7), (1, 33), (192, 172)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product_rounds_as_one_of_full_weights_does(
    monkeypatch: pytest.MonkeyPatch, dtype: str, size: tuple[int, int], stored: str
) -> None:
    """Whatever the inputs are: also beside one that is a thousand times as large as the others, and without any."""
    if stored == "packed" and not int8_linear._EXACT:
        pytest.skip("needs VNNI")
    monkeypatch.setattr(int8_linear, "_EXACT", stored == "packed")
    q, scale = quantised(random(*size).to(backbone.DTYPES[dtype]))
    weight = Int8Weight(q, scale)
    assert torch.equal(weight.q, q)
    assert weight.stored.is_mkldnn == (stored == "packed")
    eps = torch.finfo(backbone.DTYPES[dtype]).eps
    for rows in (1, 3, int8_linear.MOST_ROWS + 5):
        x = random(rows, size[1], seed=rows)
        x[0, 0] *= 1000
        x[rows // 2] *= 0 if rows == 3 else 1
        x = x.to(backbone.DTYPES[dtype])
        found = weight.product(x)
        assert (found.dtype, found.shape) == (x.dtype, (rows, size[0]))
        expected = (x.double() @ q.double().T) * scale.double()
        large = (x.double().abs() @ q.double().abs().T) * scale.double()
        # Packed, sums are exact; in fp32 they round as often as there are terms.
        allowed = 2 * eps * large if stored == "packed" else eps * expected.abs() + 1.2e-7 * size[1] * large
        assert ((found.double() - expected).abs() <= allowed).all()
        short = x.clone()
        short[:, 0] = 0
        assert not ((weight.product(short).double() - expected).abs() <= allowed).all(), "a lost term is not seen"
    bias = random(size[0], seed=2).to(x.dtype)
    assert torch.equal(weight.product(x, bias), weight.product(x) + bias)
    assert weight.product(x[:0]).shape == (0, size[0])


@exact
def test_what_is_not_finite_stays_so() -> None:
    weight = Int8Weight(*quantised(random(64, 64)))
    x = random(3, 64)
    x[0, 5], x[1, 5] = torch.nan, torch.inf
    found = weight.product(x)
    assert not found[:2].isfinite().any()
    assert torch.equal(found[2], weight.product(x[2:])[0])


@exact
def test_a_weight_that_is_packed_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = torch.ops.onednn.qlinear_prepack
    monkeypatch.setattr(torch.ops.onednn, "qlinear_prepack", lambda q, shape: made(q.flip(0), shape))
    with pytest.raises(BackboneError, match=r"int8 weights \[64, 32\]: oneDNN reads others than were packed"):
        Int8Weight(*quantised(random(64, 32)))


# The runtimes, and what the proof says of them.


def make_batch() -> Batch:
    ids = torch.randint(3, 256, (5, 6), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3, 0), 1, new_tokens=4)


def make_plan(base: Backbone, method: str, slot: int) -> AdapterPlan:
    options, module = METHODS[method].options(), parameters.implementation(method)
    values = parameters.make(method, base.shape, options, seed=slot, input_rms=base.input_rms, linear_of=base.linear)
    return module.plan(values, base.shape, options)


def make_arm(base: Backbone, method: str, runtime: str) -> Any:
    if method == "none":
        return RUNTIMES[runtime](base, None, "eager")
    bank = Bank(
        parameters.meta_plan(method, base.shape, METHODS[method].options()),
        RESIDENT, base.dtype, base.device, base.linear,
    )  # fmt: skip
    for slot in range(RESIDENT):
        bank.admit(make_plan(base, method, slot))
    return RUNTIMES[runtime](base, bank, "eager")


def judged(arm: Any, base: Backbone, method: str) -> check.Check:
    plan_of = None if method == "none" else partial(make_plan, base, method)
    return check.check(arm, make_batch(), RESIDENT, base, seed=1, plan_of=plan_of)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("runtime", ["transformers", "static"])
@pytest.mark.parametrize("method", SERVED)
def test_every_served_method_passes(backbones: dict[str, Backbone], method: str, runtime: str, dtype: str) -> None:
    arm = make_arm(backbones[dtype], method, runtime)
    found = judged(arm, backbones[dtype], method)
    arm.close()
    assert (found.status, found.reason) == ("ok", None), found


def test_requests_that_join_pass_too(backbones: dict[str, Backbone]) -> None:
    assert judged(make_arm(backbones["fp32"], "lora", "continuous"), backbones["fp32"], "lora").status == "ok"


def test_the_oracle_reads_what_is_rounded_not_what_was_loaded(backbones: dict[str, Backbone]) -> None:
    asked = [oracle.Served(torch.arange(3, 9), torch.arange(9, 12), None)]
    (found,) = oracle.logits(backbones["fp32"], asked, torch.float64)
    full = backbone.load("llama-tiny", "fp32", "cpu", 0)
    (before,) = oracle.logits(full, asked, torch.float64)
    assert check.relative_difference(found, before) > 1e-3
    # In full precision, weights q s give the same.
    for linear in [full.linear(i, module) for i in range(3) for module in MODULES] + [full.model.lm_head]:
        q, scale = quantised(linear.weight.detach())
        linear.weight = torch.nn.Parameter(q.double() * scale.double()[:, None])
    (same,) = oracle.logits(full, asked, torch.float64)
    assert check.relative_difference(found, same) < 1e-12


@pytest.mark.parametrize("runtime", ["transformers", "static"])
def test_the_scale_of_the_next_output_is_seen(runtime: str) -> None:
    base = load()
    arm = make_arm(base, "none", runtime)
    assert judged(arm, base, "none").status == "ok"
    planted = arm.weights.layers[1].projections["o"].weight if runtime == "static" else base.linear(1, "o").int8
    wrong = copy.copy(planted)
    wrong._buffers = {"scale": planted.scale.roll(1)}
    if runtime == "static":
        arm.weights.layers[1].projections["o"].weight = wrong
    else:
        arm.model.model.layers[1].self_attn.o_proj.int8 = wrong
    found = judged(arm, base, "none")
    assert found.status == "check_failed", found


@pytest.mark.parametrize("runtime", ["transformers", "static"])
def test_a_runtime_that_serves_the_full_weights_is_seen(runtime: str) -> None:
    base, full = load(), backbone.load("llama-tiny", "fp32", "cpu", 0)
    found = judged(make_arm(full, "none", runtime), base, "none")
    assert found.status == "check_failed", found


def test_dora_s_lengths_are_those_of_the_rounded_weights(backbones: dict[str, Backbone]) -> None:
    linear = backbones["fp32"].linear(0, "q")
    lengths = row_lengths(linear, "q", None).double()
    expected = (linear.q.double() * linear.scale.double()[:, None]).norm(dim=1)
    assert torch.allclose(lengths, expected, rtol=1e-6)
    full = backbone.load("llama-tiny", "fp32", "cpu", 0).linear(0, "q").weight.double().norm(dim=1)
    assert not torch.allclose(lengths, full, rtol=1e-5)


# What is held.


def test_modules_that_share_a_weight_hold_it_once_and_get_their_own_back() -> None:
    base = load()
    before, sums, q = base.bytes, exact_sums(base.model), base.linear(0, "k").q
    arm = StaticArm(base, None, "eager")
    attention = base.model.model.layers[0].self_attn
    assert attention.q_proj.int8 is attention.v_proj.int8
    assert base.bytes <= before, "fused, they are padded less"
    assert torch.equal(attention.k_proj.q, q)
    x = random(2, 64)
    assert torch.allclose(attention.k_proj(x), (x @ q.float().T) * attention.k_proj.scale, rtol=1e-5, atol=1e-6)
    assert fuse(base) is arm.weights
    beside = base.skeleton()  # as long as the arm is there, in a copy that all skeletons share
    own = beside.model.layers[0].self_attn.k_proj
    assert own.int8 is base.skeleton().model.layers[0].self_attn.k_proj.int8
    assert torch.equal(own.q, q)
    assert {name: total.tolist() for name, total in exact_sums(base.model).items() if name.endswith(".q")} == {
        name: total.tolist() for name, total in sums.items() if name.endswith(".q")
    }
    arm.close()
    after = base.skeleton()
    assert base.fused is None
    assert base.linear(0, "k").int8 is after.model.layers[0].self_attn.k_proj.int8 is own.int8
    assert base.bytes == before
    assert held_bytes(own.int8.scale) == 4 * own.out_features


def test_a_skeleton_replaces_modules_without_a_trace(backbones: dict[str, Backbone]) -> None:
    base = backbones["fp32"]
    arm = make_arm(base, "lora", "transformers")
    adapted = arm.model.model.layers[0].self_attn.q_proj
    assert isinstance(adapted, AdaptedLinear)
    assert adapted.base.int8.stored is base.linear(0, "q").int8.stored
    arm.close()

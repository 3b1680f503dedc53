"""The runtimes against a naive model in fp64 that serves one request at a time and keeps no cache."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.kernels import vector_generator
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.methods import parameters, vera
from perfbench.methods.bank import Bank
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.miss import MissOptions
from perfbench.methods.para import ParaOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULE_PATHS, MODULES
from perfbench.methods.vera import VeraOptions
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Arm, Batch
from perfbench.runtimes.peft_arms import PeftMixedArm, PeftSingleArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.backbone_config import shape_of
from perfbench.spec.runtime_support import serves

CASES: dict[str, tuple[str, Any]] = {
    "lora": ("lora", LoraOptions()),
    "lora-alpha": ("lora", LoraOptions(rank=3, alpha=7.0, modules=("q", "down"))),
    "lora-bias": ("lora", LoraOptions(rank=3, alpha=7.0, modules=("q", "v", "up", "down"), lora_bias=True)),
    "dora": ("dora", METHODS["dora"].options()),
    "dora-alpha": ("dora", METHODS["dora"].options(rank=3, alpha=7.0, modules=("q", "down"))),
    "fanlora": ("fanlora", FanLoraOptions()),
    "fanlora-empty-layer": ("fanlora", FanLoraOptions(rank=2, setting=(("k", "gate"), (), ("o",)))),
    "ia3": ("ia3", METHODS["ia3"].options()),
    "ia3-original": ("ia3-original", METHODS["ia3-original"].options()),
    "ia3-all": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=())),
    "ia3-inputs": ("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=("q", "o", "gate", "up", "down"))),
    "road": ("road", RoadOptions()),
    "road-2": ("road", RoadOptions(variant="road_2", group_size=32, modules=("q", "v", "o"))),
    "road-4": ("road", RoadOptions(variant="road_4", group_size=2)),
    "miss": ("miss", MissOptions()),
    "miss-odd": ("miss", MissOptions(rank=5, modules=("q", "v", "gate", "down"))),
    "vera": ("vera", VeraOptions()),
    "vera-16": ("vera", VeraOptions(rank=16, key=4, modules=("k", "o", "up", "down"))),
    "para": ("para", ParaOptions()),
    "para-normalised": ("para", ParaOptions(rank=3, pool="normalised")),
    "peft": ("peft", LoraOptions()),
    "peft-road": ("peft-road", RoadOptions(variant="road_2", group_size=4)),
}
TINY = shape_of("llama-tiny")
RUNTIMES = tuple(PLAN_ARMS)
# Runtime continuous has no beams.
WITH_BEAMS = [(runtime, beams) for runtime in RUNTIMES for beams in (1, 3) if runtime != "continuous" or beams == 1]
RESIDENT = 4
SLOTS = (2, -1, 0, 2, 3, 1)
LENGTHS = (7, 2, 1, 5, 3, 6)
NEW_TOKENS = 5
TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


@dataclass(frozen=True)
class Tenants:
    method: str
    options: Any
    values: list[parameters.Parameters]


def make_tenants(tiny: backbone.Backbone, case: str) -> Tenants:
    method, options = CASES[case]
    make = partial(parameters.make, method, tiny.shape, options, linear_of=tiny.linear)
    values = [make(seed) for seed in range(RESIDENT)]
    return Tenants(method, options, values)


def make_arm(tiny: backbone.Backbone, tenants: Tenants, scratch: Path, runtime: str = "transformers") -> Arm:
    method = parameters.implementation(tenants.method)
    if METHODS[tenants.method].served_by == "plan":
        layout = parameters.meta_plan(tenants.method, tiny.shape, tenants.options)
        bank = Bank(layout, RESIDENT, tiny.dtype, tiny.device, tiny.linear)
        for values in tenants.values:
            bank.admit(method.plan(values, tiny.shape, tenants.options))
        return PLAN_ARMS[runtime](tiny, bank, "eager")
    return peft_arm(PeftMixedArm, tiny, tenants, scratch)


def peft_arm(make: Any, tiny: backbone.Backbone, tenants: Tenants, scratch: Path) -> Any:
    folders = [scratch / f"tenant{i}" for i in range(RESIDENT)]
    for folder, values in zip(folders, tenants.values, strict=True):
        parameters.implementation(tenants.method).save(values, tiny.shape, tenants.options, folder, tiny.name)
    return make(tiny, folders)


def make_batch(beams: int) -> Batch:
    """Ragged prompts, padded on the left; two of them of the same tenant, one without adapter, one of one token."""
    width = max(LENGTHS)
    ids = torch.randint(3, 256, (len(LENGTHS), width), generator=torch.Generator().manual_seed(9))
    mask = torch.stack([torch.arange(width) >= width - length for length in LENGTHS]).long()
    return Batch(ids * mask, mask, SLOTS, beams, NEW_TOKENS)


def reference(tiny: backbone.Backbone, tenants: Tenants, slot: int, prompt_tokens: int) -> Any:
    """An fp64 copy of the backbone that serves one tenant: LoRA merged, scales and PARA's vectors by hooks.

    It keeps no cache: PARA's vectors are made anew in every step, at the position where the prompt ends.
    """
    model = copy.deepcopy(tiny.model).double()
    if slot == -1:
        return model
    values = {name: tensor.double() for name, tensor in tenants.values[slot].items()}
    for index, layer in enumerate(model.model.layers):
        own = {n.removeprefix(f"layers.{index}."): t for n, t in values.items() if n.startswith(f"layers.{index}.")}
        ADAPT[tenants.method](layer, own, tenants.options, prompt_tokens)
    return model


def adapt_lora(layer: Any, own: dict[str, torch.Tensor], options: Any, prompt_tokens: int) -> None:
    for module in {name.split(".")[0] for name in own}:
        scale = 1.0 if options.alpha is None else options.alpha / options.rank
        linear = layer.get_submodule(MODULE_PATHS[module])
        linear.weight.data = linear.weight.data + own[f"{module}.b"] @ own[f"{module}.a"] * scale
        if f"{module}.bias" in own:
            linear.bias = torch.nn.Parameter(own[f"{module}.bias"] * scale)
        if f"{module}.magnitude" in own:
            rows = linear.weight.data
            linear.weight.data = (
                own[f"{module}.magnitude"][:, None] * rows / (rows * rows).sum(dim=1, keepdim=True).sqrt()
            )


def scale_output(layer: Any, module: str, scale: Callable[[], torch.Tensor]) -> None:
    layer.get_submodule(MODULE_PATHS[module]).register_forward_hook(lambda _, args, y: y * scale())


def adapt_ia3(layer: Any, own: dict[str, torch.Tensor], options: Any, prompt_tokens: int) -> None:
    for module in ("q", "k", "up"):
        scale_output(layer, module, lambda m=module: 1 + own[f"{m}.z"] @ own[f"{m}.p"])  # type: ignore[misc]


def adapt_ia3_original(
    layer: Any, own: dict[str, torch.Tensor], options: Ia3OriginalOptions, prompt_tokens: int
) -> None:
    for module in options.modules:
        if module in options.inputs:
            linear = layer.get_submodule(MODULE_PATHS[module])
            linear.register_forward_pre_hook(lambda _, args, m=module: (args[0] * own[f"{m}.l"],))
        else:
            scale_output(layer, module, lambda m=module: own[f"{m}.l"])  # type: ignore[misc]


def adapt_road(layer: Any, own: dict[str, torch.Tensor], options: RoadOptions, prompt_tokens: int) -> None:
    """Each weight (and bias) times the matrix of its rotations, number by number."""
    for module in options.modules:
        linear, size = layer.get_submodule(MODULE_PATHS[module]), options.group_size or 4
        theta, alpha = own[f"{module}.theta"], own[f"{module}.alpha"]
        turned = torch.zeros(linear.out_features, linear.out_features, dtype=torch.float64)
        for i in range(linear.out_features):
            group, place = divmod(i, size)
            pair = group * size // 2 + place % (size // 2)
            of_own, of_partner = {
                "road_1": (pair, pair),
                "road_2": (i, i),
                "road_4": (2 * group * size + place, (2 * group + 1) * size + place),
            }[options.variant]
            first = place < size // 2
            turned[i, i] = alpha[of_own] * theta[of_own].cos()
            sine = alpha[of_partner] * theta[of_partner].sin()
            turned[i, i + size // 2 if first else i - size // 2] = -sine if first else sine
        linear.weight.data = turned @ linear.weight.data


def adapt_miss(layer: Any, own: dict[str, torch.Tensor], options: MissOptions, prompt_tokens: int) -> None:
    """Each column of the weight plus its row of the block."""
    for module in options.modules:
        weight = layer.get_submodule(MODULE_PATHS[module]).weight
        for feature in range(weight.shape[1]):
            weight.data[:, feature] += own[f"{module}.block"][feature % options.rank]


def adapt_vera(layer: Any, own: dict[str, torch.Tensor], options: VeraOptions, prompt_tokens: int) -> None:
    for module in options.modules:
        weight = layer.get_submodule(MODULE_PATHS[module]).weight
        a, b = (matrix.double() for matrix in vera.shared(TINY, options))
        pair = b[: weight.shape[0]] @ own[f"{module}.d"].diag() @ a[:, : weight.shape[1]]
        weight.data += own[f"{module}.b"].diag() @ pair


def adapt_para(layer: Any, own: dict[str, torch.Tensor], options: ParaOptions, prompt_tokens: int) -> None:
    vectors: dict[str, torch.Tensor] = {}

    def make(module: Any, args: Any, kwargs: Any) -> None:
        h = (args[0] if args else kwargs["hidden_states"])[:, prompt_tokens - 1]
        if options.pool == "normalised":
            h = layer.input_layernorm(h)
        inner = h @ own["w_down"]
        made = inner * 0.5 * (1 + torch.erf(inner / 2**0.5)) @ own["w_up"] + own["bias"]
        sizes = [layer.get_submodule(MODULE_PATHS[m]).weight.shape[0] for m in ("q", "v", "up")]
        vectors.update(zip(("q", "v", "up"), made.split(sizes, dim=1), strict=True))

    layer.register_forward_pre_hook(make, with_kwargs=True)
    for module in ("q", "v", "up"):
        scale_output(layer, module, lambda m=module: vectors[m].unsqueeze(1))  # type: ignore[misc]


ADAPT = {
    "lora": adapt_lora,
    "dora": adapt_lora,
    "fanlora": adapt_lora,
    "peft": adapt_lora,
    "peft-road": adapt_road,
    "ia3": adapt_ia3,
    "ia3-original": adapt_ia3_original,
    "road": adapt_road,
    "miss": adapt_miss,
    "vera": adapt_vera,
    "para": adapt_para,
}


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float(((found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


@pytest.mark.parametrize(("runtime", "beams"), WITH_BEAMS)
@pytest.mark.parametrize("case", CASES)
def test_a_mixed_batch_is_what_the_naive_model_makes_of_each_request(
    tiny: backbone.Backbone, case: str, runtime: str, beams: int, tmp_path: Path
) -> None:
    if not serves(runtime, CASES[case][0]):
        pytest.skip(f"{case} is served by PEFT, which runtime {runtime} can't run")
    tenants, batch = make_tenants(tiny, case), make_batch(beams)
    arm = make_arm(tiny, tenants, tmp_path, runtime)
    tokens = arm.generate(batch).tokens
    logits = arm.generate(batch, forced=tokens, with_logits=True).logits
    for request, slot in enumerate(batch.slots):
        prompt = batch.alone(request).input_ids
        model = reference(tiny, tenants, slot, prompt.shape[1])
        with torch.inference_mode():
            whole = model(torch.cat([prompt, tokens[request : request + 1]], dim=1), use_cache=False).logits
            own = model.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                num_beams=beams,
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                use_cache=False,
            )
        assert relative(logits[request], whole[0, prompt.shape[1] - 1 : -1]) < TOLERANCE
        assert own[0, prompt.shape[1] :].tolist() == tokens[request].tolist()


@pytest.mark.parametrize("runtime", RUNTIMES)
@pytest.mark.parametrize("case", [case for case in CASES if not case.startswith("peft")])
def test_a_batch_of_one_tenant_is_served_by_one_group_alike(
    tiny: backbone.Backbone, case: str, runtime: str, tmp_path: Path
) -> None:
    beams = max(beams for name, beams in WITH_BEAMS if name == runtime)
    arm, batch = make_arm(tiny, make_tenants(tiny, case), tmp_path, runtime), make_batch(beams)
    same = replace(batch, slots=(2,) * len(batch.slots))
    tokens = arm.generate(same).tokens
    mixed = arm.generate(batch, forced=tokens, with_logits=True).logits
    single = arm.generate(same, forced=tokens, with_logits=True).logits
    for request, slot in enumerate(batch.slots):
        difference = relative(single[request], mixed[request])
        assert difference < TOLERANCE if slot == 2 else difference > 10 * TOLERANCE


@pytest.mark.parametrize(("runtime", "beams"), WITH_BEAMS)
def test_para_makes_its_vectors_once_for_each_layer_and_prompt(
    tiny: backbone.Backbone, beams: int, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counting(h: torch.Tensor, *stacks: torch.Tensor) -> torch.Tensor:
        sizes.append(h.shape[0])
        return vector_generator.eager(h, *stacks)

    monkeypatch.setitem(vector_generator.FORMS, "eager", counting)
    arm, batch = make_arm(tiny, make_tenants(tiny, "para"), tmp_path, runtime), make_batch(beams)
    arm.generate(batch)
    at_once, calls = (1, len(SLOTS)) if runtime == "continuous" else (len(SLOTS), 1)  # which reads one by one
    assert sizes == [at_once] * tiny.shape.layers * calls
    # One token of prompt looks like a decode step by its length, and is a prompt by the empty cache.
    sizes.clear()
    arm.generate(batch.alone(LENGTHS.index(1)))
    assert sizes == [1] * tiny.shape.layers


def test_para_pools_the_last_prompt_token_under_right_padding_too(
    tiny: backbone.Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled: list[torch.Tensor] = []

    def noting(h: torch.Tensor, *stacks: torch.Tensor) -> torch.Tensor:
        pooled.append(h.clone())
        return vector_generator.eager(h, *stacks)

    monkeypatch.setitem(vector_generator.FORMS, "eager", noting)
    arm = make_arm(tiny, make_tenants(tiny, "para"), tmp_path)
    left = replace(make_batch(beams=1), new_tokens=1)
    ids, mask = torch.zeros_like(left.input_ids), torch.zeros_like(left.attention_mask)
    for row, length in enumerate(LENGTHS):
        ids[row, :length], mask[row, :length] = left.input_ids[row, -length:], 1
    arm.generate(left)
    embeddings = tiny.model.get_input_embeddings().weight
    assert torch.equal(pooled[0], embeddings[left.input_ids[:, -1]])
    pooled.clear()
    assert isinstance(arm, PlanArm)
    arm._bind(replace(left, input_ids=ids, attention_mask=mask))
    with torch.inference_mode():
        arm.model(ids, attention_mask=mask)
    assert torch.equal(pooled[0], embeddings[left.input_ids[:, -1]])


def test_an_arm_lets_go_of_its_batch(tiny: backbone.Backbone, tmp_path: Path) -> None:
    batch = make_batch(beams=1)
    with torch.inference_mode():
        bare = tiny.model(batch.input_ids).logits
        for case in ("lora", "ia3", "para"):
            arm = make_arm(tiny, make_tenants(tiny, case), tmp_path)
            with pytest.raises(ValueError, match="slot 9"):
                arm.generate(replace(batch, slots=(9, *batch.slots[1:])))
            arm.generate(batch)
            assert torch.equal(arm.model(batch.input_ids).logits, bare)


@pytest.mark.parametrize("beams", [1, 3])
def test_peft_agrees_with_our_lora_token_for_token(tiny: backbone.Backbone, beams: int, tmp_path: Path) -> None:
    tenants, batch = make_tenants(tiny, "lora"), make_batch(beams)
    ours, mixed = make_arm(tiny, tenants, tmp_path), peft_arm(PeftMixedArm, tiny, tenants, tmp_path)
    assert torch.equal(ours.generate(batch).tokens, mixed.generate(batch).tokens)
    single = peft_arm(PeftSingleArm, tiny, tenants, tmp_path)
    for slot in (3, -1, 0):
        same = replace(batch, slots=(slot,) * len(batch.slots))
        assert torch.equal(ours.generate(same).tokens, single.generate(same).tokens)
    with pytest.raises(ValueError, match="serves one tenant at a time"):
        single.generate(batch)


def test_a_real_checkpoint_is_served_alike_by_peft_and_by_us(stories260k: Path, tmp_path: Path) -> None:
    real = backbone.load(str(stories260k), "fp32", "cpu", seed=0)
    tenants, batch = make_tenants(real, "lora"), make_batch(beams=1)
    ours, mixed = make_arm(real, tenants, tmp_path), peft_arm(PeftMixedArm, real, tenants, tmp_path)
    tokens = ours.generate(batch).tokens
    found, expected = (arm.generate(batch, forced=tokens, with_logits=True).logits for arm in (ours, mixed))
    assert relative(found, expected.double()) < TOLERANCE

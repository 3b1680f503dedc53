"""PARA, the papers' (IA)3 and FanLoRA in PEFT, and that an adapter is served as it was trained."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config

from perfbench.finetune import trained
from perfbench.kernels import row_scale
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.methods import fanlora, parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.peft import low_rank
from perfbench.peft.para import ParaConfig, ParaLayer, last_prompt_token
from perfbench.peft.projected_ia3 import ProjectedIa3Config
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch, generate
from tests.perfbench.finetune.models import INVOKING, OPTIONS, examples, other_llama, train

Config = Callable[[Any, int], peft.PeftConfig]


def _fanlora(model: Any, rank: int) -> peft.PeftConfig:
    return low_rank.config(fanlora, BackboneShape.of_config(model.config.to_dict()), FanLoraOptions(rank=rank))


TYPES: dict[str, Config] = {
    "para": lambda model, size: ParaConfig(task_type="CAUSAL_LM", rank=size),
    "para-normalised": lambda model, size: ParaConfig(task_type="CAUSAL_LM", rank=size, pool="normalised"),
    "ia3": lambda model, size: ProjectedIa3Config(task_type="CAUSAL_LM", dim=size),
    "fanlora": _fanlora,
}


@pytest.fixture(scope="module")
def base() -> Any:
    return other_llama()


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return found


def disturb(model: Any) -> None:
    """Random values for whatever is trained at the moment."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape)


@pytest.mark.parametrize("name", TYPES)
def test_peft_alone_trains_saves_and_loads(base: Any, name: str, tmp_path: Path) -> None:
    batch, model = examples(), peft.get_peft_model(copy.deepcopy(base), TYPES[name](base, 3))
    assert torch.equal(logits(model, batch), logits(base, batch))
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path))
    assert torch.equal(logits(again, batch), logits(model, batch))


@pytest.mark.parametrize("name", TYPES)
def test_two_adapters_live_on_one_model(base: Any, name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch, bare = examples(), logits(base, examples())
    model = peft.get_peft_model(copy.deepcopy(base), TYPES[name](base, 3), adapter_name="one")
    disturb(model)
    first = logits(model, batch)
    model.add_adapter("two", TYPES[name](base, 5))
    assert torch.equal(logits(model, batch), first)
    model.set_adapter("two")
    assert torch.equal(logits(model, batch), bare)
    disturb(model)
    second = logits(model, batch)
    assert not torch.allclose(second, bare)
    assert {n.split(".")[-1 if name != "fanlora" else -2] for n, p in model.named_parameters() if p.requires_grad} == {
        "two"
    }
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), bare)
    model.set_adapter("one")
    assert torch.equal(logits(model, batch), first)
    model.save_pretrained(str(tmp_path), save_embedding_layers=False)
    for adapter, expected in (("one", first), ("two", second)):
        again = peft.PeftModel.from_pretrained(copy.deepcopy(base), str(tmp_path / adapter))
        again.load_adapter(str(tmp_path / "one"), adapter_name="company")
        assert torch.equal(logits(again, batch), expected)
        again.set_adapter("company")
        assert torch.equal(logits(again, batch), first)
    model.delete_adapter("two")
    assert torch.equal(logits(model, batch), first)
    bare_again = model.unload()
    assert torch.equal(logits(bare_again, batch), bare)
    assert [n for n, _ in bare_again.named_modules()] == [n for n, _ in base.named_modules()]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in bare_again.modules())


@pytest.mark.parametrize("name", ["para", "ia3"])
def test_a_mixed_batch_is_refused_where_peft_would_ignore_it(base: Any, name: str) -> None:
    model = peft.get_peft_model(copy.deepcopy(base), TYPES[name](base, 3))
    with pytest.raises(ValueError, match="no mixed batches"):
        model(**examples(), adapter_names=["default"] * 3)


def test_para_takes_one_active_adapter(base: Any) -> None:
    model = peft.get_peft_model(copy.deepcopy(base), TYPES["para"](base, 3), adapter_name="one")
    model.add_adapter("two", TYPES["para"](base, 3))
    model.base_model.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="one active adapter, got one, two"):
        model(**examples())


def test_another_architecture_and_nonsense_are_refused() -> None:
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=16, n_positions=16)
    with pytest.raises(ValueError, match="expected one of llama"):
        peft.get_peft_model(AutoModelForCausalLM.from_config(config), ParaConfig(task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="pool: expected one of residual, normalised"):
        ParaConfig(pool="mean")
    with pytest.raises(ValueError, match="rank: expected an integer >= 1"):
        ParaConfig(rank=0)
    with pytest.raises(ValueError, match="dim: expected an integer >= 1"):
        ProjectedIa3Config(dim=0)


def test_the_scale_that_is_differentiated_is_the_one_that_serves() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        y, scale = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 8).to(dtype)
        scaled = row_scale.scaled(y, scale)
        row_scale.eager(y, scale)
        assert torch.equal(scaled, y)


def test_a_part_of_the_model_alone_has_no_prompt(base: Any) -> None:
    model, batch = para(base), examples()
    model(**batch)
    with pytest.raises(RuntimeError, match="call the whole model"):
        model.get_base_model().model(input_ids=batch["input_ids"])


def test_a_cache_that_was_filled_without_the_adapter_is_refused(base: Any) -> None:
    model, ids = para(base), examples()["input_ids"]
    with model.disable_adapter():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="filled without this adapter"):
        model(input_ids=ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", TYPES)
def test_on_a_backbone_in_bf16_the_adapter_stays_in_fp32(base: Any, name: str) -> None:
    model = peft.get_peft_model(copy.deepcopy(base).bfloat16(), TYPES[name](base, 3))
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    batch = examples()
    losses = train(model, batch, steps=4)
    assert losses[-1] < losses[0]
    assert logits(model, batch).dtype == torch.bfloat16


# Where the prompt ends


def test_the_prompt_ends_before_the_first_label_that_counts() -> None:
    batch = examples(rows=3, prompt=6, answer=3)
    found = last_prompt_token(batch["input_ids"], batch["labels"], batch["attention_mask"])
    assert found.tolist() == [5, 4, 3]
    flipped = {name: tensor.flip(1) for name, tensor in batch.items()}
    labels = torch.full_like(batch["labels"], -100)
    labels[:, -3:] = 7
    assert last_prompt_token(batch["input_ids"], labels, flipped["attention_mask"]).tolist() == [5, 5, 5]


def test_without_labels_it_ends_with_the_last_token_attended() -> None:
    batch = examples(rows=3, prompt=6, answer=3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    assert last_prompt_token(ids, None, mask).tolist() == [8, 7, 6]
    assert last_prompt_token(ids, None, mask.flip(1)).tolist() == [8, 8, 8]
    assert last_prompt_token(ids, None, None).tolist() == [8, 8, 8]
    assert last_prompt_token(ids, torch.full_like(ids, -100), mask).tolist() == [8, 7, 6]
    # A label on the first token never counts: nothing predicts it.
    assert last_prompt_token(ids, ids, None).tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match=r"expected an attention mask \[B, S\]"):
        last_prompt_token(ids, None, mask[:, None, None])


def para(base: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = peft.get_peft_model(copy.deepcopy(base), ParaConfig(task_type="CAUSAL_LM", rank=3))
    disturb(model)
    return model.eval()


def vectors(model: Any) -> list[torch.Tensor]:
    kept = [m.kept for m in model.modules() if isinstance(m, ParaLayer)]
    assert len(kept) == model.config.num_hidden_layers
    return [torch.cat(list(layer.values()), dim=1) for layer in kept if layer is not None]


def test_the_vectors_do_not_see_the_answer(base: Any) -> None:
    model, batch = para(base), examples()
    model(**batch)
    before = vectors(model)
    answer = batch["labels"] != -100
    changed = torch.where(answer, 70 - batch["input_ids"], batch["input_ids"]).clamp(0, 63)
    assert not torch.equal(changed, batch["input_ids"])
    labels = torch.where(answer, changed, -100)
    after = model(input_ids=changed, attention_mask=batch["attention_mask"], labels=labels)
    assert all(torch.equal(one, other) for one, other in zip(before, vectors(model), strict=True))
    assert torch.isfinite(after.loss)
    # Pooled at the end of the sequence they would: the check can fail.
    model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    one = vectors(model)
    model(input_ids=changed, attention_mask=batch["attention_mask"])
    assert not any(torch.equal(a, b) for a, b in zip(one, vectors(model), strict=True))


def test_padding_on_either_side_gives_the_same_loss_and_gradients(base: Any) -> None:
    batch, found = examples(), []
    left = {name: torch.stack([row.roll(shift) for shift, row in enumerate(t)]) for name, t in batch.items()}
    assert not torch.equal(left["attention_mask"], batch["attention_mask"])
    for side in (batch, left):
        model = para(base)
        output = model(**side)
        output.loss.backward()
        found.append((output.loss, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def naive_para(model: Any, values: list[dict[str, torch.Tensor]], last: list[int]) -> None:
    """PARA by hooks that write eq. 6 out, with the parameters `values` of each layer, pooled at `last`."""
    for layer, own in zip(model.model.layers, values, strict=True):
        scales: dict[str, torch.Tensor] = {}

        def make(
            module: Any, args: Any, own: dict[str, torch.Tensor] = own, scales: dict[str, torch.Tensor] = scales
        ) -> None:
            inner = torch.stack([args[0][row, place] for row, place in enumerate(last)]) @ own["w_down"]
            gelu = inner * (1 + torch.erf(inner / 2**0.5)) / 2
            found = (gelu @ own["w_up"] + own["bias"]).split([32, 16, 48], dim=1)
            scales.update(zip("qvu", found, strict=True))

        layer.register_forward_pre_hook(make)
        for kind, linear in (("q", layer.self_attn.q_proj), ("v", layer.self_attn.v_proj), ("u", layer.mlp.up_proj)):
            linear.register_forward_hook(lambda m, x, y, kind=kind, scales=scales: y * scales[kind][:, None])


def test_para_s_gradients_are_those_of_the_formula() -> None:
    """With grouped-query attention (V has half of Q's width) and tied embeddings."""
    bare = other_llama(tie_word_embeddings=True).requires_grad_(False)
    model, batch, mine = para(bare), examples(), {}
    model(**batch).loss.backward()
    values = []
    for layer in model.get_base_model().model.layers:
        values.append({})
        for kind in ("w_down", "w_up", "bias"):
            parameter = getattr(layer, f"para_{kind}")["default"]
            values[-1][kind] = parameter.detach().clone().requires_grad_()
            mine[len(values) - 1, kind] = parameter.grad
    naive_para(bare, values, last=[5, 4, 3])
    bare(**batch).loss.backward()
    for (layer, kind), gradient in mine.items():
        assert gradient is not None
        assert float(gradient.norm()) > 1e-4
        torch.testing.assert_close(gradient, values[layer][kind].grad, rtol=1e-3, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_even_with_two_batches_in_flight(base: Any) -> None:
    found = []
    for checkpointing in (False, True):
        model = para(base)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        losses = [model(**examples(seed=seed), use_cache=False).loss for seed in (4, 5)]
        (losses[0] + losses[1]).backward()
        found.append((losses, [p.grad for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("beams", [1, 3])
def test_the_vectors_are_kept_through_generation(base: Any, beams: int) -> None:
    model, batch = para(base), examples(answer=0)
    ids = torch.stack([row.roll(shift) for shift, row in enumerate(batch["input_ids"])])
    mask = torch.stack([row.roll(shift) for shift, row in enumerate(batch["attention_mask"])])
    request = Batch(ids, mask, (0, 0, 0), beams, new_tokens=5)
    tokens = generate(model, request).tokens
    for row in range(3):
        alone = request.alone(row)
        assert torch.equal(generate(model, alone).tokens[0], tokens[row])
        if beams == 1:  # with no cache every step pools at the end of the prompt by its labels
            whole = torch.cat([alone.input_ids, tokens[row : row + 1]], dim=1)
            labels = whole.clone()
            labels[:, : alone.input_ids.shape[1]] = -100
            with torch.no_grad():
                steps = model(input_ids=whole, labels=labels, use_cache=False).logits
            assert torch.equal(steps[0, alone.input_ids.shape[1] - 1 : -1].argmax(dim=1), tokens[row])


# Served as trained

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan" and method.trained_by)
# In fp32; the fault that is planted moves the logits a hundred times as far.
TIGHT = 2e-5


@pytest.fixture(scope="module")
def tiny() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


@pytest.fixture(scope="module")
def trained_adapters(tiny: backbone.Backbone, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Two adapters of each served method, trained a few steps on different examples and saved."""
    folders: dict[str, list[Path]] = {}
    for name in SERVED:
        folders[name] = []
        for tenant in range(2):
            module = trained.attach(tiny.skeleton(), name, OPTIONS.get(name), seed=tenant)
            train(module, examples(vocab=256, seed=tenant), steps=6, learning_rate=0.05)
            folders[name].append(tmp_path_factory.mktemp("adapters") / name)
            trained.save(module, folders[name][-1])
    return folders


def prompts() -> Batch:
    """Ragged prompts, padded on the left, of both tenants in turn and of none; within them what invokes an adapter."""
    generator = torch.Generator().manual_seed(3)
    lengths = (7, 3, 5, 6)
    ids = torch.randint(3, 256, (4, 7), generator=generator)
    ids[:, 5] = INVOKING
    mask = torch.stack([torch.arange(7) >= 7 - length for length in lengths]).long()
    return Batch(ids * mask, mask, (0, 1, -1, 1), beams=1, new_tokens=6)


def as_trained(tiny: backbone.Backbone, folders: list[Path], batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and logits of the PEFT models, one request at a time."""
    models = [trained.load(tiny.skeleton(), folder).eval() for folder in folders]
    found = [
        generate(tiny.model if slot == -1 else models[slot], batch.alone(row), with_logits=True)
        for row, slot in enumerate(batch.slots)
    ]
    scores = [f.logits for f in found if f.logits is not None]
    return torch.cat([f.tokens for f in found]), torch.cat(scores)


def served(tiny: backbone.Backbone, name: str, folders: list[Path], runtime: str) -> Any:
    module, options = parameters.implementation(name), METHODS[name].options()
    plans = [module.load(folder, tiny.shape, options) for folder in folders]
    bank = Bank(union_layout(plans), len(plans), tiny.dtype, tiny.device, tiny.linear)
    for plan in plans:
        bank.admit(plan)
    return PLAN_ARMS[runtime](tiny, bank, "eager")


@pytest.mark.parametrize(
    ("name", "runtime"), [one for one in product(SERVED, PLAN_ARMS) if one != ("alora", "continuous")]
)
def test_it_is_served_as_it_was_trained(
    tiny: backbone.Backbone, trained_adapters: dict[str, list[Path]], name: str, runtime: str
) -> None:
    folders, batch = trained_adapters[name], prompts()
    tokens, expected = as_trained(tiny, folders, batch)
    arm = served(tiny, name, folders, runtime)
    found = arm.generate(batch, with_logits=True)
    assert torch.equal(found.tokens, tokens)
    assert float((found.logits - expected).abs().max()) < TIGHT
    arm.close()
    # Each with the other's adapter: the check can fail.
    arm = served(tiny, name, folders[::-1], runtime)
    found = arm.generate(batch, forced=tokens, with_logits=True)
    assert float((found.logits - expected).abs().amax(dim=(1, 2))[[0, 1, 3]].min()) > 100 * TIGHT
    arm.close()


def test_it_is_served_as_it_was_trained_on_a_real_checkpoint(tmp_path: Path) -> None:
    data = os.environ.get("PERFBENCH_TEST_DATA")
    if data is None or not (Path(data) / "stories260K" / "hf").is_dir():
        pytest.skip("needs PERFBENCH_TEST_DATA with stories260K/hf, a Llama of 260K parameters")
    real = backbone.load(str(Path(data) / "stories260K" / "hf"), "fp32", "cpu", seed=0)
    for name in ("lora", "ia3", "para"):
        module = trained.attach(real.skeleton(), name, None, seed=0)
        losses = train(module, examples(vocab=512), steps=6, learning_rate=0.02)
        assert losses[-1] < losses[0]
        trained.save(module, tmp_path / name)
        batch = replace(prompts(), slots=(0, -1, 0, 0))
        tokens, expected = as_trained(real, [tmp_path / name], batch)
        for runtime in PLAN_ARMS:
            arm = served(real, name, [tmp_path / name], runtime)
            found = arm.generate(batch, with_logits=True)
            arm.close()
            assert torch.equal(found.tokens, tokens)
            assert float((found.logits - expected).norm() / expected.norm()) < TIGHT


def test_para_pooled_elsewhere_would_not_be_served_as_trained(
    tiny: backbone.Backbone, trained_adapters: dict[str, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault: in training the vectors come from the end of the sequence, answer and all."""
    folder, request = trained_adapters["para"][0], prompts().alone(0)
    model = trained.load(tiny.skeleton(), folder).eval()
    found = served(tiny, "para", [folder], "transformers").generate(request, with_logits=True)
    whole = torch.cat([request.input_ids, found.tokens], dim=1)
    labels = whole.clone()
    labels[:, : request.input_ids.shape[1]] = -100

    def distance() -> float:
        with torch.no_grad():
            steps = model(input_ids=whole, labels=labels).logits[:, request.input_ids.shape[1] - 1 : -1]
        return float((steps - found.logits).abs().max())

    assert distance() < TIGHT
    monkeypatch.setattr(
        "perfbench.peft.para.last_prompt_token",
        lambda inputs, labels, mask: torch.full((len(inputs),), inputs.shape[1] - 1),
    )
    assert distance() > 100 * TIGHT

"""The shared evaluation gives what PEFT gives when it is asked setting by setting, for every family."""

from __future__ import annotations

import random
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from perfbench.errors import AdapterError, FinetuneError
from perfbench.finetune.search import evaluate, gates
from perfbench.finetune.search.evaluate import Ablations, Batch, ablations, additions, gate_gradients, naive_ablations
from perfbench.methods.shape import MODULE_PATHS, MODULES
from tests.perfbench.finetune.search.conftest import FAMILIES, load_bare

# Hugging Face's norms are taken in fp32 whatever the model's dtype is, so that fp64 agrees to about 1e-7 only.
NEAR = 1e-5


class PeftReference:
    """The same adapter in PEFT, its gates as PEFT's own scaling; the loss from the whole model's logits."""

    def __init__(self, model: Any, adapter: Any, dtype: torch.dtype):
        self.module = peft.PeftModel.from_pretrained(load_bare(model, dtype).model, str(adapter)).to(dtype).eval()
        layers = self.module.base_model.model.model.layers
        self.linears = {
            (layer, name): layers[layer].get_submodule(path)
            for layer in range(len(layers))
            for name, path in MODULE_PATHS.items()
        }
        self.scale = next(iter(self.linears.values())).scaling["default"]

    def losses(self, batch: Batch, on: set[tuple[int, str]]) -> torch.Tensor:
        """[rows] summed loss of the answers with the gates of `on` alone."""
        for place, linear in self.linears.items():
            linear.scaling["default"] = self.scale if place in on else 0.0
        with torch.no_grad():
            logits = self.module(input_ids=batch.ids).logits[:, :-1].double()
        return F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none").sum(1)

    def ablations(self, batch: Batch) -> Ablations:
        every = set(self.linears)
        layers = 1 + max(layer for layer, _ in every)

        def each(on: Any) -> torch.Tensor:
            rows = [torch.stack([self.losses(batch, on((layer, m))) for m in MODULES]) for layer in range(layers)]
            return torch.stack(rows)

        return Ablations(
            self.losses(batch, every),
            self.losses(batch, set()),
            each(lambda place: every - {place}),
            each(lambda place: {place}),
        )


def apart(one: Ablations, other: Ablations) -> float:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return max(float((a - b).abs().max()) for a, b in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_setting_has_the_loss_that_peft_gives(family, made, batch):
    model, adapter = made(family)
    gated, rank = gates.load(load_bare(model), adapter)
    expected = PeftReference(model, adapter, torch.float64).ablations(batch)
    assert rank == 3
    assert apart(ablations(gated, batch, 10**9), expected) < NEAR
    assert apart(naive_ablations(gated, batch), expected) < NEAR
    # Every gate counts: no two settings are alike, so that a mixed-up one would have been seen.
    flat = torch.cat([expected.without.sum(-1).flatten(), expected.only.sum(-1).flatten()])
    gaps = flat.sort().values.diff()
    assert float(gaps.min()) > 2 * NEAR


def test_fp32_gives_the_same_scores(made, batch):
    model, adapter = made()
    gated, _ = gates.load(load_bare(model, torch.float32), adapter)
    expected = PeftReference(model, adapter, torch.float64).ablations(batch)
    assert apart(ablations(gated, batch, 10**9), expected) < 1e-3
    assert apart(ablations(gated, batch, 10**9), naive_ablations(gated, batch)) < 1e-4


@pytest.mark.parametrize("tokens", [1, 66, 70, 100])
def test_settings_in_chunks_give_the_same(tokens, made, batch):
    gated, _ = gates.load(load_bare(made()[0]), made()[1])
    assert apart(ablations(gated, batch, tokens), ablations(gated, batch, 10**9)) < NEAR


def test_chunks_are_bounded_and_even(batch):
    seven = torch.zeros(7 * batch.rows, 11, 2)
    assert [len(c) // batch.rows for c in evaluate._chunks(seven, batch, 4 * 33)] == [4, 3]
    assert [len(c) // batch.rows for c in evaluate._chunks(seven, batch, 1)] == [1] * 7
    assert [len(c) // batch.rows for c in evaluate._chunks(seven, batch, 10**6)] == [7]


@pytest.mark.parametrize("module", MODULES)
def test_a_flip_in_the_wrong_block_is_seen(module, made, batch, monkeypatch):
    model, adapter = made()
    gated, _ = gates.load(load_bare(model), adapter)
    blocks, multiplied, layout = gates.BLOCKS[module]
    wrong = tuple(0 if at == gates.FLIPPED else at for at in layout)
    expected = naive_ablations(gated, batch)
    monkeypatch.setitem(gates.BLOCKS, module, (blocks, multiplied, wrong))
    assert apart(ablations(gated, batch, 10**9), expected) > 100 * NEAR


def test_padding_and_neighbours_change_nothing(made, batch):
    gated, _ = gates.load(load_bare(made()[0]), made()[1])
    whole = ablations(gated, batch, 10**9)
    alone = ablations(gated, Batch(batch.ids[:1, :7], batch.labels[:1, :7]), 10**9)
    assert float((whole.without[..., :1] - alone.without).abs().max()) < NEAR
    assert float((whole.only[..., :1] - alone.only).abs().max()) < NEAR


def test_many_answer_positions_are_taken_in_pieces(made, batch, monkeypatch):
    gated, _ = gates.load(load_bare(made()[0]), made()[1])
    expected = ablations(gated, batch, 10**9)
    monkeypatch.setattr(evaluate, "HEAD_POSITIONS", 5)
    assert apart(ablations(gated, batch, 10**9), expected) < NEAR


def test_gates_switched_on_one_after_another(made, batch):
    model, adapter = made()
    gated, _ = gates.load(load_bare(model), adapter)
    order = [(layer, module) for layer in range(3) for module in MODULES]
    random.Random(3).shuffle(order)
    found = additions(gated, batch, order)
    reference = PeftReference(model, adapter, torch.float64)
    for count in (0, 1, 2, 9, 20, 21):
        assert float((found[count] - reference.losses(batch, set(order[:count]))).abs().max()) < NEAR


def test_gradients_are_those_of_the_gates(made, batch):
    """Against differences of PEFT's scaling, in fp64; the step is wide, as norms are taken in fp32."""
    model, adapter = made()
    gated, _ = gates.load(load_bare(model), adapter)
    found = gate_gradients(gated, batch)
    assert found.shape == (3, 7, 3)
    reference, tokens, step = PeftReference(model, adapter, torch.float64), batch.answer_tokens(), 3e-3
    every = set(reference.linears)
    for layer, module in ((0, "q"), (1, "v"), (1, "o"), (2, "up"), (2, "down")):
        sides = []
        for gate in (1 + step, 1 - step):
            reference.losses(batch, every)
            reference.linears[layer, module].scaling["default"] = gate * reference.scale
            with torch.no_grad():
                logits = reference.module(input_ids=batch.ids).logits[:, :-1].double()
            losses = F.cross_entropy(logits.transpose(1, 2), batch.labels[:, 1:], reduction="none")
            sides.append(losses.sum(1) / tokens)
        slope = (sides[0] - sides[1]) / (2 * step)
        torch.testing.assert_close(found[layer, MODULES.index(module)], slope, rtol=2e-2, atol=2e-4)


def test_gates_are_all_on_again_after_gradients(made, batch):
    gated, _ = gates.load(load_bare(made()[0]), made()[1])
    gate_gradients(gated, batch)
    assert all(linear.gate is True for layer in gated.linears for linear in layer.values())


def test_a_loss_that_is_not_finite_stops(made, batch):
    gated, _ = gates.load(load_bare(made()[0]), made()[1])
    gated.linears[1]["up"].b[0, 0] = float("inf")
    order = [(0, "q"), (1, "up")]
    for work in (
        lambda: ablations(gated, batch, 10**9),
        lambda: naive_ablations(gated, batch),
        lambda: additions(gated, batch, order),
        lambda: gate_gradients(gated, batch),
    ):
        with pytest.raises(FinetuneError, match="not finite"):
            work()


def test_the_backbone_stays_as_it_was(made, batch):
    model, adapter = made()
    bare = load_bare(model)
    before = bare.model(batch.ids).logits
    ablations(gates.load(bare, adapter)[0], batch, 10**9)
    assert torch.equal(bare.model(batch.ids).logits, before)


def test_an_adapter_without_some_module_is_refused(made, tmp_path):
    model, adapter = made()
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if "layers.1.self_attn.k_proj" not in name}
    folder = tmp_path / "part"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(kept, folder / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match=r"layers\.1\.self_attn\.k_proj\.lora_A.*no such tensor"):
        gates.load(load_bare(model), folder)


def test_an_adapter_of_another_backbone_is_refused(made):
    with pytest.raises(AdapterError, match="the adapter was made for another backbone"):
        gates.load(load_bare(made()[0]), made("gemma")[1])

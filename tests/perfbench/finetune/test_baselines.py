"""What is particular to a baseline: AdaLoRA's pruning, SSP's search, the learned activation, BitFit beside a bias."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.finetune import trained
from perfbench.finetune.baselines.learned_adapter import Rational
from perfbench.finetune.baselines.ssp import SspOptions
from perfbench.methods import fanlora, parameters
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.spec.backbone_config import find_config
from tests.perfbench.finetune.models import examples, other_llama, train


@pytest.fixture(scope="module")
def base() -> Any:
    return other_llama()


def trainable(module: Any) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def test_adalora_gives_up_half_of_its_ranks(base: Any) -> None:
    """On LLaMA-2 7B that leaves 9,995,136 parameters where every module gives up half, the papers' 10.0M."""
    module = trained.attach(copy.deepcopy(base), "adalora", None, 0)
    train(module, examples(), steps=10)
    ranks = [p for name, p in module.named_parameters() if "lora_E" in name]
    assert len(ranks) == 2 * 7
    assert sum(p.numel() for p in ranks) == 2 * 7 * 8
    assert sum(int((p != 0).sum()) for p in ranks) == 2 * 7 * 4
    # What is there at rank 4, before any of it is given up, is what is left of rank 8.
    exact = trained.parameter_count("adalora", find_config("llama2-7b"), {"initial_rank": 4, "rank": 3})
    assert exact == 9_995_136
    assert round(exact / 1e6, 1) == 10.0


def test_the_learned_activation_starts_as_gelu_and_stays_finite() -> None:
    rational = Rational()
    x = torch.linspace(-3, 3, 601)
    assert float((rational(x) - torch.nn.functional.gelu(x)).detach().abs().max()) < 0.005
    far = torch.tensor([-1e4, 1e4], requires_grad=True)
    rational(far).sum().backward()
    for parameter in rational.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert (parameter.grad != 0).any()


def test_bitfit_trains_the_difference_where_there_is_a_bias() -> None:
    sizes = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": 64}  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("qwen2", **sizes)).eval()
    linear = model.model.layers[0].self_attn.q_proj
    torch.nn.init.normal_(linear.bias)
    moved = copy.deepcopy(model)
    module = trained.attach(model, "bitfit", None, 0)
    train(module, examples(), steps=3)
    assert float(linear.bitfit_bias.detach().abs().max()) > 0
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("bitfit_bias"):
                other = moved.get_submodule(name.rpartition(".")[0])
                bias = parameter if other.bias is None else other.bias + parameter
                other.bias = torch.nn.Parameter(bias.clone())
        ids = examples()["input_ids"]
        torch.testing.assert_close(moved(ids).logits, module.eval()(ids).logits)


# SSP


def search_of(base: Any, **options: Any) -> tuple[Any, Any]:
    module = trained.attach(copy.deepcopy(base), "ssp", SspOptions(**options), 0)
    return module, module.ssp


def test_the_expected_number_of_open_gates_meets_the_budget(base: Any) -> None:
    module, search = search_of(base, budget=2000)
    trained.begin(module, steps=100)
    with torch.no_grad():
        search.gates.normal_(0, 1)
    module.train()
    open_, draws = 0.0, 150
    for step in range(draws):
        search.draw(step)
        gates = torch.stack([search._gate(i) for i in range(len(search.sizes))]).detach()
        assert float(gates.min()) >= 0
        assert float(gates.max()) <= 1
        open_ += float(((gates > 0) * search.sizes).sum()) / draws
    assert open_ == pytest.approx(2000, rel=0.1)
    search.draw(7)
    again = search.noise.clone()
    search.draw(8)
    assert not torch.equal(search.noise, again)
    search.draw(7)
    assert torch.equal(search.noise, again)


def test_what_stays_has_the_highest_gates_fits_the_budget_and_nothing_else_is_left(base: Any) -> None:
    module, search = search_of(base, budget=1000)
    names, sizes = list(search.places), dict(zip(search.places, search.sizes.tolist(), strict=True))
    with torch.no_grad():
        search.gates.copy_(torch.arange(len(names)).flip(0))
    search.choose()
    kept, left = set(), 1000
    for name in names:  # in the order of their gates
        if sizes[name] <= left:
            kept.add(name)
            left -= sizes[name]
    assert set(search.places) == kept
    assert 0 < trainable(module) == 1000 - left
    hooked = sum(len(m._forward_hooks) for m in module.modules())
    assert hooked == len(kept)


def test_the_search_takes_its_share_of_the_steps(base: Any) -> None:
    module, search = search_of(base, budget=1500, search_share=0.5)
    trained.begin(module, steps=8)
    for step in range(1, 9):
        assert search.searching == (step <= 4)
        module.train()(**examples()).loss.backward()
        trained.after_step(module, step)
    assert trainable(module) <= 1500


def test_ssp_without_begin_is_refused(base: Any) -> None:
    module, _ = search_of(base)
    with pytest.raises(RuntimeError, match="call begin"):
        trained.after_step(module, 1)


def test_ssp_s_count_on_llama2_7b_is_the_papers_whatever_is_chosen() -> None:
    """The budget is FanLoRA's 8.6M; what stays falls short of it by less than the smallest place."""
    config = find_config("llama2-7b")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model("llama", **{k: v for k, v in config.items() if k != "model_type"})
        )
        module = trained.attach(model, "ssp", None, 0)
    gates = torch.randn(len(module.ssp.sizes), generator=torch.Generator().manual_seed(0))
    module.ssp.gates = torch.nn.Parameter(gates)
    module.ssp.choose()
    shape = fanlora.BackboneShape.of_config(config)
    budget = parameters.parameter_count("fanlora", shape, FanLoraOptions())
    assert budget == 8_613_888
    assert budget - 4096 < trainable(module) <= budget
    assert round(trainable(module) / 1e6, 1) == 8.6

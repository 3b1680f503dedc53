"""Several ranks against one backbone, as threads of this process that meet at a barrier: what each has, and faults.

That processes do the same with every method is in tests/perfbench/measure/on_device/test_ranks.py.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch

from perfbench.errors import AdapterError, BackboneError
from perfbench.kernels import residual_rmsnorm
from perfbench.kernels.low_rank import expand
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.ia3_original import Ia3OriginalOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.miss import MissOptions
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.road import RoadOptions
from perfbench.methods.shape import MODULES, BackboneShape
from perfbench.methods.share import Share
from perfbench.methods.vera import VeraOptions
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch, Generation
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.rank import Rank
from perfbench.spec import backbone_config
from perfbench.verify.on_device.runtimes import make_plan

TINY = backbone_config.NAMED_CONFIGS["llama-tiny"] | {"num_hidden_layers": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "biases": TINY | {"attention_bias": True, "mlp_bias": True},
    # Of each rank the columns of gate are as many as the hidden size: VeRA's parts are as large as others' wholes.
    "parts-like-wholes": TINY | {"intermediate_size": 128},
    "four-heads": TINY | {"num_key_value_heads": 4, "intermediate_size": 176},
}
# Operations that the methods by default do not have, and tenants of unlike ranks.
TENANTS: dict[str, list[tuple[str, Any]]] = {
    "none": [],
    "ranks": [("lora", LoraOptions(rank=rank)) for rank in (2, 8, 4, 1)],
    "biases": [("lora", LoraOptions(lora_bias=bias)) for bias in (True, False, True, True)],
    "inputs": [("ia3-original", Ia3OriginalOptions(modules=MODULES, inputs=("gate", "up", "o", "down")))] * 4,
    "sums": [("miss", MissOptions(rank=rank)) for rank in (5, 8, 10, 5)],
    "shared": [("vera", VeraOptions(rank=16))] * 4,
    "mixed": [("para", None), ("lora", None), ("road", RoadOptions(group_size=2)), ("dora", None)],
}
REDUCTIONS_OF_A_CALL = 2 * 2 * 5  # two sums a layer, for the prompts and for each of four more tokens


def load(config: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> backbone.Backbone:
    """A backbone of this config none of whose biases is 0."""
    monkeypatch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", config)
    base = backbone.load("of-a-test", "fp32", "cpu", seed=0)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in base.model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return base


def make_batch(beams: int = 1) -> Batch:
    ids = torch.randint(3, 256, (5, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :8] = mask[3, :2] = 0
    return Batch(ids * mask, mask, (2, 0, -1, 3, 1), beams, new_tokens=5)


def bank_of(plans: list[AdapterPlan], base: backbone.Backbone) -> Bank | None:
    if not plans:
        return None
    bank = Bank(union_layout(plans), len(plans), base.dtype, base.device, base.linear)
    for plan in plans:
        bank.admit(plan)
    return bank


Reduce = Callable[[torch.Tensor], None]


def on_ranks(
    base: backbone.Backbone,
    plans: list[AdapterPlan],
    batch: Batch,
    ranks: int = 2,
    *,
    share_of: Callable[[int], int] = lambda rank: rank,
    around: Callable[[int, Reduce], Reduce] = lambda rank, reduce: reduce,
) -> tuple[list[Generation], list[int]]:
    """(what each rank generates, how many sums each took part in). share_of, around: where faults are planted."""
    barrier, parts, taken = threading.Barrier(ranks, timeout=30), [torch.empty(0)] * ranks, [0] * ranks

    def reduce_of(rank: int) -> Reduce:
        def reduce(y: torch.Tensor) -> None:
            parts[rank] = y.clone()
            barrier.wait()
            total = torch.stack(parts).sum(dim=0)
            barrier.wait()
            y.copy_(total)
            taken[rank] += 1

        return reduce

    made = [Rank(base, Share(share_of(rank), ranks), around(rank, reduce_of(rank))) for rank in range(ranks)]

    def generate(rank: Rank) -> Generation:
        torch.set_num_threads(1)
        return rank.arm(bank_of([rank.of_plan(plan) for plan in plans], base), "eager").generate(batch, **wanted)

    wanted = {"with_logits": batch.beams == 1}
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(generate, made)), taken


def difference(found: Generation, expected: Generation) -> float:
    assert found.logits is not None
    assert expected.logits is not None
    return float((found.logits - expected.logits).norm() / expected.logits.norm())


def plans_of(base: backbone.Backbone, name: str) -> list[AdapterPlan]:
    """Where linears have biases, which DoRA refuses to scale, its tenant has LoRA."""
    own = TENANTS[name]
    if base.linear(0, "q").bias is not None:
        own = [("lora", None) if method == "dora" else (method, options) for method, options in own]
    return [make_plan(base, method, tenant, options) for tenant, (method, options) in enumerate(own)]


@pytest.mark.parametrize("tenants", TENANTS)
@pytest.mark.parametrize(("config", "ranks"), [("biases", 2), ("parts-like-wholes", 2), ("four-heads", 4)])
def test_ranks_generate_what_one_does(config: str, ranks: int, tenants: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(CONFIGS[config], monkeypatch)
    plans = plans_of(base, tenants)
    for beams in (1, 3):
        batch = make_batch(beams)
        expected = StaticArm(base, bank_of(plans, base), "eager").generate(batch, with_logits=beams == 1)
        found, taken = on_ranks(base, plans, batch, ranks)
        assert all(torch.equal(one.tokens, expected.tokens) for one in found)
        assert beams > 1 or difference(found[0], expected) < 1e-5
        assert taken == [REDUCTIONS_OF_A_CALL] * ranks, "no adapter adds a sum"


def test_a_rank_holds_its_part_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(TINY, monkeypatch)
    rank = Rank(base, Share(1, 2), lambda y: None)
    assert rank.part.parameters == backbone_config.parameter_count(TINY, ranks=2) < base.parameters
    (plan,) = (make_plan(base, "lora", 0),)
    numbers = [sum(t.numel() for layer in own for t in layer.tensors()) for own in (plan, rank.of_plan(plan))]
    assert numbers[1] < 0.7 * numbers[0]


def faulty(base: backbone.Backbone, **planted: Any) -> float:
    plans, batch = plans_of(base, "ranks"), make_batch()
    expected = StaticArm(base, bank_of(plans, base), "eager").generate(batch, with_logits=True)
    found = on_ranks(base, plans, batch, **planted)[0][0]
    return difference(found, expected)


def test_a_sum_left_out_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one module, down of the first layer in a decode step, on all ranks."""

    def around(rank: int, reduce: Reduce) -> Reduce:
        calls = iter(range(REDUCTIONS_OF_A_CALL))

        def some(y: torch.Tensor) -> None:
            if next(calls) != 5:
                reduce(y)

        return some

    assert faulty(load(TINY, monkeypatch), around=around) > 1e-3


def test_an_adapter_that_every_rank_adds_after_the_sum_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what each rank has of its inputs, whose sum over ranks is then missing."""
    base = load(TINY, monkeypatch)
    own, waiting = residual_rmsnorm.FORMS["eager"], threading.local()
    monkeypatch.setattr(residual_rmsnorm, "adapt", lambda y, h, expansion, *_: setattr(waiting, "it", (h, expansion)))

    def late(residual: torch.Tensor, y: torch.Tensor, *rest: Any) -> torch.Tensor:
        h, expansion = waiting.it
        if h is not None:
            expand(y, h, expansion)
        return own(residual, y, *rest)

    monkeypatch.setitem(residual_rmsnorm.FORMS, "eager", late)
    batch, plans = make_batch(), plans_of(base, "ranks")
    found = on_ranks(base, plans, batch)[0][0]
    monkeypatch.undo()
    expected = StaticArm(base, bank_of(plans, base), "eager").generate(batch, with_logits=True)
    assert difference(found, expected) > 1e-3


def test_the_part_of_another_rank_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert faulty(load(TINY, monkeypatch), share_of=lambda rank: 0) > 1e-3


def test_what_ranks_do_not_divide_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    base = load(TINY, monkeypatch)
    with pytest.raises(BackboneError, match=r"of-a-test: 4 ranks: expected a divisor of its 2 kv_heads"):
        Rank(base, Share(0, 4), lambda y: None)
    with pytest.raises(AdapterError, match=r"layer 0: gate: .* divide the 86 of each of 2 ranks, got groups of 4"):
        Rank(base, Share(0, 2), lambda y: None).of_plan(make_plan(base, "road", 0))
    with pytest.raises(ValueError, match=r"3 ranks: expected a divisor of its 8 heads"):
        replace(BackboneShape(1, 64, 63, 8, 3, 8, 16, 16)).of_rank(3)

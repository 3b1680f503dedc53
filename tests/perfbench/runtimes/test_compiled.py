"""The decode step through torch.compile: the tokens of the eager one, one compilation for each size of batch.

Inductor takes ten seconds for a step, so that most tests end before it: Dynamo has then made the step one graph, and
AOTAutograd one without writes in place, which torch runs as it stands. Inductor itself compiles the step of a batch
with tenants of every kind; the steps of each method alone are for `-m thorough`.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from perfbench.measure.on_device import counts, repetition
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static import compiled
from perfbench.runtimes.static.arm import StaticArm
from perfbench.spec import backbone_config
from perfbench.verify.on_device.runtimes import make_bank, make_plan

SERVED = [name for name, method in METHODS.items() if method.served_by == "plan"]
TENANTS = ["fanlora", "lora", "para", "road", "ia3", "miss", "vera"]


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    with pytest.MonkeyPatch.context() as patch:
        config = backbone_config.NAMED_CONFIGS["llama-tiny"] | {"num_hidden_layers": 1}
        patch.setitem(backbone_config.NAMED_CONFIGS, "of-a-test", config)
        return backbone.load("of-a-test", "fp32", "cpu", seed=0)


@pytest.fixture
def as_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")


def mixed_bank(base: backbone.Backbone) -> Bank:
    """A tenant of each kind, the ranks of the low-rank ones unlike."""
    plans = [make_plan(base, method, tenant) for tenant, method in enumerate(TENANTS)]
    bank = Bank(union_layout(plans), len(plans), base.dtype, base.device)
    for plan in plans:
        bank.admit(plan)
    return bank


def make_batch(beams: int, *, ragged: bool, slots: tuple[int, ...] = (2, 0, -1, 3)) -> Batch:
    ids = torch.randint(3, 256, (len(slots), 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    if ragged:
        mask[1, :8] = mask[3, :2] = 0
    return Batch(ids * mask, mask, slots, beams, new_tokens=7)


def others(batch: Batch) -> list[Batch]:
    """Batches of its size: with other prompts and tenants, and with one tenant for all."""
    prompts = batch.input_ids.flip(0) * batch.attention_mask
    return [batch, replace(batch, input_ids=prompts, slots=batch.slots[::-1]), replace(batch, slots=(1,) * 4)]


def expect_eager_s_tokens(base: backbone.Backbone, bank: Bank | None, batches: list[Batch]) -> None:
    """... of every batch, and in one compilation."""
    eager, found = StaticArm(base, bank, "eager"), StaticArm(base, bank, "compiled")
    decoder = None
    for batch in batches:
        tokens = found.generate(batch).tokens
        assert torch.equal(tokens, eager.generate(batch).tokens)
        assert decoder in (None, found.decoder), "another decoder was made"
        if decoder is not None:
            with repetition.CompilationWatch() as watch:
                found.generate(batch)
            assert watch.reason is None
        decoder = found.decoder
    assert found.compile_ms is not None
    assert found.compile_ms > 0
    assert eager.compile_ms is None


@pytest.mark.usefixtures("as_a_graph")
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("method", ["none", *SERVED])
def test_the_graph_of_a_step_chooses_eager_s_tokens(base: backbone.Backbone, method: str, beams: int) -> None:
    batch = make_batch(beams, ragged=beams == 1)
    batches = others(batch) if method != "none" else [batch, replace(batch, input_ids=batch.input_ids.flip(0))]
    expect_eager_s_tokens(base, make_bank(base, method), batches)


@pytest.mark.usefixtures("as_a_graph")
@pytest.mark.parametrize("beams", [1, 3])
def test_tenants_of_every_kind_share_a_graph(base: backbone.Backbone, beams: int) -> None:
    expect_eager_s_tokens(base, mixed_bank(base), others(make_batch(beams, ragged=True)))


def test_inductor_s_step_chooses_eager_s_tokens(base: backbone.Backbone) -> None:
    expect_eager_s_tokens(base, mixed_bank(base), others(make_batch(1, ragged=True)))


# Every method in one kind of batch, the kinds taking turns: the graphs of all of them are compared above, and the C++
# that Inductor makes of one takes ten seconds to compile.
KINDS = itertools.cycle([(1, False), (3, True), (1, True), (3, False)])


@pytest.mark.thorough
@pytest.mark.parametrize(("method", "kind"), list(zip(["none", *SERVED], KINDS, strict=False)))
def test_inductor_takes_each_method(base: backbone.Backbone, method: str, kind: tuple[int, bool]) -> None:
    beams, ragged = kind
    batch = make_batch(beams, ragged=ragged)
    expect_eager_s_tokens(base, make_bank(base, method), [batch] if method == "none" else others(batch))


@pytest.mark.usefixtures("as_a_graph")
def test_decoders_of_other_sizes_and_arms_do_not_share_a_step(base: backbone.Backbone) -> None:
    """torch keeps what it compiled with the function, and no guard tells one decoder from another."""
    one, other = make_batch(1, ragged=False), make_batch(1, ragged=False, slots=(0, 1, 2))
    for bank in (None, make_bank(base, "ia3")):
        batches = [one, other, one] if bank else [replace(b, slots=(-1,) * len(b.slots)) for b in (one, other, one)]
        eager, found = StaticArm(base, bank, "eager"), StaticArm(base, bank, "compiled")
        for batch in batches:
            assert torch.equal(found.generate(batch).tokens, eager.generate(batch).tokens)


@pytest.mark.usefixtures("as_a_graph")
def test_another_size_inside_the_window_voids_the_sample(base: backbone.Backbone) -> None:
    arm, device = StaticArm(base, None, "compiled"), torch.device("cpu")
    batch = make_batch(1, ragged=False, slots=(-1,) * 4)
    assert repetition.repetition(arm, batch, device, None).sample["void"] is not None
    assert repetition.repetition(arm, batch, device, None).sample["void"] is None
    longer = replace(batch, new_tokens=8)
    void = repetition.repetition(arm, longer, device, None).sample["void"]
    assert void == "1 compilation(s) inside the window: torch.compile"


@pytest.mark.usefixtures("as_a_graph")
def test_operations_are_counted_of_the_step_as_it_is_before(base: backbone.Backbone) -> None:
    batch = make_batch(1, ragged=False)
    bank, device = make_bank(base, "lora"), torch.device("cpu")
    arms = (StaticArm(base, bank, kernels) for kernels in ("eager", "compiled"))
    eager, found = (counts.decode_step(arm, batch, device) for arm in arms)
    # The step of one size for all attends to places that are not there yet.
    assert (found["flops_per_decode_step"] or 0) >= (eager["flops_per_decode_step"] or 0) > 0
    assert found["aten_ops_per_decode_step"]

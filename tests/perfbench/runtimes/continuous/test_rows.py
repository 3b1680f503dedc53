"""Runtime continuous on a whole batch, against runtime transformers; and what a row leaves behind."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.runtimes.continuous.arm import ContinuousArm
from perfbench.runtimes.continuous.rows import Rows
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.verify.on_device.runtimes import make_bank, make_plan
from tests.perfbench.runtimes.test_static import FAMILIES, TINY, load, make_batch

METHOD_NAMES = ["none", *(name for name, method in METHODS.items() if method.served_by == "plan" and name != "none")]


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def agree(base: backbone.Backbone, bank: Bank | None, batch: Batch) -> None:
    """The same tokens as transformers', and logits that differ by rounding."""
    plain, continuous = PlanArm(base, bank, "eager"), ContinuousArm(base, bank, "eager")
    tokens = plain.generate(batch).tokens
    assert torch.equal(continuous.generate(batch).tokens, tokens)
    expected, found = (arm.generate(batch, forced=tokens, with_logits=True).logits for arm in (plain, continuous))
    assert expected is not None
    assert found is not None
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


@pytest.mark.parametrize("ragged", [True, False], ids=["ragged", "even"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_what_transformers_does(
    family: str, ragged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = load(FAMILIES[family], "fp32", monkeypatch)
    for method in ("none", "lora", "para"):
        agree(base, make_bank(base, method), make_batch(1, ragged=ragged))


@pytest.mark.parametrize("method", METHOD_NAMES)
def test_every_method_generates_what_transformers_does(method: str, base: backbone.Backbone) -> None:
    agree(base, make_bank(base, method), make_batch(1))


def test_tenants_of_all_methods_share_a_batch(base: backbone.Backbone) -> None:
    plans = [make_plan(base, method, tenant) for tenant, method in enumerate(METHOD_NAMES[1:])]
    bank = Bank(union_layout(plans), len(plans), base.dtype, base.device, base.linear)
    for plan in plans:
        bank.admit(plan)
    batch = make_batch(1)
    last = len(plans) - 1
    for slots in ((-1, 0, 1, 2, 3), (last, last - 1, -1, last - 2, last)):
        agree(base, bank, replace(batch, slots=slots))


def test_an_answer_ends_where_its_end_of_sequence_is(base: backbone.Backbone) -> None:
    bank, batch = make_bank(base, "lora"), make_batch(1)
    static = StaticArm(base, bank, "eager")
    ending = int(static.generate(batch).tokens[0, 3])
    batch = replace(batch, eos=(ending,))
    assert torch.equal(ContinuousArm(base, bank, "eager").generate(batch).tokens, static.generate(batch).tokens)


@pytest.mark.interpreter
@pytest.mark.parametrize("method", ["none", "lora", "ia3", "para"])
def test_triton_s_kernels_generate_what_plain_torch_does(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not there for this platform")
    base = load(TINY | {"num_hidden_layers": 1}, "fp32", monkeypatch)
    ids = torch.randint(3, 256, (3, 3), generator=torch.Generator().manual_seed(4))
    mask = torch.tensor([[1, 1, 1], [0, 1, 1], [1, 1, 1]])
    batch, bank = Batch(ids * mask, mask, (2, -1, 1), 1, new_tokens=3), make_bank(base, method)
    eager, triton = (ContinuousArm(base, bank, kernels) for kernels in ("eager", "triton"))
    tokens = eager.generate(batch).tokens
    expected, found = (arm.generate(batch, forced=tokens, with_logits=True).logits for arm in (eager, triton))
    assert expected is not None
    assert found is not None
    assert float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max()) < 1e-5


def answer(rows: Rows, ids: torch.Tensor, slot: int, count: int) -> list[int]:
    """What the only request in `rows` gets."""
    rows.lengths.clear()
    tokens = [int(rows.read(rows.enter(slot), ids).argmax())]
    while len(tokens) < count:
        tokens.append(int(rows.step(torch.tensor(tokens[-1:])).argmax()))
    return tokens


def test_what_a_broken_adapter_leaves_in_a_row_harms_nobody(base: backbone.Backbone) -> None:
    """NaN in the cache stays NaN where it is read with the weight 0, unless it is cleared."""
    bank = make_bank(base, "lora")
    assert bank is not None
    ids = torch.arange(5, 11)
    with torch.inference_mode():
        expected = answer(Rows(base, bank, "eager", 2, 16), ids, 1, 4)
        bank.rest[3].fill_(float("nan"))
        rows = Rows(base, bank, "eager", 2, 16)
        answer(rows, torch.arange(20, 32), 3, 4)
        assert rows.cache.prompt[-1].isnan().any()
        rows.lengths.clear()
        longer = rows.read(rows.enter(2), torch.arange(40, 50))
        rows.read(rows.enter(1), ids)
        assert not rows.step(torch.tensor([int(longer.argmax()), expected[0]])).isnan().any()
        assert answer(rows, ids, 1, 4) == expected


def test_two_sets_of_rows_may_take_turns_in_one_cache(base: backbone.Backbone) -> None:
    bank, ids = make_bank(base, "lora"), torch.arange(5, 11)
    with torch.inference_mode():
        one, other = (Rows(base, bank, "eager", 2, 16) for _ in range(2))
        assert one.cache is other.cache
        expected = answer(one, ids, 1, 4)
        answer(other, torch.arange(20, 32), 3, 4)
        assert answer(one, ids, 1, 4) == expected
        answer(other, ids, 2, 2)
        with pytest.raises(RuntimeError, match="somebody else has used the cache"):
            one.enter(0)


def test_rows_and_places_run_out(base: backbone.Backbone) -> None:
    rows = Rows(base, None, "eager", 1, 4)
    with torch.inference_mode():
        row = rows.enter(-1)
        with pytest.raises(ValueError, match="all 1 rows are in use"):
            rows.enter(-1)
        with pytest.raises(ValueError, match="row 0: 5 tokens, more than the 4"):
            rows.read(row, torch.arange(5))


def test_beams_are_refused(base: backbone.Backbone) -> None:
    with pytest.raises(ValueError, match="expected 1 beam, got 2"):
        ContinuousArm(base, None, "eager").generate(make_batch(2))


def test_rows_without_adapters_compute_none(base: backbone.Backbone) -> None:
    """In their steps; what they give is that of a cache without a bank until a row has an adapter, and after it."""
    served, plain = Rows(base, make_bank(base, "lora"), "eager", 3, 16), Rows(base, None, "eager", 3, 16)
    prompts = torch.randint(3, base.shape.vocab, (3, 5), generator=torch.Generator().manual_seed(0))

    def logits(rows: Rows, slots: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            rows.lengths.clear()
            for slot, prompt in zip(slots, prompts, strict=False):
                rows.read(rows.enter(slot), prompt)
            return rows.step(prompts[: len(slots), 0])

    torch.testing.assert_close(logits(served, (-1, -1)), logits(plain, (-1, -1)))
    assert set(served._steps) == {(2, True)}
    mixed = logits(served, (-1, 1))
    assert set(served._steps) == {(2, True), (2, False)}
    alone = logits(plain, (-1, -1))
    assert not torch.allclose(mixed[1], alone[1]), "the tenant's adapter acts"
    torch.testing.assert_close(mixed[0], alone[0])
    with torch.inference_mode():
        served.move(1, 0)  # the tenant's row takes the other's place
        served.lengths.pop()
        moved = served.step(prompts[:1, 0])
    assert set(served._steps) == {(2, True), (2, False), (1, False)}
    assert not torch.allclose(moved[0], alone[0])
    torch.testing.assert_close(logits(served, (-1, -1)), alone)


def test_a_row_without_an_adapter_has_nothing_of_the_last_one_s(base: backbone.Backbone) -> None:
    """Vectors that PARA has made of a prompt stay in the row, where a step with other tenants would find them."""
    served, plain = Rows(base, make_bank(base, "para"), "eager", 2, 16), Rows(base, None, "eager", 2, 16)
    prompts = torch.randint(3, base.shape.vocab, (2, 5), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for slots in ((1, 0), (-1, 0)):
            served.lengths.clear()
            for slot, prompt in zip(slots, prompts, strict=True):
                served.read(served.enter(slot), prompt)
        for prompt in prompts:
            plain.read(plain.enter(-1), prompt)
        found, expected = served.step(prompts[:, 0]), plain.step(prompts[:, 0])
    assert not torch.allclose(found[1], expected[1]), "the tenant's vectors act"
    torch.testing.assert_close(found[0], expected[0])

"""The scheduler: whatever joins and leaves, a request gets what it gets alone; and each way to break that is seen."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch

from perfbench.errors import AdapterError
from perfbench.methods.bank import Bank, union_layout
from perfbench.runtimes import backbone
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.residency import Residency, Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.traffic import NOBODY
from perfbench.verify.on_device.runtimes import make_plan

# Eight tenants, two of each method, in one bank.
METHODS = ("lora", "para", "ia3", "fanlora")
TENANTS = 8
SLOTS = 3
CAPACITY = 24


class Known(NamedTuple):
    """A request and what it gets alone, from runtime transformers."""

    prompt: torch.Tensor
    tenant: int
    tokens: list[int]


class Served(NamedTuple):
    base: backbone.Backbone
    plans: list[Any]
    pool: list[Known]


@pytest.fixture(scope="module")
def served() -> Served:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    plans = [make_plan(base, METHODS[tenant % 4], tenant) for tenant in range(TENANTS)]
    bank = Bank(union_layout(plans), TENANTS, base.dtype, base.device, base.linear)
    for plan in plans:
        bank.admit(plan)
    alone, draw, pool = PlanArm(base, bank, "eager"), random.Random(0), []
    for number in range(24):
        length, new_tokens = draw.randint(1, 16), draw.randint(1, 9)
        prompt = torch.randint(3, 256, (length,), generator=torch.Generator().manual_seed(number))
        tenant = number % (TENANTS + 1) - 1
        batch = Batch(prompt[None], torch.ones_like(prompt)[None], (tenant,), 1, max(2, new_tokens))
        pool.append(Known(prompt, tenant, alone.generate(batch).tokens[0, :new_tokens].tolist()))
    return Served(base, plans, pool)


def make_engine(served: Served, rows: int = 4, chunk: int | None = None) -> Engine:
    bank = Bank(union_layout(served.plans), SLOTS, served.base.dtype, served.base.device, served.base.linear)
    residency = Residency(bank, Store(bank, served.plans.__getitem__))
    return Engine(Rows(served.base, bank, "eager", rows, CAPACITY), residency, chunk)


def play(engine: Engine, pool: list[Known], seed: int) -> int:
    """A random schedule of eight requests; how many of them got other tokens than alone."""
    draw = random.Random(seed)
    todo, sent = draw.choices(pool, k=8), []
    while todo or not engine.idle:
        while todo and draw.random() < 0.5:
            known = todo.pop()
            request = Request(known.prompt, len(known.tokens), known.tenant)
            engine.submit(request)
            sent.append((request, known))
        for request in engine.turn():
            assert request.tokens
    return sum(request.tokens != known.tokens for request, known in sent)


def schedules(served: Served, count: int) -> int:
    """Wrong answers in `count` random schedules, with pieces of all kinds."""
    engines = [make_engine(served, rows, chunk) for rows, chunk in ((1, None), (2, 1), (4, None), (4, 3), (5, 16))]
    return sum(play(engines[seed % len(engines)], served.pool, seed) for seed in range(count))


def test_a_request_gets_what_it_gets_alone(served: Served) -> None:
    assert schedules(served, 100) == 0


@pytest.mark.thorough
def test_a_request_gets_what_it_gets_alone_in_a_thousand_schedules(served: Served) -> None:
    assert schedules(served, 1000) == 0


def _in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.of
    monkeypatch.setattr(Store, "of", lambda self, tenant: replace(real(self, tenant), whole=False))


def not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slot is found, and what lies there stays."""
    real = Residency.take

    def take(self: Residency, tenant: int) -> tuple[int, bool]:
        before = self.bank.rest.clone(), self.bank.shrinks.clone()
        full = len(self.slots) == self.bank.capacity
        found = real(self, tenant)
        if full:
            self.bank.rest.copy_(before[0])
            self.bank.shrinks.copy_(before[1])
        return found

    monkeypatch.setattr(Residency, "take", take)


def _moved_without_its_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perfbench.runtimes.continuous.row_adapters.RowAdapters.move", lambda self, source, to: None)


def _moved_without_its_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def move(self: Rows, source: int, to: int) -> None:
        if source != to and self.adapters is not None:
            self.adapters.move(source, to)
            self.lengths[to] = self.lengths[source]

    monkeypatch.setattr(Rows, "move", move)


def _next_tenant(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.of
    monkeypatch.setattr(Store, "of", lambda self, tenant: real(self, (tenant + 1) % TENANTS))


def _no_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rows.enter
    monkeypatch.setattr(Rows, "enter", lambda self, slot: real(self, -1))


def _one_place_too_early(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rows.step

    def step(self: Rows, tokens: torch.Tensor) -> torch.Tensor:
        self.lengths[0] -= 1
        found = real(self, tokens)
        self.lengths[0] += 1
        return found

    monkeypatch.setattr(Rows, "step", step)


@pytest.mark.parametrize(
    "fault",
    [
        _in_pieces, not_loaded, _moved_without_its_adapter, _moved_without_its_cache, _next_tenant, _no_adapter,
        _one_place_too_early,
    ],
)  # fmt: skip
def test_a_planted_fault_is_seen(
    fault: Callable[[pytest.MonkeyPatch], None], served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    assert schedules(served, 10) > 0


def test_a_long_prompt_is_read_beside_the_others_steps(served: Served) -> None:
    engine = make_engine(served, chunk=3)
    short, long = (known for known in served.pool if known.tenant == NOBODY), torch.arange(5, 17)
    known = max(short, key=lambda one: len(one.tokens))
    first, second = Request(known.prompt, len(known.tokens)), Request(long, 2)
    engine.submit(first)
    while not first.tokens:
        engine.turn()
    engine.submit(second)
    got = len(first.tokens)
    for turn in range(1, 4):
        engine.turn()
        assert (len(first.tokens), second.tokens) == (got + turn, [])
    engine.turn()
    assert second.tokens


def test_an_end_of_sequence_ends_a_request(served: Served) -> None:
    known = next(known for known in served.pool if len(set(known.tokens)) > 3)
    ending = known.tokens[2]
    request = Request(known.prompt, len(known.tokens), known.tenant, frozenset({ending}))
    engine = make_engine(served)
    engine.submit(request)
    while not engine.idle:
        engine.turn()
    assert request.tokens == known.tokens[: known.tokens.index(ending) + 1]


def test_what_no_row_can_hold_is_refused(served: Served) -> None:
    engine = make_engine(served)
    with pytest.raises(ValueError, match="a request of 25 tokens, where a row holds 24"):
        engine.submit(Request(torch.arange(20), 6))
    bare = Engine(Rows(served.base, None, "eager", 2, CAPACITY), None)
    with pytest.raises(ValueError, match="tenant 3, where there are no adapters"):
        bare.submit(Request(torch.arange(4), 2, 3))


def test_the_adapter_that_was_used_longest_ago_goes(served: Served) -> None:
    bank = Bank(union_layout(served.plans), 2, served.base.dtype, served.base.device, served.base.linear)
    residency = Residency(bank, Store(bank, served.plans.__getitem__))
    assert (residency.take(0), residency.take(1)) == ((0, True), (1, True))
    assert residency.take(0) == (0, False)
    assert residency.take(2) == (1, True)  # tenant 1's, though 0 was there longer
    assert list(residency.slots) == [0, 2]
    assert residency.loaded_bytes == 3 * bank.bytes_per_slot


def test_an_adapter_that_can_t_be_had_changes_nothing(served: Served) -> None:
    def plan_of(tenant: int) -> Any:
        if tenant == 5:
            raise AdapterError("it is damaged")
        return served.plans[tenant]

    bank = Bank(union_layout(served.plans), 2, served.base.dtype, served.base.device, served.base.linear)
    residency = Residency(bank, Store(bank, plan_of))
    residency.take(0)
    residency.take(1)
    with pytest.raises(AdapterError, match="it is damaged"):
        residency.take(5)
    assert residency.slots == {0: 0, 1: 1}
    assert residency.take(1) == (1, False)


def test_the_store_lets_go_of_whom_nobody_asks_for(served: Served) -> None:
    made: list[int] = []
    bank = Bank(union_layout(served.plans), 2, served.base.dtype, served.base.device, served.base.linear)
    store = Store(bank, lambda tenant: made.append(tenant) or served.plans[tenant])  # type: ignore[func-returns-value]
    store.keep({1, 2})
    store.keep({2, 3})
    store.of(2)
    store.of(1)
    assert made == [1, 2, 3, 1]


def test_what_nobody_wants_any_longer_leaves_and_the_others_get_what_they_get_alone(served: Served) -> None:
    """Wherever it is: among those that wait, being read in pieces, or between two decode steps."""
    for seed in range(30):
        draw, engine = random.Random(seed), make_engine(served, rows=3, chunk=2)
        sent = [
            (Request(known.prompt, len(known.tokens), known.tenant), known) for known in draw.sample(served.pool, 7)
        ]
        for request, _ in sent:
            engine.submit(request)
        unwanted = [request for request, _ in draw.sample(sent, 3)]
        left = list(unwanted)
        while not engine.idle:
            engine.turn()
            if left and draw.random() < 0.4:
                engine.cancel(left.pop())
        assert not engine.rows.lengths
        assert all(request.tokens == known.tokens for request, known in sent if request not in unwanted)
        engine.cancel(unwanted[0])  # it has left long ago


def test_a_cancelled_request_whose_row_is_not_given_back_is_seen(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Rows, "move", lambda self, source, to: None)
    with pytest.raises((AssertionError, ValueError)):
        test_what_nobody_wants_any_longer_leaves_and_the_others_get_what_they_get_alone(served)

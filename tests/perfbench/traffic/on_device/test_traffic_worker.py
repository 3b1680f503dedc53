"""The child's work in this process: what is measured is proved, and each fault in the real path is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from perfbench.machine import environment
from perfbench.runtimes.continuous.engine import Request
from perfbench.runtimes.continuous.residency import Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.spec import cases
from perfbench.spec.traffic import NOBODY, load
from perfbench.traffic.on_device import traffic_worker
from perfbench.traffic.on_device.traffic_worker import PROVED, Worker, sample
from perfbench.traffic.outcome import Answered
from perfbench.traffic.requests import draw
from tests.perfbench.runtimes.continuous.test_engine import not_loaded

TENANTS = 9
SCENARIO = load(
    {
        "backbone": "llama-tiny",
        "dtype": "fp32",
        "methods": ["lora", "para"],
        "traffic": {
            "prompt_tokens": {"median": 12, "sigma": 0.5, "most": 24},
            "new_tokens": {"median": 6, "sigma": 0.5, "most": 9},
            "tenants": TENANTS, "rate": 1000, "requests": 60, "without_adapter": 0.1,
        },
        "server": {"rows": 4, "resident": 3, "chunk_tokens": 5},
        "targets": {"ttft_ms": 1e6, "itl_ms": 1e6},
    },
    [],
    lambda _: ("cpu", ""),
)  # fmt: skip


class Told(list[dict[str, Any]]):
    """What a worker says."""

    def __call__(self, event: str, **fields: Any) -> None:
        self.append({"event": event, **fields})


def opened() -> tuple[Worker, Told]:
    told = Told()
    job = {
        "comparison": cases.to_json(SCENARIO.comparison), "seed": 0, "threads": environment.threads(), "plugins": [],
        "rows": 4, "resident": 3, "capacity": SCENARIO.server.capacity(SCENARIO.traffic), "chunk": 5,
    }  # fmt: skip
    return Worker(job, told), told


def measure(worker: Worker, arm: str, told: Told, misses: int | None = None, ttft_ms: float = 1e6) -> dict[str, Any]:
    due = draw(SCENARIO.traffic, TENANTS, 1000.0, "0")
    if arm not in worker.arms:
        worker.prepare({"arm": arm, "tenants": TENANTS})
    worker.measure({
        "arm": arm, "due": [[one.due_s, one.tenant, one.prompt_tokens, one.new_tokens] for one in due], "seed": 0,
        "targets": {"ttft_ms": ttft_ms, "itl_ms": 1e6, "share": 1.0}, "misses": misses, "text": "measuring",
        "in_flight": 0,
    })  # fmt: skip
    return told[-1]


def proof(worker: Worker, arm: str, told: Told) -> dict[str, Any]:
    worker.prove({"arm": arm})
    found: dict[str, Any] = told[-1]["proof"]
    return found


@pytest.mark.parametrize("arm", ["none", "lora", "para"])
def test_what_is_measured_is_proved(arm: str) -> None:
    worker, told = opened()
    found = measure(worker, arm, told)
    due = draw(SCENARIO.traffic, TENANTS, 1000.0, "0")
    answered = [Answered.of(one) for one in found["answered"]]
    assert [len(one.itl_ms) + 1 for one in answered] == [one.new_tokens for one in due]
    assert all(0 <= one.wait_ms <= one.ttft_ms <= one.total_ms for one in answered)
    assert (found["given_up"], found["sent"]) == (False, 60)
    if arm == "none":
        assert not any(one.loaded for one in answered)
        assert found["loaded_bytes"] == 0
    else:
        loads, residency = sum(one.loaded for one in answered), worker.arms[arm].answering.residency
        assert residency is not None
        assert TENANTS < loads < 60  # more tenants than slots: some came back
        assert found["loaded_bytes"] == loads * residency.bank.bytes_per_slot
    assert {one.tenant for one in answered} == {one.tenant for one in due}  # of the bare backbone too
    shown = proof(worker, arm, told)
    assert (shown["status"], shown["reason"], shown["requests"]) == ("ok", None, PROVED)
    adapted = sum(request.tenant != NOBODY for request in sample(worker.arms[arm].answers, 0))
    assert shown["adapted"] == adapted
    assert shown["control_parted"] >= 0.8 * adapted


def test_adapters_stay_from_one_measurement_to_the_next() -> None:
    worker, told = opened()
    first = sum(one["loaded"] for one in measure(worker, "lora", told)["answered"])
    residency = worker.arms["lora"].answering.residency
    assert residency is not None
    last = list(residency.slots)
    again = measure(worker, "lora", told)
    assert sum(one["loaded"] for one in again["answered"]) == pytest.approx(first, abs=3)
    assert not next(one for one in again["answered"] if one["tenant"] in last)["loaded"]


def test_answers_without_any_adapter_prove_nothing_of_an_arm_that_has_some() -> None:
    worker, told = opened()
    measure(worker, "lora", told)
    worker.arms["lora"].answers = [one for one in worker.arms["lora"].answers if one.tenant == NOBODY]
    shown = proof(worker, "lora", told)
    assert (shown["status"], shown["adapted"]) == ("check_void", 0)


def _the_next_tenant_s(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Store.of
    monkeypatch.setattr(Store, "of", lambda self, tenant: real(self, (tenant + 1) % TENANTS))


def _none_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rows.enter
    monkeypatch.setattr(Rows, "enter", lambda self, slot: real(self, -1))


def _one_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Rows.enter
    monkeypatch.setattr(Rows, "enter", lambda self, slot: real(self, max(slot, 0)))


def _a_prefix_shared_across_tenants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values of the first tokens of a prompt are those that the first tenant's adapter gave."""
    real = Rows.read

    def read(self: Rows, row: int, ids: torch.Tensor) -> torch.Tensor:
        first = not self.lengths[row]
        found = real(self, row, ids)
        if first and len(ids) > 1:
            kept = self.__dict__.setdefault("prefix", [entry[row, :, :, :1].clone() for entry in self.cache.prompt])
            for entry, prefix in zip(self.cache.prompt, kept, strict=True):
                entry[row, :, :, :1] = prefix
        return found

    monkeypatch.setattr(Rows, "read", read)


@pytest.mark.parametrize(
    "fault", [_the_next_tenant_s, _none_applied, _one_for_nobody, not_loaded, _a_prefix_shared_across_tenants]
)
def test_a_planted_fault_is_found(fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch) -> None:
    fault(monkeypatch)
    worker, told = opened()
    measure(worker, "lora", told)
    shown = proof(worker, "lora", told)
    assert shown["status"] == "check_failed"
    assert "are not those of their adapters" in shown["reason"]


def test_adapters_that_are_alike_prove_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    real = traffic_worker.arms.plan_of_tenant
    monkeypatch.setattr(
        traffic_worker.arms, "plan_of_tenant", lambda case, base, resident, seed, tenant: real(case, base, 1, seed, 0)
    )
    worker, told = opened()
    measure(worker, "lora", told)
    assert proof(worker, "lora", told)["status"] == "check_void"


def test_a_measurement_that_can_t_hold_is_given_up_and_the_next_is_right() -> None:
    worker, told = opened()
    found = measure(worker, "lora", told, misses=0, ttft_ms=1e-6)
    assert (found["given_up"], found["answered"]) == (True, None)
    assert found["sent"] < 60
    assert measure(worker, "lora", told)["given_up"] is False
    assert proof(worker, "lora", told)["status"] == "ok"


def test_half_of_what_is_proved_had_its_adapter_loaded() -> None:
    answers = [Request(torch.arange(2), 1, tenant=i % 24, loaded=i % 3 == 0) for i in range(160)]
    found = sample(answers, 0)
    assert len({request.tenant for request in found}) == len(found) == PROVED
    assert sum(request.loaded for request in found) >= PROVED // 2
    few = sample(answers[:4], 0)
    assert set(few) == set(answers[:4])
    one_tenant = [Request(torch.arange(2), 1, tenant=3) for _ in range(40)]
    assert len(set(sample(one_tenant, 0))) == PROVED

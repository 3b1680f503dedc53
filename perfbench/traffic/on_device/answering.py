"""Who answers the requests of a measurement: our engine in this process, or a server over HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch

from perfbench.measure.on_device import arms
from perfbench.methods.bank import Bank, union_layout
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.residency import Residency, Store
from perfbench.runtimes.continuous.rows import Rows
from perfbench.spec.cases import Case
from perfbench.spec.traffic import NOBODY
from perfbench.traffic.on_device import load
from perfbench.traffic.requests import Due


@dataclass(frozen=True)
class Driven:
    """What a measurement gave. requests: those that were sent, with what they got; due: when each of them was, which in
    a closed loop is known afterwards; start: when the first moment was, by the clock of their times; lag_ms: how late
    each was sent; failures: place of a request -> why it failed; the last two only over HTTP. loaded_bytes: of
    adapters, None where nobody can say."""

    requests: list[Request]
    due: list[Due]
    start: float
    given_up: bool
    loaded_bytes: int | None = None
    lag_ms: list[float] | None = None
    failures: dict[int, str] = field(default_factory=dict)


class Answering(Protocol):
    """One arm."""

    def sizes(self) -> dict[str, int | None]:
        """Bytes that the arm takes, None where nobody can say."""

    def drive(self, due: list[Due], texts: Sequence[torch.Tensor], limit: load.Limit | None, in_flight: int) -> Driven:
        """Sends the requests when they are due, or so that always `in_flight` of them are open where that is not 0, and
        waits for the answers."""


class OnEngine:
    """Our engine in this process, over rows and adapters that stay from one measurement to the next."""

    def __init__(self, case: Case, backbone: Backbone, plan_of: Any, tenants: int, server: dict[str, Any]):
        """plan_of: tenant -> its adapter; tenants: how many have adapters in folders; server: its `rows`, `resident`,
        `capacity` and `chunk`."""
        bank, self.residency = None, None
        if case.method != "none":
            if getattr(case.options, "adapters", None) is not None:
                layouts = [plan_of(tenant) for tenant in range(tenants)]
            else:
                layouts = arms.random_layouts(case, backbone.shape)
            bank = Bank(union_layout(layouts), server["resident"], backbone.dtype, backbone.device, backbone.linear)
            self.residency = Residency(bank, Store(bank, plan_of))
        self.rows = Rows(backbone, bank, case.kernels, server["rows"], server["capacity"])
        self._chunk = server["chunk"]

    def engine(self) -> Engine:
        """A new one, without requests."""
        return Engine(self.rows, self.residency, self._chunk)

    def sizes(self) -> dict[str, int | None]:
        """As `Answering` has them."""
        rows, bank = self.rows, None if self.residency is None else self.residency.bank
        return {
            "bytes_per_tenant": 0 if bank is None else bank.bytes_per_slot,
            "bank_bytes": 0 if bank is None else sum(t.nbytes for t in bank.tensors()),
            "rows_bytes": 0 if rows.adapters is None else sum(t.nbytes for t in rows.adapters.tensors()),
            "cache_bytes": sum(t.nbytes for t in rows.cache.tensors()),
        }

    def drive(self, due: list[Due], texts: Sequence[torch.Tensor], limit: load.Limit | None, in_flight: int) -> Driven:
        """As `Answering` says."""
        before, asked = 0, list(due)
        if self.residency is None:  # the bare backbone serves the same requests of the same tenants
            asked = [replace(one, tenant=NOBODY) for one in due]
        else:
            self.residency.store.keep({one.tenant for one in due} - {NOBODY})
            before = self.residency.loaded_bytes
        requests, start, given_up = load.drive(self.engine(), asked, texts, limit, in_flight)
        due = [replace(one, due_s=sent.due_s) for one, sent in zip(due, asked, strict=True)]
        loaded = 0 if self.residency is None else self.residency.loaded_bytes - before
        return Driven(requests, due, start, given_up, loaded)

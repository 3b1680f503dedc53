"""More tenants than the bank has slots: adapters wait on the host, and the one that was used longest ago makes room.

A row has a copy of its adapter, so that a request in flight needs its slot no longer once it has begun.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

import torch

from perfbench.errors import AdapterError
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan

NOT_INVOKED = "runtime continuous serves no adapter that tokens of the prompt invoke; choose static or transformers"


@dataclass(frozen=True)
class Stored:
    """One tenant's adapter on the host, laid out as a slot of the bank: loading it is two copies. whole: its scales
    come from the prompt's last token, so that a prompt is to be read in one piece."""

    shrinks: torch.Tensor
    rest: torch.Tensor
    whole: bool


class Store:
    """The adapters of tenants on the host, in the dtype of `bank`, each made when it is first asked for."""

    def __init__(self, bank: Bank, plan_of: Callable[[int], AdapterPlan]):
        """plan_of: tenant -> its adapter."""
        self._bank, self._plan_of = bank, plan_of
        self._pinned = bank.rest.device.type == "cuda"
        self._table = Bank(bank.layout, 1, bank.rest.dtype, "cpu", bank.linear_of)
        self._stored: dict[int, Stored] = {}

    def of(self, tenant: int) -> Stored:
        """The adapter of a tenant. AdapterError where it does not fit the bank."""
        if tenant not in self._stored:
            plan = self._plan_of(tenant)
            if any(layer.invocation for layer in plan):
                raise AdapterError(NOT_INVOKED)
            self._bank.share(plan)
            slot = self._table.admit(plan)
            shrinks, rest = (part[slot].clone() for part in (self._table.shrinks, self._table.rest))
            self._table.evict(slot)
            if self._pinned:
                shrinks, rest = shrinks.pin_memory(), rest.pin_memory()
            self._stored[tenant] = Stored(shrinks, rest, any(layer.generator is not None for layer in plan))
        return self._stored[tenant]

    def keep(self, tenants: Collection[int]) -> None:
        """Makes the adapters of these tenants, and lets all others go: thousands of them may not fit the host."""
        self._stored = {tenant: own for tenant, own in self._stored.items() if tenant in tenants}
        for tenant in sorted(tenants):
            self.of(tenant)


@dataclass
class Residency:
    """Which tenant's adapter lies in which slot of a bank. loaded_bytes: brought from the host so far."""

    bank: Bank
    store: Store
    loaded_bytes: int = 0
    slots: OrderedDict[int, int] = field(default_factory=OrderedDict)  # tenant -> slot, the last used at the end

    def take(self, tenant: int) -> tuple[int, bool]:
        """(the slot of the tenant's adapter, whether it had to be loaded). AdapterError where it can't be had; then
        nothing has changed."""
        loaded = tenant not in self.slots
        if loaded:
            stored = self.store.of(tenant)
            full = len(self.slots) == self.bank.capacity
            slot = self.slots.popitem(last=False)[1] if full else len(self.slots)
            self.bank.shrinks[slot].copy_(stored.shrinks, non_blocking=True)
            self.bank.rest[slot].copy_(stored.rest, non_blocking=True)
            self.loaded_bytes += self.bank.bytes_per_slot
            self.slots[tenant] = slot
        self.slots.move_to_end(tenant)
        return self.slots[tenant], loaded

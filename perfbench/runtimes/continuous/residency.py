"""More tenants than the bank has slots: adapters wait on the host, and the one that was used longest ago makes room."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan


@dataclass(frozen=True)
class Stored:
    """One tenant's adapter on the host, laid out as a slot of the bank: loading it is two copies. whole: its scales
    come from the prompt's last token, so that a prompt is to be read in one piece."""

    shrinks: torch.Tensor
    rest: torch.Tensor
    whole: bool


class Store:
    """The adapters of all tenants on the host, in the dtype of `bank`, each made when it is first asked for."""

    def __init__(self, bank: Bank, plan_of: Callable[[int], AdapterPlan]):
        """plan_of: tenant -> its adapter."""
        self._bank, self._plan_of = bank, plan_of
        self._pinned = bank.rest.device.type == "cuda"
        self._table = Bank(bank.layout, 1, bank.rest.dtype, "cpu")
        self._stored: dict[int, Stored] = {}

    def of(self, tenant: int) -> Stored:
        """The adapter of a tenant. AdapterError where it does not fit the bank."""
        if tenant not in self._stored:
            plan = self._plan_of(tenant)
            self._bank.share(plan)
            slot = self._table.admit(plan)
            shrinks, rest = (part[slot].clone() for part in (self._table.shrinks, self._table.rest))
            self._table.evict(slot)
            if self._pinned:
                shrinks, rest = shrinks.pin_memory(), rest.pin_memory()
            self._stored[tenant] = Stored(shrinks, rest, any(layer.generator is not None for layer in plan))
        return self._stored[tenant]


@dataclass
class Loads:
    """What the requests so far have cost: how many found their adapter resident, how many had it loaded, and how many
    bytes that were."""

    hits: int = 0
    loads: int = 0
    loaded_bytes: int = 0


@dataclass
class Residency:
    """Which tenant's adapter lies in which slot of a bank. One that a request in flight uses never goes."""

    bank: Bank
    store: Store
    counted: Loads = field(default_factory=Loads)
    slots: OrderedDict[int, int] = field(default_factory=OrderedDict)  # tenant -> slot, the last used at the end
    users: dict[int, int] = field(default_factory=dict)  # tenant -> requests in flight

    def take(self, tenant: int) -> int | None:
        """The slot of the tenant's adapter, loaded where it has to be, held until `give_back`. None where every slot is
        held by others."""
        slot = self.slots.get(tenant)
        if slot is None:
            slot = self._free_slot()
            if slot is None:
                return None
            stored = self.store.of(tenant)
            self.bank.shrinks[slot].copy_(stored.shrinks, non_blocking=True)
            self.bank.rest[slot].copy_(stored.rest, non_blocking=True)
            self.counted.loads += 1
            self.counted.loaded_bytes += self.bank.bytes_per_slot
        else:
            self.counted.hits += 1
        self.slots[tenant] = slot
        self.slots.move_to_end(tenant)
        self.users[tenant] = self.users.get(tenant, 0) + 1
        return slot

    def give_back(self, tenant: int) -> None:
        """A request that `take` was called for has ended."""
        self.users[tenant] -= 1
        if not self.users[tenant]:
            del self.users[tenant]

    def _free_slot(self) -> int | None:
        if len(self.slots) < self.bank.capacity:
            return len(self.slots)
        idle = next((tenant for tenant in self.slots if tenant not in self.users), None)
        return None if idle is None else self.slots.pop(idle)

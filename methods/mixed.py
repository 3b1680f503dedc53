"""Tenants of several methods in one batch: the first tenant has an adapter of the first method, the next one of the
second, and so on, again from the start.

One bank holds them all, in the smallest layout that has room for every method's plan. An operation that some tenant has
is done for every row, with zeros for those that lack it: a mixed batch costs more than the batches of its methods do.
Each adapter is made, read and written by its own method's file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from perfbench.errors import nearest
from perfbench.methods.registry import METHODS


@dataclass(frozen=True)
class MixedOptions:
    """`of`: the methods that take turns, each with its default options."""

    of: tuple[str, ...] = field(
        default=("lora", "fanlora", "ia3", "para"),
        metadata={
            "items": {"type": "string"},
            "minItems": 2,
            "uniqueItems": True,
            "description": "methods of which the tenants have adapters in turn, each with its default options",
        },
    )

    def __post_init__(self) -> None:
        """ValueError on a name that is no method whose adapters perfbench serves from its bank."""
        served = [name for name, method in METHODS.items() if method.served_by == "plan" and method.module is not None]
        for name in self.of:
            if name not in served:
                raise ValueError(f"of: expected methods that a bank serves, got {name!r}; {nearest(name, served)}")

    def of_tenant(self, tenant: int) -> tuple[str, Any]:
        """The method of a tenant's adapter, and its options."""
        name = self.of[tenant % len(self.of)]
        return name, METHODS[name].options()


Options = MixedOptions

"""The proof under traffic: what requests were answered, each with its own adapter, by definition.

A sampled request was answered while others joined and left, its adapter perhaps loaded for it. Each of its tokens must
be the oracle's best choice after those before it; and the control, the oracle with the next tenant's adapter, must
choose otherwise, or the adapters are too alike for the answers to prove anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from perfbench.methods.plan import AdapterPlan
from perfbench.proof import oracle
from perfbench.proof.check import GAP_FACTOR, relative_difference
from perfbench.proof.oracle import WIDER, Served
from perfbench.runtimes.backbone import Backbone


@dataclass(frozen=True)
class Proof:
    """status: ok, check_failed or check_void; reason: one line, None when ok; requests: how many were looked at; ties:
    tokens that are not the best choice only because two were equally good; control_parted: requests that the next
    tenant's adapter would have answered otherwise, None for an arm without adapters."""

    status: str
    reason: str | None
    requests: int
    ties: int
    control_parted: int | None


def check(backbone: Backbone, asked: Sequence[Served], others: Sequence[AdapterPlan | None]) -> Proof:
    """Judges answers. others: for each the adapter of another tenant, None where there are no adapters at all."""
    wider = WIDER[backbone.dtype]
    expected, rounded = (oracle.logits(backbone, asked, dtype) for dtype in (wider, backbone.dtype))
    noise = max(map(relative_difference, rounded, expected))
    parted, ties = [], 0
    for place, (one, logits) in enumerate(zip(asked, expected, strict=True)):
        wrong = _not_the_best(logits, one.chosen, GAP_FACTOR * noise)
        ties += int((logits.argmax(-1) != one.chosen).sum()) - wrong
        parted += [place] if wrong else []
    control = _control(backbone, asked, others, GAP_FACTOR * noise) if any(o is not None for o in others) else None
    status, reason = "ok", None
    if parted:
        who = ", ".join(f"tenant {asked[place].slot}" for place in parted)
        status = "check_failed"
        reason = f"{len(parted)} of {len(asked)} answers are not those of their adapters ({who})"
    elif control == 0:
        status, reason = "check_void", "the adapters are too alike: the next tenant's would have given the same answers"
    return Proof(status, reason, len(asked), ties, control)


def _not_the_best(logits: torch.Tensor, chosen: torch.Tensor, tolerance: float) -> int:
    """How many of the tokens `chosen` [N] are worse than the best by more than the tolerance, relative to the spread of
    their logits [N, V]."""
    gap = logits.max(dim=1).values - logits.gather(1, chosen[:, None])[:, 0]
    return int((gap > tolerance * logits.std(dim=1)).sum())


def _control(
    backbone: Backbone, asked: Sequence[Served], others: Sequence[AdapterPlan | None], tolerance: float
) -> int:
    """How many of the answers another tenant's adapter would not have given."""
    swapped = [replace(one, plan=other) for one, other in zip(asked, others, strict=True)]
    found = oracle.logits(backbone, swapped, WIDER[backbone.dtype])
    return sum(_not_the_best(logits, one.chosen, tolerance) > 0 for logits, one in zip(found, asked, strict=True))

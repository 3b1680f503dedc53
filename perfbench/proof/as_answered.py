"""The proof under traffic: what requests were answered, each with its own adapter, by definition.

A sampled request was answered while others joined and left, its adapter perhaps loaded for it. Each of its tokens must
be the oracle's best choice after those before it; and the control, the oracle with another adapter, must choose
otherwise for most of them, or the adapters are too alike for the answers to prove anything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from perfbench.methods.plan import AdapterPlan
from perfbench.proof import oracle
from perfbench.proof.check import GAP_FACTOR, LARGEST_TOLERANCE, NOISE_FACTORS, relative_difference
from perfbench.proof.oracle import WIDER, Served
from perfbench.runtimes.backbone import Backbone

# Of the answers with an adapter, at least this share must be such that another adapter would not have given them.
LEAST_PARTED = 0.5


@dataclass(frozen=True)
class Proof:
    """status: ok, check_failed or check_void; reason: one line, None when ok; requests: how many were looked at; ties:
    tokens that are not the best choice only because two were equally good; adapted: requests with an adapter;
    control_parted: those of them that another adapter would have answered otherwise."""

    status: str
    reason: str | None
    requests: int
    ties: int
    adapted: int
    control_parted: int


def check(
    backbone: Backbone, asked: Sequence[Served], others: Sequence[AdapterPlan | None], *, adapters: bool = True
) -> Proof:
    """Judges answers. others: for each the adapter of another tenant, None for the bare backbone; adapters: whether
    the arm has any, without which there is no control."""
    expected, rounded = (oracle.logits(backbone, asked, dtype) for dtype in (WIDER[backbone.dtype], backbone.dtype))
    noise = max(map(relative_difference, rounded, expected))
    parted, ties = [], 0
    for place, (one, logits) in enumerate(zip(asked, expected, strict=True)):
        wrong = _not_the_best(logits, one.chosen, GAP_FACTOR * noise)
        ties += int((logits.argmax(-1) != one.chosen).sum()) - wrong
        parted += [place] if wrong else []
    swapped = [(one, other) for one, other in zip(asked, others, strict=True) if one.plan is not None]
    control = _control(backbone, swapped, GAP_FACTOR * noise) if swapped else 0
    status, reason = "ok", None
    if not (math.isfinite(noise) and NOISE_FACTORS[backbone.dtype] * noise <= LARGEST_TOLERANCE):
        status = "check_void"
        reason = f"rounding alone moves the logits by {noise:.1e} of their size, too much to prove anything by them"
    elif parted:
        who = ", ".join(f"tenant {asked[place].slot}" for place in parted)
        status = "check_failed"
        reason = f"{len(parted)} of {len(asked)} answers are not those of their adapters ({who})"
    elif adapters and not swapped:
        status, reason = "check_void", "none of the answers that were looked at had an adapter"
    elif control < LEAST_PARTED * len(swapped):
        status = "check_void"
        reason = (
            f"the adapters are too alike: of {len(swapped)} answers {len(swapped) - control} would have been the same "
            f"with another one"
        )
    return Proof(status, reason, len(asked), ties, len(swapped), control)


def _not_the_best(logits: torch.Tensor, chosen: torch.Tensor, tolerance: float) -> int:
    """How many of the tokens `chosen` [N] are worse than the best by more than the tolerance, relative to the spread of
    their logits [N, V]."""
    gap = logits.max(dim=1).values - logits.gather(1, chosen[:, None])[:, 0]
    return int((gap > tolerance * logits.std(dim=1)).sum())


def _control(backbone: Backbone, swapped: Sequence[tuple[Served, AdapterPlan | None]], tolerance: float) -> int:
    """How many of the answers another adapter would not have given."""
    asked = [replace(one, plan=other) for one, other in swapped]
    found = oracle.logits(backbone, asked, WIDER[backbone.dtype])
    return sum(_not_the_best(logits, one.chosen, tolerance) > 0 for logits, one in zip(found, asked, strict=True))

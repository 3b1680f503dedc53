"""Whose adapter answered: each tenant, served in a mixed batch, must give its own trained model's logits.

Predictions can't tell two adapters of one task that are equally good apart, and in bf16 they may differ by rounding.
Logits can: a tenant that is served by another's adapter, or by none, is nearer to what that one gives.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from perfbench.finetune.accuracy.serve import Asked, Question, forced_logits
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Arm

NONE = "none"
# Nearer to its own by this factor than to any other: below it, nothing is said.
CLEARLY = 2.0
# Relative; served and trained in fp32 differ by the order of sums alone, which leaves about 1e-6.
FP32_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Identity:
    """`status`: ok, wrong (a tenant got another's answers, or fp32 logits that are not its own), or void (some
    adapters are too alike to tell apart); `reason` in one line, "" when ok; `relative_difference`: the largest of
    served and trained logits, None where they are not finite."""

    status: str
    reason: str
    relative_difference: float | None


def probe(arm: Arm, asked: Sequence[Question], slots: Mapping[str, int], backbone: Backbone) -> dict[str, torch.Tensor]:
    """Name -> its logits on every probe, fp32 on the CPU, in one vector; each probe is one mixed batch of all names,
    `slots`: name -> where its adapter lies."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in slots}
    for question in asked:
        pairs = [Asked(index, question) for index in range(len(slots))]
        logits, _ = forced_logits(arm, pairs, list(slots.values()), backbone)
        for name, own in zip(slots, logits.float().cpu(), strict=True):
            rows[name].append(own.flatten())
    return {name: torch.cat(own) for name, own in rows.items()}


def judge(
    served: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], tenants: Sequence[str], *, exact: bool
) -> Identity:
    """Whether each tenant's served logits are its own trained model's, the bare backbone's (NONE) among `trained`.

    exact: served and trained in fp32, where they differ by the order of sums alone.
    """
    worst, vague = 0.0, []
    for tenant in tenants:
        found = served[tenant]
        distances = {name: float((found - other).norm() / other.norm()) for name, other in trained.items()}
        own = distances.pop(tenant)
        worst = max(worst, own)
        nearest = min(distances, key=distances.__getitem__)
        if not math.isfinite(own):
            return Identity("wrong", f"{tenant}: logits are not finite", None)
        if own > CLEARLY * distances[nearest]:
            return Identity("wrong", f"{tenant} is served as {nearest}", worst)
        if exact and own > FP32_TOLERANCE:
            return Identity("wrong", f"{tenant}: logits differ by {own:.1e} from what was trained", worst)
        if own * CLEARLY > distances[nearest] or distances[nearest] == 0:
            vague.append(f"{tenant} and {nearest}")
    if vague:
        return Identity("void", f"too alike to tell apart: {', '.join(vague)}", worst)
    return Identity("ok", "", worst)

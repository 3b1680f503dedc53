"""Whose adapter answered: each tenant, served in a mixed batch, must give its own trained model's logits.

Predictions can't tell two adapters of one task that are equally good apart, and in bf16 they may differ by rounding.
Logits can: a tenant that is served by another's adapter, or by none, is nearer to what that one gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.backbone import Backbone
from perfbench.check import TOLERANCES
from perfbench.finetune.accuracy.serve import Asked, Question, Tenant, batch_of, forced_tokens
from perfbench.finetune.encoding import encode
from perfbench.finetune.tasks.task import Example, Task
from perfbench.runtimes.generation import Arm

PROBES = 4
NONE = "none"
# Nearer to its own by this factor than to any other: below it, nothing is said.
CLEARLY = 2.0


@dataclass(frozen=True)
class Identity:
    """`status`: ok, wrong (a tenant got another's answers, or fp32 logits that are not its own), or void (some
    adapters are too alike to tell apart); `reason` in one line, "" when ok; `relative_difference`: the largest of
    served and trained logits."""

    status: str
    reason: str
    relative_difference: float


def probes(task: Task, examples: Sequence[Example], tokenizer: Any) -> list[Question]:
    """The first few examples, each with its own answer to be forced."""
    found = []
    for example in examples[:PROBES]:
        one = encode(example, tokenizer, end=False)
        found.append(Question(example, one.ids[: one.prompt_tokens], example.answer, one.ids[one.prompt_tokens :]))
    return found


def probe(
    arm: Arm, asked: Sequence[Question], slots: Mapping[str, int], task: Task, backbone: Backbone
) -> dict[str, torch.Tensor]:
    """Tenant -> its logits on every probe, fp32 on the CPU, all in one vector; each probe is one mixed batch of all."""
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in slots}
    for question in asked:
        pairs = [Asked(index, question) for index in range(len(slots))]
        batch = batch_of(pairs, list(slots.values()), task, backbone, eos=0, beams=1)
        # Teacher forcing makes exactly these tokens, whether the task generates or chooses.
        forced = forced_tokens(pairs, backbone.device)
        batch = _exactly(batch, forced.shape[1])
        logits = arm.generate(batch, forced=forced, with_logits=True).logits
        assert logits is not None
        for name, own in zip(slots, logits.float().cpu(), strict=True):
            rows[name].append(own.flatten())
    return {name: torch.cat(own) for name, own in rows.items()}


def _exactly(batch: Any, new_tokens: int) -> Any:
    from dataclasses import replace

    return replace(batch, new_tokens=new_tokens, eos=(), beams=1)


def judge(
    served: Mapping[str, torch.Tensor], trained: Mapping[str, torch.Tensor], tenants: Sequence[Tenant], *, exact: bool
) -> Identity:
    """Whether each tenant's served logits are its own trained model's, the bare backbone's (NONE) among `trained`.

    exact: served and trained in fp32, where they differ by the order of sums alone.
    """
    worst, vague = 0.0, []
    for tenant in tenants:
        found = served[tenant.name]
        distances = {name: float((found - other).norm() / other.norm()) for name, other in trained.items()}
        own = distances.pop(tenant.name)
        worst = max(worst, own)
        nearest = min(distances, key=distances.__getitem__)
        if not own <= distances[nearest] or (own > 0 and distances[nearest] * CLEARLY < own):
            return Identity("wrong", f"{tenant.name} is served as {nearest}", worst)
        if exact and not own <= TOLERANCES[torch.float32]:
            return Identity("wrong", f"{tenant.name}: logits differ by {own:.1e} from what was trained", worst)
        if own * CLEARLY > distances[nearest] or distances[nearest] == 0:
            vague.append(f"{tenant.name} and {nearest}")
    if vague:
        return Identity("void", f"too alike to tell apart: {', '.join(vague)}", worst)
    return Identity("ok", "", worst)

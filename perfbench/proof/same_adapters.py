"""Two arms that hold the same adapters, one served by PEFT and one by perfbench, choose the same tokens."""

from __future__ import annotations

import torch

from perfbench.proof import oracle
from perfbench.proof.best_choices import TIES, PlanOf, is_beam_tie, is_greedy_tie, served
from perfbench.proof.check import GAP_FACTOR, relative_difference
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch


def parted(
    batch: Batch,
    slots: tuple[int, ...],
    ours: torch.Tensor,
    theirs: torch.Tensor,
    backbone: Backbone,
    plan_of: PlanOf | None,
) -> list[int]:
    """The requests for which the arms chose other tokens, `ours` for `batch` and `theirs`, both int64 [Q, N] on the
    CPU, and not only because two choices were equally good.

    slots: those of the other arm; a request that has another adapter there is not compared. Beams are in fp32 only, as
    the check has them: in 16 bits rounding alone prunes other paths.
    """
    if batch.beams > 1 and backbone.dtype != torch.float32:
        return []
    unlike = [i for i, slot in enumerate(batch.slots) if slot == slots[i] and not torch.equal(ours[i], theirs[i])]
    return [i for i in unlike if not _is_tie(batch, i, ours[i], theirs[i], backbone, plan_of)]


def _is_tie(
    batch: Batch, request: int, ours: torch.Tensor, theirs: torch.Tensor, backbone: Backbone, plan_of: PlanOf | None
) -> bool:
    """Whether the oracle has both choices [N] for equally good. Two programs round in two ways, so that what rounding
    does to the logits of this request widens the tolerance where it is more than a program shows by itself."""
    ours, theirs = (tokens.to(batch.input_ids.device) for tokens in (ours, theirs))
    asked = [served(batch, request, tokens, plan_of) for tokens in (ours, theirs)]
    on_ours, on_theirs = oracle.logits(backbone, asked, oracle.WIDER[backbone.dtype])
    noise = relative_difference(oracle.logits(backbone, asked[:1], backbone.dtype)[0], on_ours)
    tolerance = max(TIES[backbone.dtype], GAP_FACTOR * noise)
    if batch.beams == 1:
        return is_greedy_tie(on_ours, ours, theirs, tolerance)
    return is_beam_tie(on_ours, on_theirs, theirs, ours, tolerance)

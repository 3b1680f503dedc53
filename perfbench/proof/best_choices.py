"""Whether the tokens that an arm makes are the best choices, and the same when it is timed as when it is checked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from perfbench.methods.plan import AdapterPlan
from perfbench.proof.answers import Oracle
from perfbench.proof.oracle import WIDER, Served
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Arm, Batch

# With several beams the oracle searches too, of as many of them as this allows: it reads every beam from the start at
# every step. Seconds on a CPU.
SEARCH_FLOPS = 2e11
# So close are two choices, relative to the spread of the logits or to the score of a path, that one program may take
# the one and then the other.
TIES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}

# Slot -> the adapter that lies there.
PlanOf = Callable[[int], AdapterPlan]


def served(batch: Batch, request: int, tokens: torch.Tensor, plan_of: PlanOf | None) -> Served:
    """That request, without its padding, and what it was given."""
    slot = batch.slots[request]
    prompt = batch.input_ids[request][batch.attention_mask[request].bool()]
    if plan_of is None or slot == -1:
        return Served(prompt, tokens, None)
    return Served(prompt, tokens, plan_of(slot), slot, batch.shared_tokens)


def forced_logits(arm: Arm, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [Q, N, V]: the logits of each step when the batch is made to choose `tokens` (int64 [Q, N])."""
    logits = arm.generate(batch, forced=tokens, with_logits=True).logits
    assert logits is not None
    return logits


def searched_requests(batch: Batch, backbone: Backbone, sampled: int) -> int:
    """For how many of the sampled requests the oracle's own beam search is affordable."""
    length = batch.input_ids.shape[1] + batch.new_tokens
    each = 2 * backbone.parameters * batch.beams * batch.new_tokens * length
    return min(sampled, int(SEARCH_FLOPS // each))


def parted_from_the_best(
    arm: Arm,
    batch: Batch,
    tokens: torch.Tensor,
    expected: dict[int, torch.Tensor],
    ask: Oracle,
    plan_of: PlanOf | None,
    tolerance: float,
    searched: int,
) -> tuple[list[int], int]:
    """(the requests whose tokens are not the best choices, how many are so only because two were equally good).

    Greedy: each must be the oracle's best after those before it. Beams: those that the oracle finds in a search of its
    own, for the first `searched` of them, and those that the arm finds for the request alone, for the others.
    """
    parted, ties, wider = [], 0, WIDER[ask.backbone.dtype]
    for place, (request, logits) in enumerate(expected.items()):
        asked = served(batch, request, tokens[request], plan_of)
        if batch.beams == 1:
            own = logits.argmax(-1)
        elif place < searched:
            own = ask.beam_search(asked, batch.beams, batch.new_tokens, wider)
        else:
            own = arm.generate(batch.alone(request)).tokens[0]
        if torch.equal(own, asked.chosen):
            continue
        if batch.beams == 1:  # each step was made to follow the arm's own tokens, so that each stands for itself
            best = logits.gather(1, torch.stack([own, asked.chosen], dim=1))
            tie = bool(((best[:, 0] - best[:, 1]) <= tolerance * logits.std(dim=1)).all())
        else:
            on_own = ask.logits([replace(asked, chosen=own)], wider)[0]
            tie = is_beam_tie(logits, on_own, own, asked.chosen, tolerance)
        ties += tie
        parted += [] if tie else [request]
    return parted, ties


def parted_from_timed(arm: Arm, batch: Batch, timed: torch.Tensor, dtype: torch.dtype) -> list[int]:
    """The requests for which `arm`, asked again without a clock, makes other tokens than `timed` int64 [Q, N] on the
    CPU, and not only because two choices were equally good."""
    greedy = batch.beams == 1
    again = arm.generate(batch, with_logits=greedy)
    timed = timed.to(again.tokens.device)
    parted = [i for i in range(len(timed)) if not torch.equal(timed[i], again.tokens[i])]
    if not parted:
        return []
    tolerance = TIES[dtype]
    if greedy:
        logits = again.logits
        assert logits is not None
        return [i for i in parted if not is_greedy_tie(logits[i], again.tokens[i], timed[i], tolerance)]
    first, second = (forced_logits(arm, batch, tokens) for tokens in (again.tokens, timed))
    return [i for i in parted if not is_beam_tie(first[i], second[i], timed[i], again.tokens[i], tolerance)]


def is_greedy_tie(logits: torch.Tensor, own: torch.Tensor, tokens: torch.Tensor, tolerance: float) -> bool:
    """Whether two tokens [N] part only because two choices were equally good: at the first difference the gap between
    their logits [N, V] is within the tolerance, relative to the spread of the logits."""
    step = int((own != tokens).long().argmax())
    pair = logits[step, [own[step], tokens[step]]]
    return bool((pair[0] - pair[1]).abs() <= tolerance * logits[step].std())


def is_beam_tie(
    logits: torch.Tensor, own_logits: torch.Tensor, own: torch.Tensor, tokens: torch.Tensor, tolerance: float
) -> bool:
    """Whether the log-probabilities of two whole continuations of one request are within the tolerance.

    logits, own_logits [N, V]: of the request alone, made to choose `tokens` and `own` [N].
    """
    scores = [
        found.log_softmax(-1).gather(-1, path.unsqueeze(-1)).sum()
        for found, path in ((logits, tokens), (own_logits, own))
    ]
    return bool((scores[0] - scores[1]).abs() <= tolerance * scores[0].abs())

"""The proof before speed: every request of a mixed batch gets what its own adapter gives it, by definition.

What an arm's real generate call gives is held against the oracle's forward pass in a wider dtype. No tolerance is
chosen by hand: the oracle runs in the arm's own dtype too, and what rounding does to it there, on the same tokens with
the same adapter, is the noise that an arm may show, a few times over. In 16 bits that noise can be larger than what an
adapter does, so adapters are judged by direction too: how far a request has moved from its own adapter's logits
towards the next tenant's, 0 being its own and 1 the next one's. And the check is checked itself: the same batch with
the slots shifted by one must be found to have moved all the way, or the check is void.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import torch

from perfbench import oracle
from perfbench.backbone import Backbone
from perfbench.methods.plan import AdapterPlan
from perfbench.runtimes.generation import Arm, Batch
from perfbench.workload import shift_slots

# At least this many requests are sampled, and one of every tenant of the batch as long as they are at most so many.
SAMPLED_REQUESTS = 8
MOST_TENANTS = 64
# How many times the oracle's noise an arm's difference may be. In 16 bits both round the same stored values: seen is
# 0.6 to 1.5. In fp32 the noise is of the order of sums, which each library has its own way with: seen is 0.6 to 2.9.
NOISE_FACTORS = {torch.float32: 10, torch.bfloat16: 3, torch.float16: 3}
# Logits that have nothing to do with each other differ by 1.4 of their size: a tolerance above half of that would
# prove too little.
LARGEST_TOLERANCE = 0.7
# As far as a request may move towards the next tenant's adapter: a quarter of the way. And one that is served by the
# next tenant's must stand out tenfold from rounding.
LARGEST_SHARE = 0.25
SHIFTED_FACTOR = 10

# Slot -> the adapter that lies there.
PlanOf = Callable[[int], AdapterPlan]


@dataclass(frozen=True)
class Check:
    """The outcome. `status`: ok, check_failed or check_void; `reason`: one line, None when ok.

    tokens_equal: fp32 only, else None; ties: requests whose tokens part where the two best choices are closer than
    the tolerance. relative_difference, noise: the largest over the sampled requests and their tokens. Over the decode
    steps, the share of the way from a request's own adapter to the next tenant's: wrong_share, the largest (without
    sign) of the batch; noise_share, the same of rounding alone; shifted_share, the smallest of the batch with shifted
    slots. All three None for an arm without adapters.
    """

    status: str
    reason: str | None
    requests: int
    tokens_equal: bool | None
    ties: int
    relative_difference: float
    noise: float
    tolerance: float
    wrong_share: float | None = None
    noise_share: float | None = None
    shifted_share: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The check as run.json has it."""
        fields = asdict(self)
        del fields["status"], fields["reason"]
        # JSON has no infinity; the reason says what was found.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        return finite | {"passed": self.status == "ok"}


@dataclass(frozen=True)
class Runs:
    """What is compared, of each sampled request [N, V]: as served in the batch, by the oracle in a wider dtype, by the
    oracle in the arm's dtype; as served with the next tenant's adapter, and, for the first SAMPLED_REQUESTS, by the
    oracle with it."""

    served: list[torch.Tensor]
    expected: list[torch.Tensor]
    rounded: list[torch.Tensor]
    shifted: list[torch.Tensor]
    next_expected: list[torch.Tensor]


def check(arm: Arm, batch: Batch, resident: int, backbone: Backbone, seed: int, plan_of: PlanOf | None) -> Check:
    """Compares the sampled requests of `batch` with the oracle, which has `plan_of` for adapters (None: there are
    none); then the whole batch with shifted slots."""
    plan_of = None if plan_of is None else cache(plan_of)  # of a tenant with several requests, or next to another
    sampled = sample(batch.slots, seed)
    greedy = batch.beams == 1
    together = arm.generate(batch, with_logits=greedy)
    # Beam search keeps the logits of its own path; teacher forcing puts every run on the batch's tokens.
    logits = together.logits if greedy else forced_logits(arm, batch, together.tokens)
    assert logits is not None
    runs = _runs(arm, batch, together.tokens, logits, sampled, resident, backbone, plan_of)
    worst = max(map(relative_difference, runs.served, runs.expected))
    noise = max(map(relative_difference, runs.rounded, runs.expected))
    if batch.follow_up is not None:
        second = _second_turn(arm, batch, together.tokens, sampled, backbone, plan_of)
        worst, noise = max(worst, second[0]), max(noise, second[1])
    shares = _shares(runs) if plan_of is not None else None
    tolerance = NOISE_FACTORS[backbone.dtype] * noise
    parted: list[int] = []
    ties = 0
    if backbone.dtype == torch.float32:
        parted, ties = _parted(arm, batch, together.tokens, dict(zip(sampled, runs.expected, strict=True)), tolerance)
    status, reason = verdict(worst, noise, tolerance, shares, parted)
    equal = not parted if backbone.dtype == torch.float32 else None
    return Check(status, reason, len(sampled), equal, ties, worst, noise, tolerance, *(shares or ()))


class Shares(NamedTuple):
    """As `Check` has them."""

    wrong: float
    noise: float
    shifted: float


def _shares(runs: Runs) -> Shares:
    """Which way the next tenant's adapter lies, the arm's own shifted run says, since that is there for all; whether
    it went there, the oracle says."""
    served, rounded = (
        [wrong_share(*three) for three in zip(found, runs.expected, runs.shifted, strict=True)]
        for found in (runs.served, runs.rounded)
    )
    shifted = map(wrong_share, runs.shifted, runs.expected, runs.next_expected)  # as many as there are of the last
    return Shares(max(map(abs, served)), max(map(abs, rounded)), min(shifted))


def _runs(
    arm: Arm,
    batch: Batch,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    sampled: list[int],
    resident: int,
    backbone: Backbone,
    plan_of: PlanOf | None,
) -> Runs:
    wider = oracle.WIDER[backbone.dtype]
    right = [_served(batch, i, tokens[i], plan_of) for i in sampled]
    expected, rounded = (oracle.logits(backbone, right, dtype) for dtype in (wider, backbone.dtype))
    served, shifted, next_expected = [logits[i] for i in sampled], [], []
    if plan_of is not None:
        wrong = replace(batch, slots=shift_slots(batch.slots, resident))
        wrong_logits = forced_logits(arm, wrong, tokens)
        shifted = [wrong_logits[i] for i in sampled]
        few = [_served(wrong, i, tokens[i], plan_of) for i in sampled[:SAMPLED_REQUESTS]]
        next_expected = oracle.logits(backbone, few, wider)
    return Runs(served, expected, rounded, shifted, next_expected)


def _second_turn(
    arm: Any,
    batch: Batch,
    generated: torch.Tensor,
    sampled: list[int],
    backbone: Backbone,
    plan_of: PlanOf | None,
) -> tuple[float, float]:
    """(difference, noise) of the second turn's first logits, after `generated` int64 [Q, N]. The oracle reads the
    whole conversation as one prompt."""
    arm.generate(batch, forced=generated)
    found = arm.follow_up(generated, with_logits=True).logits[:, :1]
    conversation = batch.conversation(generated)
    asked = [_served(conversation, i, found[i].argmax(-1), plan_of) for i in sampled]
    expected, rounded = (
        oracle.logits(backbone, asked, dtype) for dtype in (oracle.WIDER[backbone.dtype], backbone.dtype)
    )
    worst = max(relative_difference(found[i], own) for i, own in zip(sampled, expected, strict=True))
    return worst, max(map(relative_difference, rounded, expected))


def sample(slots: tuple[int, ...], seed: int) -> list[int]:
    """The requests to be checked, in order: one of every tenant, and of none, and SAMPLED_REQUESTS at least."""
    draw = random.Random(seed)
    order = draw.sample(range(len(slots)), len(slots))
    first_of_each = list({slots[i]: i for i in reversed(order)}.values())[:MOST_TENANTS]
    others = [i for i in order if i not in first_of_each]
    return sorted(first_of_each + others[: max(0, SAMPLED_REQUESTS - len(first_of_each))])


def _served(batch: Batch, request: int, tokens: torch.Tensor, plan_of: PlanOf | None) -> oracle.Served:
    """That request, without its padding, and what it was given."""
    slot = batch.slots[request]
    prompt = batch.input_ids[request][batch.attention_mask[request].bool()]
    return oracle.Served(prompt, tokens, None if plan_of is None or slot == -1 else plan_of(slot))


def _parted(
    arm: Arm, batch: Batch, tokens: torch.Tensor, expected: dict[int, torch.Tensor], tolerance: float
) -> tuple[list[int], int]:
    """(the requests whose tokens are not the best choices, how many are so only because two were equally good).

    Greedy: each must be the oracle's best after those before it. Beams: those that the request finds alone.
    """
    parted, ties = [], 0
    for request, logits in expected.items():
        given = tokens[request]
        if batch.beams == 1:
            own = logits.argmax(-1)
            tie = not torch.equal(own, given) and is_greedy_tie(logits, own, given, tolerance)
        else:
            alone = batch.alone(request)
            own = arm.generate(alone).tokens[0]
            tie = not torch.equal(own, given) and is_beam_tie(
                logits, forced_logits(arm, alone, own.unsqueeze(0))[0], own, given, tolerance
            )
        ties += tie
        if not tie and not torch.equal(own, given):
            parted.append(request)
    return parted, ties


def forced_logits(arm: Arm, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [Q, N, V]: the logits of each step when the batch is made to choose `tokens` (int64 [Q, N])."""
    logits = arm.generate(batch, forced=tokens, with_logits=True).logits
    assert logits is not None
    return logits


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest over the tokens of |logits - reference| / |reference|; both [N, V], each token's without their mean,
    which no choice depends on and which a trained model's rounding moves most. Not finite counts as infinite."""
    logits, reference = _centred(logits, reference)
    return _finite(((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).max())


def wrong_share(logits: torch.Tensor, own: torch.Tensor, wrong: torch.Tensor) -> float:
    """How far logits [N, V] have moved from a request's own towards the wrong ones: 0 none, 1 all the way. Over the
    decode steps, without the first token, which the prefill gives, where there are others."""
    logits, own, wrong = _centred(*(part[1 if len(own) > 1 else 0 :] for part in (logits, own, wrong)))
    moved, way = logits - own, wrong - own
    return _finite((moved * way).sum() / way.square().sum())


def _centred(*parts: torch.Tensor) -> list[torch.Tensor]:
    """Each [N, V] less its mean over V, all in the widest dtype of them."""
    wide = torch.float64 if any(part.dtype == torch.float64 for part in parts) else torch.float32
    return [part.to(wide) - part.to(wide).mean(dim=-1, keepdim=True) for part in parts]


def _finite(value: torch.Tensor) -> float:
    number = value.item()
    return number if math.isfinite(number) else math.inf


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


def verdict(
    worst: float, noise: float, tolerance: float, shares: Shares | None, parted: list[int]
) -> tuple[str, str | None]:
    """(status, reason) from what `Check` holds, and the requests whose tokens parted without a tie."""
    if parted:
        return "check_failed", f"request(s) {', '.join(map(str, parted))}: other tokens than its adapter's best choices"
    if not worst <= tolerance:
        return "check_failed", (
            f"logits differ by {worst:.1e} from what the adapter gives by definition, more than the tolerance "
            f"{tolerance:.1e}: rounding leaves {noise:.1e}"
        )
    if not tolerance <= LARGEST_TOLERANCE:
        return "check_void", (
            f"rounding alone moves the logits by {noise:.1e} of their size, too much to prove "
            f"anything by them; choose a wider dtype"
        )
    if shares is None:
        return "ok", None
    if not shares.noise * SHIFTED_FACTOR <= 1:
        return "check_void", (
            f"the adapters are too weak to tell apart: rounding alone moves the logits by {shares.noise:.1e} of the "
            f"way to the next tenant's"
        )
    if not shares.wrong <= LARGEST_SHARE:
        return "check_failed", f"a request has moved {shares.wrong:.0%} of the way to the next tenant's adapter"
    if not abs(shares.shifted - 1) <= LARGEST_SHARE:
        return "check_void", (
            f"with shifted slots a request has moved {shares.shifted:.0%} of the way to the next tenant's adapter, "
            f"not all of it: the check can't tell adapters apart"
        )
    return "ok", None

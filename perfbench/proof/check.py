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
from functools import cache, partial
from typing import Any, NamedTuple

import torch

from perfbench.methods.plan import AdapterPlan
from perfbench.proof import best_choices, oracle
from perfbench.proof.answers import Oracle
from perfbench.proof.best_choices import PlanOf, forced_logits, served
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Arm, Batch

# At least this many requests are sampled, and one of every tenant of the batch as long as they are at most so many.
SAMPLED_REQUESTS = 8
MOST_TENANTS = 64
# How many times the oracle's noise an arm's difference may be. In 16 bits both round the same stored values: seen is
# 0.6 to 1.5. In fp32 the noise is of the order of sums, which each library has its own way with: seen is 0.6 to 2.9.
NOISE_FACTORS = {torch.float32: 10, torch.bfloat16: 3, torch.float16: 3}
# The best choice may stand this many times the noise behind another one, relative to the spread of the logits: of tens
# of thousands of them some are off by four or five times as much as most, and it takes two to change places.
GAP_FACTOR = 10
# Logits that have nothing to do with each other differ by 1.4 of their size: a tolerance above half of that would
# prove too little.
LARGEST_TOLERANCE = 0.7
# As far as a request may move towards the next tenant's adapter: a quarter of the way. And one that is served by the
# next tenant's must stand out tenfold from rounding.
LARGEST_SHARE = 0.25
SHIFTED_FACTOR = 10


@dataclass(frozen=True)
class Check:
    """The outcome. `status`: ok, check_failed or check_void; `reason`: one line, None when ok.

    tokens_equal: fp32 only, else None; searched: with several beams, in fp32, the requests whose tokens the oracle
    searched for too, those of the others being compared with the arm's own for the request alone; ties: requests whose
    tokens part where the two best choices are closer than the tolerance. relative_difference, noise: the largest over
    the sampled requests and their tokens. Over the decode steps, the share of the way from a request's own adapter to
    the next tenant's: wrong_share, the largest (without sign) of the batch; noise_share, the same of rounding alone;
    shifted_share, the smallest of the batch with shifted slots. All three None for an arm without adapters.
    """

    status: str
    reason: str | None
    requests: int
    tokens_equal: bool | None
    searched: int
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


def check(
    arm: Arm,
    batch: Batch,
    resident: int,
    backbone: Backbone,
    seed: int,
    plan_of: PlanOf | None,
    ask: Oracle | None = None,
) -> Check:
    """Compares the sampled requests of `batch` with the oracle, which has `plan_of` for adapters (None: there are
    none); then the whole batch with shifted slots. `ask`: the oracle of these adapters, where it knows answers."""
    ask = ask or Oracle(backbone)
    plan_of = None if plan_of is None else cache(partial(_on_the_host, plan_of))
    sampled = sample(batch.slots, seed)
    greedy = batch.beams == 1
    together = arm.generate(batch, with_logits=greedy)
    # Beam search keeps the logits of its own path; teacher forcing puts every run on the batch's tokens.
    logits = together.logits if greedy else forced_logits(arm, batch, together.tokens)
    assert logits is not None
    runs = _runs(batch, together.tokens, logits, partial(forced_logits, arm), sampled, resident, ask, plan_of)
    turns = [runs]
    if batch.follow_up is not None:
        turns.append(_second_turn(arm, batch, together.tokens, sampled, resident, ask, plan_of))
    worst = max(relative_difference(*two) for turn in turns for two in zip(turn.served, turn.expected, strict=True))
    noise = max(relative_difference(*two) for turn in turns for two in zip(turn.rounded, turn.expected, strict=True))
    shares = None if plan_of is None else _worst_shares([_shares(turn) for turn in turns])
    tolerance = NOISE_FACTORS[backbone.dtype] * noise
    parted: list[int] = []
    ties = searched = 0
    if greedy or backbone.dtype == torch.float32:
        expected = dict(zip(sampled, runs.expected, strict=True))
        searched = 0 if greedy else best_choices.searched_requests(batch, backbone, len(sampled))
        parted, ties = best_choices.parted_from_the_best(
            arm, batch, together.tokens, expected, ask, plan_of, GAP_FACTOR * noise, searched
        )
    status, reason = verdict(worst, noise, tolerance, shares, parted)
    equal = not parted if backbone.dtype == torch.float32 else None
    return Check(status, reason, len(sampled), equal, searched, ties, worst, noise, tolerance, *(shares or ()))


def _on_the_host(plan_of: PlanOf, slot: int) -> AdapterPlan:
    """The adapter of a slot, kept where 64 of them have room; the oracle takes a layer of it at a time."""
    return tuple(layer.map(torch.Tensor.cpu) for layer in plan_of(slot))


def as_timed(
    arm: Arm, batch: Batch, timed: torch.Tensor, request: int, backbone: Backbone, plan_of: PlanOf | None
) -> str | None:
    """What is wrong with the tokens `timed` int64 [Q, N] that `arm` made of `batch` in a timed call, in a line: it
    makes others when asked again, or is not, for this one request, what the oracle says. None where all is well."""
    if parted := best_choices.parted_from_timed(arm, batch, timed, backbone.dtype):
        return f"request(s) {', '.join(map(str, parted))}: other tokens when timed than when checked"
    timed = timed.to(batch.input_ids.device)
    asked = [served(batch, request, timed[request], plan_of)]
    found = forced_logits(arm, batch, timed)[request]
    expected, rounded = (
        oracle.logits(backbone, asked, dtype)[0] for dtype in (oracle.WIDER[backbone.dtype], backbone.dtype)
    )
    difference, noise = relative_difference(found, expected), relative_difference(rounded, expected)
    # Twice the factor: the noise of one request says less than that of many.
    if not difference <= 2 * NOISE_FACTORS[backbone.dtype] * noise:
        return (
            f"request {request}: beside the other arms its logits differ by {difference:.1e} from what its adapter "
            f"gives by definition, where rounding leaves {noise:.1e}"
        )
    return None


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


def _worst_shares(turns: list[Shares]) -> Shares:
    wrong, noise, shifted = zip(*turns, strict=True)
    return Shares(max(wrong), max(noise), min(shifted))


def _runs(
    batch: Batch,
    tokens: torch.Tensor,
    logits: torch.Tensor,
    forced: Callable[[Batch, torch.Tensor], torch.Tensor],
    sampled: list[int],
    resident: int,
    ask: Oracle,
    plan_of: PlanOf | None,
) -> Runs:
    """Of `batch`, for which the arm gave `tokens` int64 [Q, N] and their logits [Q, N, V]; `forced`: the arm's logits
    of another batch that is made to choose these tokens."""
    wider = oracle.WIDER[ask.backbone.dtype]
    right = [served(batch, i, tokens[i], plan_of) for i in sampled]
    expected, rounded = (ask.logits(right, dtype) for dtype in (wider, ask.backbone.dtype))
    found, shifted, next_expected = [logits[i] for i in sampled], [], []
    if plan_of is not None:
        wrong = replace(batch, slots=shift_slots(batch.slots, resident))
        wrong_logits = forced(wrong, tokens)
        shifted = [wrong_logits[i] for i in sampled]
        few = [served(wrong, i, tokens[i], plan_of) for i in sampled[:SAMPLED_REQUESTS]]
        # To tell an adapter from the next tenant's takes no fp64, which is four times the work.
        next_expected = ask.logits(few, torch.float32)
    return Runs(found, expected, rounded, shifted, next_expected)


def _second_turn(
    arm: Any,
    batch: Batch,
    generated: torch.Tensor,
    sampled: list[int],
    resident: int,
    ask: Oracle,
    plan_of: PlanOf | None,
) -> Runs:
    """Of the second turn, after `generated` int64 [Q, N]. The oracle reads the whole conversation as one prompt."""

    def second(slots: tuple[int, ...], tokens: torch.Tensor | None) -> Any:
        arm.generate(replace(batch, slots=slots), forced=generated)
        return arm.follow_up(generated, forced=tokens, with_logits=True)

    def forced(other: Batch, tokens: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = second(other.slots, tokens).logits
        return logits

    own, conversation = second(batch.slots, None), batch.conversation(generated)
    return _runs(conversation, own.tokens, own.logits, forced, sampled, resident, ask, plan_of)


def sample(slots: tuple[int, ...], seed: int) -> list[int]:
    """The requests to be checked, in order: one of every tenant, and of none, and SAMPLED_REQUESTS at least."""
    draw = random.Random(seed)
    order = draw.sample(range(len(slots)), len(slots))
    first_of_each = list({slots[i]: i for i in reversed(order)}.values())[:MOST_TENANTS]
    others = [i for i in order if i not in first_of_each]
    return sorted(first_of_each + others[: max(0, SAMPLED_REQUESTS - len(first_of_each))])


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
            f"rounding alone moves the logits by {noise:.1e} of their size, too much to prove anything by them; choose "
            f"a wider dtype, or for a trained backbone prompts of words: random tokens are the worst for it"
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


def shift_slots(slots: tuple[int, ...], resident: int) -> tuple[int, ...]:
    """The fault that every check plants: each request is given the next resident's adapter.

    With one resident, and for a request without an adapter, the fault is to swap adapter and bare backbone.
    """
    return tuple(0 if slot == -1 else -1 if resident == 1 else (slot + 1) % resident for slot in slots)

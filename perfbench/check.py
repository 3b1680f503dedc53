"""The proof before speed: every request of a mixed batch gets what it would get alone with its own adapter.

The check runs through the arm's real generate call. And it is checked itself: with the slots shifted by one, the
same comparison must exceed the tolerance tenfold, or adapters this weak prove nothing and the check is void.
"""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from perfbench.runtimes.generation import Arm, Batch
from perfbench.workload import shift_slots

SAMPLED_REQUESTS = 8
SHIFTED_FACTOR = 10

# Relative difference of the logits, per token: |batch - alone| / |alone|, in the 2-norm. Reductions in another
# order leave about 1e-6 in fp32; rounding each activation to 8 (11) bits leaves about 1e-2 (1e-3).
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Check:
    """The outcome. `status`: ok, check_failed or check_void; `reason`: one line, None when ok.

    tokens_equal: fp32 only, else None; ties: requests whose tokens part where the two best choices are closer than
    the tolerance; the differences are the largest over the sampled requests (shifted: the smallest), None for an
    arm without adapters.
    """

    status: str
    reason: str | None
    requests: int
    tokens_equal: bool | None
    ties: int
    relative_difference: float
    tolerance: float
    shifted_relative_difference: float | None

    def to_json(self) -> dict[str, Any]:
        """The check as run.json has it."""
        fields = asdict(self)
        del fields["status"], fields["reason"]
        # JSON has no infinity; the reason says what was found.
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        return finite | {"passed": self.status == "ok"}


def check(arm: Arm, batch: Batch, resident: int, dtype: torch.dtype, seed: int, *, has_adapters: bool) -> Check:
    """Compares at most 8 sampled requests of `batch` with each run alone; then with shifted slots."""
    tolerance = TOLERANCES[dtype]
    requests = batch.input_ids.shape[0]
    sampled = sorted(random.Random(seed).sample(range(requests), min(SAMPLED_REQUESTS, requests)))
    greedy = batch.beams == 1
    together = arm.generate(batch, with_logits=greedy)
    # Beam search keeps the logits of its own path; teacher forcing puts every run on the batch's tokens.
    in_batch = together.logits if greedy else forced_logits(arm, batch, together.tokens)
    assert in_batch is not None
    shifted = None
    if has_adapters:
        wrong = replace(batch, slots=shift_slots(batch.slots, resident))
        shifted = forced_logits(arm, wrong, together.tokens)
    worst, weakest, parted, ties = 0.0, float("inf"), [], 0
    for request in sampled:
        tokens, alone = together.tokens[request], batch.alone(request)
        logits = forced_logits(arm, alone, tokens.unsqueeze(0))[0]
        worst = max(worst, relative_difference(in_batch[request], logits))
        if shifted is not None:
            weakest = min(weakest, relative_difference(shifted[request], logits))
        if dtype == torch.float32:
            # Greedy search alone makes these tokens exactly where each is the best choice after those before it.
            own = logits.argmax(-1) if greedy else arm.generate(alone).tokens[0]
            if not torch.equal(own, tokens):
                tie = is_greedy_tie(logits, own, tokens, tolerance) if greedy else is_beam_tie(
                    logits, forced_logits(arm, alone, own.unsqueeze(0))[0], own, tokens, tolerance
                )
                ties += tie
                parted += [] if tie else [request]
    if batch.follow_up is not None:
        worst = max(worst, second_turn_difference(arm, batch, together.tokens))
    shifted_difference = None if shifted is None else weakest
    status, reason = verdict(worst, tolerance, shifted_difference, parted)
    equal = not parted if dtype == torch.float32 else None
    return Check(status, reason, len(sampled), equal, ties, worst, tolerance, shifted_difference)


def second_turn_difference(arm: Any, batch: Batch, generated: torch.Tensor) -> float:
    """How far the second turn's first logits, after `generated` int64 [Q, N], are from those of an arm that reads the
    whole conversation as one prompt; relative, the largest over the requests."""
    arm.generate(batch, forced=generated)
    found = arm.follow_up(generated, with_logits=True).logits[:, :1]
    whole = arm.generate(replace(batch.conversation(generated), new_tokens=1), with_logits=True).logits
    return max(relative_difference(found[i], whole[i]) for i in range(len(found)))


def forced_logits(arm: Arm, batch: Batch, tokens: torch.Tensor) -> torch.Tensor:
    """fp32 [Q, N, V]: the logits of each step when the batch is made to choose `tokens` (int64 [Q, N])."""
    logits = arm.generate(batch, forced=tokens, with_logits=True).logits
    assert logits is not None
    return logits


def relative_difference(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest over the tokens of |logits - reference| / |reference|; both [N, V]. Not finite counts as infinite."""
    ratio = ((logits - reference).norm(dim=-1) / reference.norm(dim=-1)).max().item()
    return ratio if ratio == ratio else float("inf")


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
    worst: float, tolerance: float, shifted: float | None, parted: list[int]
) -> tuple[str, str | None]:
    """(status, reason) from the differences found and the requests whose tokens parted without a tie."""
    if parted:
        return "check_failed", f"request(s) {', '.join(map(str, parted))}: other tokens in the batch than alone"
    if not worst <= tolerance:
        return "check_failed", f"logits differ by {worst:.1e} from the request alone (tolerance {tolerance:.0e})"
    if shifted is not None and not shifted >= SHIFTED_FACTOR * tolerance:
        return "check_void", (
            f"shifted slots differ by {shifted:.1e} only, less than {SHIFTED_FACTOR} x {tolerance:.0e}: "
            f"the adapters are too weak to tell apart"
        )
    return "ok", None

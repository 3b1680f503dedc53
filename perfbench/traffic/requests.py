"""The requests of one measurement: whose, how long, and when each is due. Free of torch.

A seed gives the same lengths, the same pattern of pauses and the same order of popular and rare tenants whatever their
number and rate are: with more of them the same requests come faster, so that a search compares like with like. All arms
get the same.
"""

from __future__ import annotations

import math
import random
from bisect import bisect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from perfbench.spec.traffic import NOBODY, Lengths, Traffic


@dataclass(frozen=True)
class Due:
    """One request. `due_s`: seconds after the start; `tenant`: NOBODY for one without an adapter."""

    due_s: float
    tenant: int
    prompt_tokens: int
    new_tokens: int


def popularity(traffic: Traffic, tenants: int) -> list[float]:
    """How many requests each of so many tenants sends beside the others."""
    if traffic.zipf_exponent is None:
        return [1.0] * tenants
    return [1 / rank**traffic.zipf_exponent for rank in range(1, tenants + 1)]


def draw(traffic: Traffic, tenants: int, rate: float, seed: str, weights: Sequence[float] | None = None) -> list[Due]:
    """`traffic.requests` requests of so many tenants, `rate` of them a second on average; 0: all due at the start, for
    a closed loop to send one after the other. weights: of each tenant, where it is not their `popularity`."""
    chance = random.Random(seed)
    cumulated = list(accumulate(popularity(traffic, tenants) if weights is None else weights))
    found, now = [], 0.0
    for number in range(traffic.requests):
        pause = _pause(traffic, chance)
        now += pause / rate if rate else 0.0
        drawn = _tenant(cumulated, chance.random())
        tenant = number % tenants if traffic.in_turn else drawn
        bare = chance.random() < traffic.without_adapter
        lengths = _length(traffic.prompt_tokens, chance), _length(traffic.new_tokens, chance)
        found.append(Due(now, NOBODY if bare else tenant, *lengths))
    return found


def all_at_once(traffic: Traffic, tenants: int, count: int, seed: str) -> list[Due]:
    """`count` such requests, all of them due at the start."""
    drawn = draw(traffic, tenants, 1.0, seed)
    again = (drawn[i % len(drawn)] for i in range(count))
    return [Due(0.0, one.tenant, one.prompt_tokens, one.new_tokens) for one in again]


def _tenant(cumulated: Sequence[float], share: float) -> int:
    """Whose request it is that lies at this share of all, in order of the tenants."""
    return min(bisect(cumulated, share * cumulated[-1]), len(cumulated) - 1)


def _pause(traffic: Traffic, chance: random.Random) -> float:
    """Until the next request, 1 on average."""
    if traffic.arrivals == "poisson":
        return chance.expovariate(1.0)
    if traffic.arrivals == "gamma":  # whose variance is burstiness x mean^2
        return chance.gammavariate(1 / traffic.burstiness, traffic.burstiness)
    return 1.0


def _length(lengths: Lengths, chance: random.Random) -> int:
    drawn = lengths.median * math.exp(chance.gauss(0.0, 1.0) * lengths.sigma)
    return max(1, round(min(lengths.most, drawn)))

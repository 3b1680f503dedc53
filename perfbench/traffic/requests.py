"""The requests of one measurement: whose, how long, and when each is due. Free of torch.

The same traffic, number of tenants, rate and seed give the same requests to every arm and on every machine.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate

from perfbench.spec.traffic import Lengths, Traffic

NOBODY = -1


@dataclass(frozen=True)
class Due:
    """One request. `due_s`: seconds after the start; `tenant`: -1 for one without an adapter."""

    due_s: float
    tenant: int
    prompt_tokens: int
    new_tokens: int


def draw(traffic: Traffic, tenants: int, rate: float, seed: str) -> list[Due]:
    """`traffic.requests` requests of so many tenants, `rate` of them a second on average."""
    chance = random.Random(f"{seed}/{tenants}/{rate!r}")
    weights = [1.0] * tenants
    if traffic.zipf_exponent is not None:
        weights = [1 / rank**traffic.zipf_exponent for rank in range(1, tenants + 1)]
    cumulated = list(accumulate(weights))
    moments = _moments(traffic, rate, chance)
    return [
        Due(
            next(moments),
            NOBODY
            if chance.random() < traffic.without_adapter
            else chance.choices(range(tenants), cum_weights=cumulated)[0],
            _length(traffic.prompt_tokens, chance),
            _length(traffic.new_tokens, chance),
        )
        for _ in range(traffic.requests)
    ]


def all_at_once(traffic: Traffic, tenants: int, count: int, seed: str) -> list[Due]:
    """The first `count` of such requests, all of them due at the start."""
    drawn = draw(traffic, tenants, 1.0, seed)
    return [Due(0.0, *_rest(drawn[i % len(drawn)])) for i in range(count)]


def _rest(due: Due) -> tuple[int, int, int]:
    return due.tenant, due.prompt_tokens, due.new_tokens


def _moments(traffic: Traffic, rate: float, chance: random.Random) -> Iterator[float]:
    """When the requests come: sums of pauses of 1 / rate seconds on average."""
    now = 0.0
    while True:
        if traffic.arrivals == "poisson":
            now += chance.expovariate(rate)
        elif traffic.arrivals == "gamma":  # whose variance is burstiness x mean^2
            now += chance.gammavariate(1 / traffic.burstiness, traffic.burstiness / rate)
        else:
            now += 1 / rate
        yield now


def _length(lengths: Lengths, chance: random.Random) -> int:
    if not lengths.sigma:
        return lengths.median
    drawn = chance.lognormvariate(math.log(lengths.median), lengths.sigma)
    return max(1, min(lengths.most, round(drawn)))

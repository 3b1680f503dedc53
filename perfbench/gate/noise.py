"""Pairs of one and the same code, for trying out what sessions make of noise: recorded ones, and simulated ones of
kinds that a recording may not hold. Free of torch.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from perfbench.gate.pairs import ARMS, Pair, pair_slowdown
from perfbench.gate.policy import Policy
from perfbench.gate.session import Slowdowns

# The pairs of one session, without end: what each says, and the seconds that it took.
Stream = Iterator[tuple[Slowdowns, float]]
Source = Callable[[random.Random], Stream]

# How much of a process's noise lasts until the next one of the same arm, where it is correlated.
CORRELATION = 0.6
# Of the processes that are slow now and then: how many, and how large both parts of their noise are.
_SPIKES, _QUIET, _SPIKE = 0.15, 0.4, 1.74


def every_role(pair: Pair, policy: Policy) -> list[Slowdowns]:
    """The slow-downs of one pair under each of the six ways to deal its three processes out to the arms."""
    cases = list(dict.fromkeys(block["case"] for block in pair["blocks"]))
    groups = [[case for case in cases if fnmatchcase(case, primary.cases)] for primary in policy.primary]
    found: list[Slowdowns] = []
    for dealt in itertools.permutations(ARMS):
        roles = dict(zip(ARMS, dealt, strict=True))
        blocks = [{"case": one["case"], **{arm: one[roles[arm]] for arm in ARMS}} for one in pair["blocks"]]
        found.append(
            {
                arm: [
                    pair_slowdown({"blocks": blocks}, primary.figure, group, arm)
                    for primary, group in zip(policy.primary, groups, strict=True)
                ]
                for arm in ("candidate", "control")
            }
        )
    return found


def recorded(pairs: Sequence[Pair], policy: Policy) -> Source:
    """Recorded pairs, drawn with replacement, their roles dealt out by chance."""
    dealt = [(every_role(pair, policy), float(pair["seconds"])) for pair in pairs]

    def stream(chance: random.Random) -> Stream:
        while True:
            roles, seconds = dealt[chance.randrange(len(dealt))]
            yield chance.choice(roles), seconds

    return stream


def _normal(chance: random.Random) -> Iterator[float]:
    while True:
        yield chance.gauss(0, 1)


def _skewed(chance: random.Random) -> Iterator[float]:
    while True:
        yield chance.expovariate(1) - 1


def _spikes(chance: random.Random) -> Iterator[float]:
    while True:
        spike = chance.expovariate(1 / _SPIKE) if chance.random() < _SPIKES else 0.0
        yield chance.gauss(0, _QUIET) + spike


def _correlated(chance: random.Random) -> Iterator[float]:
    value = chance.gauss(0, 1)
    while True:
        yield value
        value = CORRELATION * value + math.sqrt(1 - CORRELATION**2) * chance.gauss(0, 1)


# Kind of noise -> the logarithm of the time that each process of an arm takes, one after the other, of variance 1.
SIMULATED: Mapping[str, Callable[[random.Random], Iterator[float]]] = {
    "normal": _normal,
    "skewed (exponential)": _skewed,
    "normal, and 15% of processes slow": _spikes,
    f"correlated from pair to pair ({CORRELATION})": _correlated,
}


def simulated(kind: str, spread: float, policy: Policy, seconds: float) -> Source:
    """Pairs whose log ratio of two processes has the standard deviation `spread`, in each primary figure alike."""

    def stream(chance: random.Random) -> Stream:
        arms = {arm: SIMULATED[kind](chance) for arm in ARMS}
        while True:
            times = {arm: next(noise) * spread / math.sqrt(2) for arm, noise in arms.items()}
            yield (
                {arm: [times[arm] - times["baseline"]] * len(policy.primary) for arm in ("candidate", "control")},
                seconds,
            )

    return stream


def correlation(pairs: Sequence[Pair], policy: Policy) -> float:
    """Of the log ratios of pairs that followed each other, in the first primary figure: 0 where one says nothing of the
    next."""
    found = []
    for row in zip(*(every_role(pair, policy) for pair in pairs), strict=True):
        values = [role["candidate"][0] for role in row]
        centre = statistics.fmean(values)
        following = sum((one - centre) * (other - centre) for one, other in itertools.pairwise(values))
        found.append(following / sum((value - centre) ** 2 for value in values))
    return statistics.fmean(found)


def share_between_processes(pairs: Sequence[Pair], policy: Policy) -> float:
    """How much of the variance of a pair's log ratio comes from which processes they were, and not from when their
    blocks ran: two halves of a pair's blocks share the one and not the other, so that their covariance over the pairs
    is that part. Of the first primary figure; in a noisy estimate it may lie outside [0, 1]."""
    halves = [
        [every_role({"blocks": _half(pair, which)}, policy) for pair in pairs] for which in (0, 1)
    ]  # [half][pair][role]
    whole = [every_role(pair, policy) for pair in pairs]
    covariances, variances = [], []
    for role in range(len(whole[0])):
        one, other = ([pair[role]["candidate"][0] for pair in half] for half in halves)
        covariances.append(statistics.covariance(one, other))
        variances.append(statistics.variance(pair[role]["candidate"][0] for pair in whole))
    return statistics.fmean(covariances) / statistics.fmean(variances)


def _half(pair: Pair, which: int) -> list[dict[str, object]]:
    """Every other block of each case."""
    counts: dict[str, int] = {}
    found = []
    for block in pair["blocks"]:
        number = counts[block["case"]] = counts.get(block["case"], -1) + 1
        if number % 2 == which:
            found.append(block)
    return found

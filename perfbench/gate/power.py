"""How often `perfbench ab` raises a false alarm, and how often it catches a slow-down, from recorded pairs.

    perfbench ab --baseline HEAD --record --even-if-same --pairs 60 --blocks 16 --out results/gate scenarios/gate.yaml
    python -m perfbench.gate.power results/gate/pairs.jsonl --seed 0 --out results/gate/power.json

The pairs are of one revision, so that any two of a pair's three processes may stand for baseline and candidate. A
session draws its pairs with replacement and its roles at random, adds the planted effect to the candidate's log ratios,
and is judged by the very rules of a real session. What this can't show: drift from pair to pair within a session, which
drawing at random breaks up. Free of torch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import statistics
import sys
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from perfbench.errors import ComparisonError, PerfbenchError
from perfbench.gate.pairs import ARMS, Pair, pair_slowdown
from perfbench.gate.policy import Policy
from perfbench.gate.policy import load as load_policy
from perfbench.gate.session import Slowdowns, run_session

EFFECTS = (0.0, 0.03, 0.05, 0.10)
_SESSION_S = 600.0


def read_pairs(file: Path) -> list[Pair]:
    """The pairs in a pairs.jsonl. Raises ComparisonError where there are none, or a line is no pair."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ComparisonError(f"{file}: can't be read ({error}); record pairs with `perfbench ab --record`") from None
    pairs = []
    for number, line in enumerate(lines, start=1):
        try:
            pair = json.loads(line)
            for block in pair["blocks"]:
                _ = float(pair["seconds"]), block["case"], [block[arm] for arm in ARMS]
        except (ValueError, KeyError, TypeError) as error:
            raise ComparisonError(f"{file}:{number}: expected a pair, got {error!r}; record again") from None
        pairs.append(pair)
    if not pairs:
        raise ComparisonError(f"{file}: has no pairs; record some with `perfbench ab --record`")
    return pairs


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


def sessions_of(
    pairs: Sequence[Pair], policy: Policy, *, effect: float, sessions: int, size: int, seed: int
) -> list[tuple[str, float]]:
    """(verdict, seconds) of so many resampled sessions whose first batch has `size` pairs, the candidate being slower
    by the share `effect`."""
    draw, planted = random.Random(f"{seed}/{effect}"), math.log1p(effect)
    roles = [every_role(pair, policy) for pair in pairs]
    labels = [primary.cases for primary in policy.primary]
    found = []
    for _ in range(sessions):
        seconds: list[float] = []

        def batch(_name: str, count: int, seconds: list[float] = seconds) -> list[Slowdowns]:
            drawn: list[Slowdowns] = []
            for _ in range(count):
                place = draw.randrange(len(pairs))
                seconds.append(float(pairs[place]["seconds"]))
                role = draw.choice(roles[place])
                slower = [value + planted for value in role["candidate"]]
                drawn.append({"candidate": slower, "control": role["control"]})
            return drawn

        outcome = run_session(batch, policy, labels, size)
        found.append((outcome.verdict, sum(seconds)))
    return found


def share_interval(hits: int, of: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact (Clopper-Pearson) interval of a share of `hits` in `of` trials."""
    tail = (1 - confidence) / 2

    def at_least(share: float) -> float:
        """P(hits or more)."""
        return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(hits, of + 1))

    def at_most(share: float) -> float:
        return sum(math.comb(of, k) * share**k * (1 - share) ** (of - k) for k in range(hits + 1))

    low = 0.0 if hits == 0 else _root(lambda share: at_least(share) - tail)
    high = 1.0 if hits == of else _root(lambda share: tail - at_most(share))
    return low, high


def _root(rising: Any) -> float:
    """Where a function that rises from below 0 to above 0 on [0, 1] crosses 0, by halving."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if rising(middle) > 0 else (middle, high)
    return (low + high) / 2


def experiment(
    pairs: Sequence[Pair], policy: Policy, *, effects: Sequence[float], sessions: int, size: int, seed: int
) -> dict[str, Any]:
    """The table as plain data: for each planted effect the verdicts, the share of failures with its exact interval,
    in all sessions and in those of ten minutes, beside the spread of the pairs."""
    rows = []
    for effect in effects:
        found = sessions_of(pairs, policy, effect=effect, sessions=sessions, size=size, seed=seed)
        verdicts = Counter(verdict for verdict, _ in found)
        failed = verdicts["regression"]
        in_time = sum(verdict == "regression" and seconds <= _SESSION_S for verdict, seconds in found)
        rows.append(
            {
                "effect": effect,
                "verdicts": dict(sorted(verdicts.items())),
                "failed": failed / sessions,
                "failed_interval": share_interval(failed, sessions),
                "failed_in_ten_minutes": in_time / sessions,
                "median_session_s": statistics.median(seconds for _, seconds in found),
            }
        )
    logs = [every_role(pair, policy)[0]["candidate"] for pair in pairs]
    return {
        "pairs": len(pairs),
        "median_pair_s": statistics.median(float(pair["seconds"]) for pair in pairs),
        "spread_of_log_ratios": {
            f"{primary.figure} ({primary.cases})": _spread([row[place] for row in logs])
            for place, primary in enumerate(policy.primary)
        },
        "first_batch": size,
        "sessions": sessions,
        "seed": seed,
        "rows": rows,
    }


def _spread(logs: Sequence[float]) -> float | None:
    return statistics.stdev(logs) if len(logs) > 1 else None


def render(found: dict[str, Any]) -> str:
    """The experiment as Markdown."""
    known = {name: value for name, value in found["spread_of_log_ratios"].items() if value is not None}
    spreads = ", ".join(f"{name} {value:.2%}" for name, value in known.items())
    lines = [
        f"{found['sessions']} sessions for each effect, resampled from {found['pairs']} pairs of one revision "
        f"({found['median_pair_s']:.0f} s each; first batch {found['first_batch']}; seed {found['seed']}).",
        f"Spread (standard deviation) of a pair's log ratio: {spreads or 'one pair has none'}.",
        "",
        "| slower by | FAIL (95% interval) | FAIL within ten minutes | PASS | INCONCLUSIVE | void | median session |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        share = {name: row["verdicts"].get(name, 0) / found["sessions"] for name in ("pass", "inconclusive", "fault")}
        low, high = row["failed_interval"]
        lines.append(
            f"| {row['effect']:.0%} | {row['failed']:.1%} [{low:.1%}, {high:.1%}] "
            f"| {row['failed_in_ten_minutes']:.1%} | {share['pass']:.1%} | {share['inconclusive']:.1%} "
            f"| {share['fault']:.1%} | {row['median_session_s']:.0f} s |"
        )
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m perfbench.gate.power PAIRS`; exit code 0, or 2 on input that can't be used."""
    parser = argparse.ArgumentParser(prog="python -m perfbench.gate.power", description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, help="pairs.jsonl of `perfbench ab --record` on one revision")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--effects", type=float, nargs="+", default=EFFECTS, metavar="SHARE")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--first-batch", type=int, default=12, metavar="N")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = experiment(
            read_pairs(arguments.pairs),
            load_policy(arguments.policy),
            effects=arguments.effects,
            sessions=arguments.sessions,
            size=arguments.first_batch,
            seed=arguments.seed,
        )
    except PerfbenchError as error:
        print(f"perfbench: {error}", file=sys.stderr)
        return 2
    print(render(found), end="")
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

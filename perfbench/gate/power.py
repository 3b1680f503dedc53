"""How often `perfbench ab` raises a false alarm, and how often it catches a slow-down, from recorded pairs.

    perfbench ab --baseline HEAD --policy .github/perfbench-policy.yaml --record --even-if-same --pairs 64 \\
        --out results/gate scenarios/gate.yaml
    python -m perfbench.gate.power results/gate/pairs.jsonl --first-batch 12 8 16 24 --simulate --out power.json

The pairs are of one revision, so that any two of a pair's three processes may stand for baseline and candidate. A
session draws its pairs with replacement and its roles at random, adds the planted effect to the candidate's log ratios,
and is judged by the very rules of a real session. What the recorded pairs can't show, drift from pair to pair and noise
of other shapes, simulated ones do. Free of torch.
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
from pathlib import Path
from typing import Any

from perfbench.errors import ComparisonError, PerfbenchError
from perfbench.gate.noise import (
    SIMULATED,
    Source,
    Stream,
    correlation,
    every_role,
    recorded,
    share_between_processes,
    simulated,
)
from perfbench.gate.pairs import ARMS, Pair
from perfbench.gate.policy import Policy
from perfbench.gate.policy import load as load_policy
from perfbench.gate.session import Slowdowns, run_session

EFFECTS = (0.0, 0.03, 0.05, 0.10)
_SESSION_S = 600.0


def read_pairs(file: Path) -> list[Pair]:
    """The pairs in a pairs.jsonl but those that were dropped. Raises ComparisonError where there are none, or a line is
    no pair."""
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
        if "dropped" not in pair:
            pairs.append(pair)
    if not pairs:
        raise ComparisonError(f"{file}: has no pairs; record some with `perfbench ab --record`")
    return pairs


def sessions_of(
    source: Source, policy: Policy, *, effect: float, sessions: int, size: int, seed: int
) -> list[tuple[str, float]]:
    """(verdict, seconds) of so many sessions over pairs of `source`, the first batch having `size` of them, and the
    candidate being slower by the share `effect`."""
    chance, planted = random.Random(f"{seed}/{effect}"), math.log1p(effect)
    labels = [primary.cases for primary in policy.primary]
    found = []
    for _ in range(sessions):
        stream, took = source(chance), list[float]()

        def batch(_name: str, count: int, stream: Stream = stream, took: list[float] = took) -> list[Slowdowns]:
            drawn: list[Slowdowns] = []
            for pair, seconds in itertools.islice(stream, count):
                took.append(seconds)
                slower = [value + planted for value in pair["candidate"]]
                drawn.append({"candidate": slower, "control": pair["control"]})
            return drawn

        outcome = run_session(batch, policy, labels, size)
        found.append((outcome.verdict, sum(took)))
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
    pairs: Sequence[Pair],
    policy: Policy,
    *,
    effects: Sequence[float],
    sessions: int,
    sizes: Sequence[int],
    seed: int,
    simulate: bool = False,
) -> dict[str, Any]:
    """The tables as plain data. rows: for each planted effect what the sessions said whose first batch has the first
    of `sizes`; curve: the row of the least of `effects` that is past the least effect that matters, for each size;
    simulated: for each kind of noise, as large as that of the pairs, the rows of no effect, of the least effect that
    matters, and of that one past it. Beside them the spread of the pairs."""
    size, median_pair_s = sizes[0], statistics.median(float(pair["seconds"]) for pair in pairs)
    logs = [every_role(pair, policy)[0]["candidate"] for pair in pairs]
    spreads = [_spread([row[place] for row in logs]) for place in range(len(policy.primary))]
    source = recorded(pairs, policy)

    def rows(source: Source, size: int, effects: Sequence[float]) -> list[dict[str, Any]]:
        return [_row(source, policy, effect=effect, sessions=sessions, size=size, seed=seed) for effect in effects]

    noises = SIMULATED if simulate and spreads[0] else ()
    limit = policy.primary[0].least_effect
    past = sorted(effect for effect in effects if effect > limit)[:1]
    return {
        "pairs": len(pairs),
        "median_pair_s": median_pair_s,
        "spread_of_log_ratios": {
            f"{primary.figure} ({primary.cases})": spread
            for primary, spread in zip(policy.primary, spreads, strict=True)
        },
        "share_between_processes": share_between_processes(pairs, policy) if len(pairs) > 1 else None,
        "correlation": correlation(pairs, policy) if len(pairs) > 1 else None,
        "least_effect": limit,
        "first_batch": size,
        "sessions": sessions,
        "seed": seed,
        "rows": rows(source, size, effects),
        "curve": [{"first_batch": other, **row} for other in sorted(sizes) for row in rows(source, other, past)],
        "simulated": {
            kind: rows(simulated(kind, spreads[0] or 0.0, policy, median_pair_s), size, (0.0, limit, *past))
            for kind in noises
        },
    }


def _row(source: Source, policy: Policy, *, effect: float, sessions: int, size: int, seed: int) -> dict[str, Any]:
    """What so many sessions say of one effect."""
    found = sessions_of(source, policy, effect=effect, sessions=sessions, size=size, seed=seed)
    verdicts = Counter(verdict for verdict, _ in found)
    failed = verdicts["regression"]
    in_time = sum(verdict == "regression" and seconds <= _SESSION_S for verdict, seconds in found)
    return {
        "effect": effect,
        "verdicts": dict(sorted(verdicts.items())),
        "failed": failed / sessions,
        "failed_interval": share_interval(failed, sessions),
        "failed_in_ten_minutes": in_time / sessions,
        "median_session_s": statistics.median(seconds for _, seconds in found),
    }


def _spread(logs: Sequence[float]) -> float | None:
    return statistics.stdev(logs) if len(logs) > 1 else None


def render(found: dict[str, Any]) -> str:
    """The experiment as Markdown."""
    known = {name: value for name, value in found["spread_of_log_ratios"].items() if value is not None}
    spreads = ", ".join(f"{name} {value:.2%}" for name, value in known.items())
    between, following = found["share_between_processes"], found["correlation"]
    said = (
        ""
        if between is None or not known
        else (
            f"; {between:.0%} of its variance lies between processes, and the correlation of a pair with the next is "
            f"{following:.2f}"
        )
    )
    lines = [
        f"{found['sessions']} sessions for each effect, resampled from {found['pairs']} pairs of one revision "
        f"({found['median_pair_s']:.0f} s each; first batch {found['first_batch']}; seed {found['seed']}).",
        f"Spread (standard deviation) of a pair's log ratio: {spreads or 'one pair has none'}{said}.",
        "",
        "| slower by | FAIL (95% interval) | FAIL within ten minutes | PASS | INCONCLUSIVE | void | median session |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in found["rows"]:
        passed, inconclusive, void = (_said(row, found, name) for name in ("pass", "inconclusive", "fault"))
        lines.append(
            f"| {row['effect']:.0%} | {_failed(row)} | {row['failed_in_ten_minutes']:.1%} | {passed:.1%} "
            f"| {inconclusive:.1%} | {void:.1%} | {row['median_session_s']:.0f} s |"
        )
    if len(found["curve"]) > 1:
        lines += ["", f"How long it takes to catch {found['curve'][0]['effect']:.0%}:", ""]
        lines += [
            "| first batch | FAIL (95% interval) | FAIL within ten minutes | median session |",
            "| ---: | ---: | ---: | ---: |",
        ]
        lines += [
            f"| {row['first_batch']} pairs | {_failed(row)} | {row['failed_in_ten_minutes']:.1%} "
            f"| {row['median_session_s']:.0f} s |"
            for row in found["curve"]
        ]
    if found["simulated"]:
        limit = found["least_effect"]
        lines += ["", "The same with simulated noise of that spread:", ""]
        lines += [
            f"| noise of a process | FAIL at 0% | PASS at {limit:.0%} | FAIL at {limit:.0%} | FAIL past it |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        lines += [_simulated(kind, rows, found) for kind, rows in found["simulated"].items()]
    return "\n".join(lines) + "\n"


def _said(row: dict[str, Any], found: dict[str, Any], verdict: str) -> float:
    share: float = row["verdicts"].get(verdict, 0) / found["sessions"]
    return share


def _failed(row: dict[str, Any]) -> str:
    low, high = row["failed_interval"]
    return f"{row['failed']:.1%} [{low:.1%}, {high:.1%}]"


def _simulated(kind: str, rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    """A line: what is wrong in both directions, and what is caught."""
    none, limit, *past = rows
    caught = ", ".join(f"{one['failed']:.1%} ({one['effect']:.0%})" for one in past)
    return (
        f"| {kind} | {none['failed']:.1%} | {_said(limit, found, 'pass'):.1%} | {limit['failed']:.1%} "
        f"| {caught or '-'} |"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m perfbench.gate.power PAIRS`; exit code 0, or 2 on input that can't be used."""
    parser = argparse.ArgumentParser(prog="python -m perfbench.gate.power", description=__doc__.split("\n")[0])
    parser.add_argument("pairs", type=Path, help="pairs.jsonl of `perfbench ab --record` on one revision")
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--effects", type=float, nargs="+", default=EFFECTS, metavar="SHARE")
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--first-batch", type=int, nargs="+", default=(12,), metavar="N", help="the sizes of the curve")
    parser.add_argument("--simulate", action="store_true", help="also with noise of kinds that were not recorded")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, metavar="FILE", help="the table as JSON")
    arguments = parser.parse_args(argv)
    try:
        found = experiment(
            read_pairs(arguments.pairs),
            load_policy(arguments.policy),
            effects=arguments.effects,
            sessions=arguments.sessions,
            sizes=arguments.first_batch,
            seed=arguments.seed,
            simulate=arguments.simulate,
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

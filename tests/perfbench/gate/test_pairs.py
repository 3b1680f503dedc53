"""One pair: how its processes start, in which order they take turns, and what it says."""

from __future__ import annotations

import math
import random
import sys
from pathlib import Path

import pytest

from perfbench.gate.pairs import ARMS, balanced_orders, measure_pair, pair_slowdown
from perfbench.gate.revisions import Revision

# A side that says in a file when it gets its job and when it is warm.
WARMING = """
import json, sys, time
job = json.loads(sys.stdin.readline())
with open(sys.argv[1], "a") as told:
    told.write("job\\n")
time.sleep(0.2)
with open(sys.argv[1], "a") as told:
    told.write("warm\\n")
print(json.dumps({"event": "ready", "cases": ["c"], "requests": 1}), flush=True)
sample = {"total_ms": 2, "ttft_ms": 1, "itl_ms": [1], "decode_tokens_per_s": 1e3, "tokens_per_s": 1e3}
for line in sys.stdin:
    print(json.dumps({"event": "block", "samples": [sample]}), flush=True)
"""


def test_the_processes_of_a_pair_warm_up_one_after_the_other(tmp_path: Path) -> None:
    """At once their threads would wait for each other, the longer the less cores there are."""
    (tmp_path / "side.py").write_text(WARMING)
    command = (sys.executable, str(tmp_path / "side.py"), str(tmp_path / "told"))
    side = Revision("side", "", tmp_path, Path(), "", command)
    pair = measure_pair(
        {"baseline": side, "candidate": side}, {"prepare": False}, ["c"], 1,
        blocks=1, repetitions=1, seed="0", log=tmp_path / "log",
    )  # fmt: skip
    assert len(pair["blocks"]) == 1
    assert (tmp_path / "told").read_text().split() == ["job", "warm"] * 3


def test_every_arm_stands_at_every_place_equally_often() -> None:
    orders = balanced_orders(12, random.Random(0))
    for place in range(3):
        assert {arm: sum(order[place] == arm for order in orders) for arm in ARMS} == dict.fromkeys(ARMS, 4)
    assert balanced_orders(6, random.Random(0)) != balanced_orders(6, random.Random(1))


def test_a_disturbed_block_does_not_move_a_pair() -> None:
    def block(candidate: float) -> dict[str, object]:
        figures = {"baseline": 100.0, "control": 100.0, "candidate": candidate}
        return {"case": "c", **{arm: {"decode_tokens_per_s": value} for arm, value in figures.items()}}

    even = {"blocks": [block(100 / 1.05)] * 10}
    disturbed = {"blocks": [block(100 / 1.05)] * 8 + [block(20), block(500)]}
    for pair in (even, disturbed):
        assert math.expm1(pair_slowdown(pair, "decode_tokens_per_s", ["c"], "candidate")) == pytest.approx(0.05)

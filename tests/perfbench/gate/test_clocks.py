"""What a GPU's clock spoils is dropped by rules that no timing can sway: on pairs made for each rule, and on commands
that pretend to have a GPU."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.gate import clocks
from perfbench.gate.pairs import ARMS
from perfbench.gate.power import read_pairs
from perfbench.machine.nvml import CLOCK_REASONS
from tests.perfbench.gate.runs import ROOT

BLOCKS = 10
# The benchmark of the documentation, on a GPU. Beside its time it is told the clock in MHz, and in which of its starts
# the GPU is too hot: their numbers, `all` or nothing.
SIDE = (
    (ROOT / "docs" / "examples" / "own_benchmark.py")
    .read_text(encoding="utf-8")
    .replace("**speed}", "**speed, **gpu()}")
    .replace(
        "job = json",
        """
STARTS = open("starts", "a+")


def gpu():
    STARTS.seek(0)
    hot = sys.argv[3:] == ["all"] or str(STARTS.read().count("x")) in sys.argv[3:]
    reasons = ["sw_power_cap", *(["hw_thermal_slowdown"] if hot else [])]
    return {"sm_clock_mhz": float(sys.argv[2]), "throttle_reasons": reasons}


job = json""",
    )
    .replace(
        "for line in sys.stdin:",
        """if sys.argv[3:] and not job["prepare"]:
    STARTS.write("x")
    STARTS.flush()
for line in sys.stdin:""",
    )
)


def pair(changed: dict[str, Any] | None = None, *, arm: str = "candidate", blocks: int = BLOCKS) -> dict[str, Any]:
    """A pair at 1980 MHz whose first `blocks` are `changed` in one arm."""
    sound = {"sm_clock_mhz": 1980.0, "slowed_by": []}
    made = [
        {"case": "c", "clocks": {one: sound | (changed or {} if one == arm and place < blocks else {}) for one in ARMS}}
        for place in range(BLOCKS)
    ]
    return {"blocks": made}


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (pair(), None),
        (pair({"sm_clock_mhz": 1965.0}), None),  # one step of a real card
        (pair({"sm_clock_mhz": 1950.0}), "candidate: SM clock -1.5% against the baseline's in c"),
        (pair({"sm_clock_mhz": 2010.0}), "candidate: SM clock +1.5% against the baseline's in c"),
        (pair({"sm_clock_mhz": 1950.0}, arm="control"), "control: SM clock -1.5% against the baseline's in c"),
        (pair({"sm_clock_mhz": 1950.0}, arm="baseline"), "candidate: SM clock +1.5% against the baseline's in c"),
        (pair({"sm_clock_mhz": 300.0}, blocks=2), None),  # read when the GPU was idle: a slow-down is trimmed likewise
        (pair({"sm_clock_mhz": 1500.0}, blocks=4), "candidate: SM clock -8.8% against the baseline's in c"),
        (pair({"sm_clock_mhz": None}), None),
        (pair({"slowed_by": ["hw_slowdown"]}, blocks=1), None),
        (pair({"slowed_by": ["hw_slowdown"]}, blocks=2), "candidate: hw_slowdown in 2 of 10 blocks"),
        (pair({"slowed_by": ["hw_slowdown"]}, arm="control"), "control: hw_slowdown in 10 of 10 blocks"),
        ({"blocks": [{"case": "c", "baseline": {}, "candidate": {}, "control": {}}]}, None),
    ],
)
def test_which_pairs_are_dropped(made: dict[str, Any], words: str | None) -> None:
    assert clocks.why_dropped(made, ARMS) == words


def test_one_case_of_many_is_enough() -> None:
    slow = pair({"sm_clock_mhz": 1780.0})
    others = [block | {"case": f"other-{number}"} for number in range(9) for block in pair()["blocks"]]
    assert clocks.why_dropped({"blocks": [*others, *slow["blocks"]]}, ARMS) == (
        "candidate: SM clock -10.1% against the baseline's in c"
    )


def test_what_a_block_keeps() -> None:
    def sample(clock: float | None, *reasons: str) -> dict[str, Any]:
        return {"sm_clock_mhz": clock, "throttle_reasons": list(reasons)}

    hot = [sample(1980.0, "gpu_idle", "sw_power_cap"), sample(1500.0, "hw_thermal_slowdown"), sample(None)]
    assert clocks.of_block(hot) == {"sm_clock_mhz": 1740.0, "slowed_by": ["hw_thermal_slowdown"]}
    assert clocks.of_block([sample(0.0, "gpu_idle")]) == {"sm_clock_mhz": None, "slowed_by": []}
    assert clocks.of_block([{"sm_clock_mhz": None, "throttle_reasons": None}]) is None, "a CPU has no clock"
    assert clocks.of_block([]) is None
    assert set(CLOCK_REASONS.values()) >= clocks.SLOWING


@pytest.mark.parametrize(("pairs", "allowed"), [(8, 2), (9, 3), (12, 3), (24, 6)])
def test_a_quarter_of_a_batch_may_be_dropped(pairs: int, allowed: int) -> None:
    assert clocks.allowed(pairs) == allowed


def ab(folder: Path, monkeypatch: pytest.MonkeyPatch, candidate: str, baseline: str = "100 1980") -> int:
    monkeypatch.chdir(folder)
    (folder / "own.py").write_text(SIDE)
    (folder / "scenario.yaml").write_text("")
    arms = {"baseline": baseline, "candidate": candidate}
    sides = [f"--{arm}=command: {sys.executable} own.py {how}" for arm, how in arms.items()]
    return main(["ab", *sides, "scenario.yaml", "--out", "out", "--pairs", "8", "--blocks", "2", "--write=json=r.json"])


def reported(folder: Path) -> tuple[str, list[str]]:
    """The reason of the verdict, and the notes about clocks."""
    report = json.loads((folder / "r.json").read_text())
    return report["reason"], [note for note in report["notes"] if "clock" in note]


@pytest.mark.parametrize(
    ("candidate", "code", "reason", "note"),
    [
        ("100 1980", 0, "decode_tokens_per_s no worse", None),
        # Slower at the same clock is a regression on a GPU too, and a card at its power limit is no throttled one.
        ("110 1980", 1, "slower by +10.0%", None),
        # The clock alone explains it.
        ("110 1800", 4, "3 of 3 pairs dropped (candidate: SM clock -9.1% against the baseline's in chat)", None),
        # Lower, and by too little to drop a pair.
        ("101 1965", 0, "decode_tokens_per_s no worse", "each of 8 pairs (-0.8%): it may draw more power"),
    ],
)
def test_what_becomes_of_a_candidate_with_a_lower_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, candidate: str, code: int, reason: str, note: str | None
) -> None:
    assert ab(tmp_path, monkeypatch, candidate) == code
    why, notes = reported(tmp_path)
    assert reason in why
    assert [note is not None and note in one for one in notes] == ([True] if note else [])
    if code == 4:
        assert why.startswith("the GPU's clock: ")
        assert "the candidate's SM clock was lower than the baseline's in each of 3 pairs (-9.1%)" in why
        assert "nvidia-smi -lgc" in why


def test_a_throttled_pair_is_measured_anew_and_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ab(tmp_path, monkeypatch, "100 1980 3") == 0
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs.jsonl").read_text().splitlines()]
    dropped = "candidate: hw_thermal_slowdown in 2 of 2 blocks"
    assert [pair.get("dropped") for pair in pairs] == [None, None, dropped, *[None] * 6]
    assert len({pair["seed"] for pair in pairs}) == 9
    assert reported(tmp_path)[1] == [f"the GPU's clock: 1 of 9 pairs dropped ({dropped})"]
    assert len(read_pairs(tmp_path / "out" / "pairs.jsonl")) == 8, "the experiment leaves it out"


def test_a_gpu_that_is_always_throttled_makes_the_run_void(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Although both sides are as slow as each other."""
    assert ab(tmp_path, monkeypatch, "100 1980 all", baseline="100 1980 all") == 4
    why, _ = reported(tmp_path)
    assert "3 of 3 pairs dropped (baseline: hw_thermal_slowdown in 2 of 2 blocks); this run is void: lock the" in why
    assert (tmp_path / "out" / "pairs.jsonl").read_text().count("dropped") == 3

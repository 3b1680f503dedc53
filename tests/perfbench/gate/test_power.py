"""The resampled sessions: the same seed gives the same table, and the table knows a quiet machine from a loud one."""

from __future__ import annotations

import json
import math
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import ComparisonError
from perfbench.gate import policy
from perfbench.gate.noise import CORRELATION, SIMULATED, correlation, share_between_processes
from perfbench.gate.pairs import ARMS
from perfbench.gate.power import experiment, main, read_pairs, render, share_interval

RULES = policy.load(None)


def pairs_file(folder: Path, spread: float, count: int = 30) -> Path:
    """Pairs of one revision whose processes differ by `spread`, each of two cases and two blocks."""
    draw = random.Random(2)
    lines = []
    for _ in range(count):
        process = {arm: draw.gauss(0, spread) for arm in ARMS}
        blocks = [
            {"case": case, **{arm: {"decode_tokens_per_s": 100 * math.exp(process[arm])} for arm in ARMS}}
            for case in ("x/lora", "x/ia3")
            for _ in range(2)
        ]
        lines.append(json.dumps({"seconds": 10.0, "blocks": blocks}))
    file = folder / "pairs.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def table(file: Path, **how: Any) -> dict[float, dict[str, Any]]:
    options = {"effects": (0.0, 0.05, 0.10), "sessions": 100, "sizes": [12], "seed": 0} | how
    return {row["effect"]: row for row in experiment(read_pairs(file), RULES, **options)["rows"]}


def test_a_quiet_machine_catches_and_never_cries(tmp_path: Path) -> None:
    rows = table(pairs_file(tmp_path, 0.005))
    assert rows[0.0]["verdicts"] == {"pass": 100}
    assert rows[0.05]["failed"] >= 0.95
    assert rows[0.10]["failed"] >= 0.95
    assert rows[0.10]["median_session_s"] == 240


def test_a_loud_machine_is_inconclusive_and_does_not_cry(tmp_path: Path) -> None:
    rows = table(pairs_file(tmp_path, 0.08))
    assert rows[0.0]["verdicts"].get("regression", 0) == 0
    assert rows[0.05]["verdicts"]["inconclusive"] > 50
    assert rows[0.0]["verdicts"].get("pass", 0) < 100


def test_the_seed_decides(tmp_path: Path) -> None:
    file = pairs_file(tmp_path, 0.03)
    assert table(file) == table(file)
    assert table(file) != table(file, seed=1)


def test_longer_batches_catch_more(tmp_path: Path) -> None:
    """The curve has a row for each size, of the first effect past the least one that matters."""
    found = experiment(
        read_pairs(pairs_file(tmp_path, 0.012)), RULES, effects=(0.0, 0.05, 0.10), sessions=100, sizes=[8, 24], seed=0
    )
    assert [(row["first_batch"], row["effect"]) for row in found["curve"]] == [(8, 0.05), (24, 0.05)]
    assert found["curve"][0]["failed"] < found["curve"][1]["failed"]
    assert "| 24 pairs |" in render(found)


def test_simulated_noise_is_as_large_as_it_is_said(tmp_path: Path) -> None:
    """Every kind has variance 1, and only the correlated one tells of the pair that follows."""
    for kind, noise in SIMULATED.items():
        stream = noise(random.Random(3))
        values = [next(stream) for _ in range(20_000)]
        assert statistics.fmean(values) == pytest.approx(0, abs=0.3), kind
        assert statistics.stdev(values) == pytest.approx(1, abs=0.05), kind
        following = statistics.correlation(values, values[1:] + values[:1])
        assert following == pytest.approx(CORRELATION if "correlated" in kind else 0, abs=0.03), kind
    rows = experiment(
        read_pairs(pairs_file(tmp_path, 0.01)), RULES,
        effects=(0.0, 0.03, 0.05), sessions=50, sizes=[8], seed=0, simulate=True,
    )  # fmt: skip
    assert set(rows["simulated"]) == set(SIMULATED)
    assert "| skewed (exponential) | 0.0% |" in render(rows)


def test_where_the_variance_lies(tmp_path: Path) -> None:
    """All of it between processes, or none, by what is planted; and what follows from a pair for the next."""
    pairs = read_pairs(pairs_file(tmp_path, 0.01))
    assert share_between_processes(pairs, RULES) == pytest.approx(1)
    assert abs(correlation(pairs, RULES)) < 0.4
    draw = random.Random(4)
    for pair in pairs:
        for block in pair["blocks"]:
            for arm in ARMS:
                block[arm]["decode_tokens_per_s"] = 100 * math.exp(draw.gauss(0, 0.01))
    assert abs(share_between_processes(pairs, RULES)) < 0.4
    slower = 0.0
    for pair in pairs:  # the candidate drifts away
        slower += 0.01
        for block in pair["blocks"]:
            block["candidate"]["decode_tokens_per_s"] *= 1 - slower
    assert correlation(pairs, RULES) > 0.6


def test_the_exact_interval_of_a_share() -> None:
    """Values of printed tables: 0 of 10, 5 of 10 and 10 of 10 at 95%."""
    assert share_interval(0, 10) == pytest.approx((0.0, 0.3085), abs=1e-4)
    assert share_interval(5, 10) == pytest.approx((0.1871, 0.8129), abs=1e-4)
    assert share_interval(10, 10) == pytest.approx((0.6915, 1.0), abs=1e-4)
    low, high = share_interval(800, 1000)
    assert low < 0.8 < high
    assert high - low < 0.06


def test_the_command_prints_and_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = pairs_file(tmp_path, 0.005)
    out = tmp_path / "power.json"
    assert main([str(file), "--sessions", "20", "--effects", "0", "0.1", "--out", str(out)]) == 0
    assert "| 10% | 100.0% [83.2%, 100.0%]" in capsys.readouterr().out
    assert json.loads(out.read_text())["seed"] == 0


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"seconds": 1, "blocks": [{"case": "x"}]}'])
def test_what_is_no_pair_is_refused(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "pairs.jsonl"
    file.write_text(text)
    with pytest.raises(ComparisonError, match=r"pairs\.jsonl"):
        read_pairs(file)
    assert main([str(file)]) == 2
    assert main([str(tmp_path / "none")]) == 2
    assert "Traceback" not in capsys.readouterr().err

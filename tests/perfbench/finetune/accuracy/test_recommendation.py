"""What to serve, from a committed experiment and a committed run of the same model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.finetune.accuracy import recommendation
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.report.read import Run, read_runs

RESULTS = Path(__file__).resolve().parents[4] / "results"


@pytest.fixture(scope="module")
def judged() -> tuple[dict[str, Any], Verdict]:
    folder = AccuracyFolder.open(RESULTS / "smollm2-copa")
    return folder.manifest, folder.judge()


@pytest.fixture
def run() -> Run:
    (found,) = read_runs([RESULTS / "cpu-real-135m"])
    return found


def test_the_smallest_tenant_of_the_fastest_is_chosen(judged: tuple[dict[str, Any], Verdict], run: Run) -> None:
    first, *rest = recommendation.sentences(*judged, run)
    assert first.startswith("Recommended for smollm2-135m: ia3. It was not shown to be less accurate, keeps 96.3% of")
    assert "a tie with para, whose tenants are larger, and a tenant takes" in first
    assert rest[0].startswith("lora keeps 84.9%, and a tenant takes 4.7 MiB.")
    assert rest.pop(1).endswith("raised the loss of other answers, in nats a token, ia3 by +0.799 and lora by +0.101.")
    # The search's setting, and (IA)3 on all linears, were not measured; AdaLoRA is served as LoRA is.
    assert rest[1].endswith("with the options that were trained: fanlora, ia3-all, adalora.")
    assert "with 50 test items and 3 seeds, a loss of accuracy of less than about 15 points" in rest[2]


def test_a_method_that_is_worse_or_served_otherwise_is_not(judged: tuple[dict[str, Any], Verdict], run: Run) -> None:
    manifest, verdict = judged
    worse = replace(
        verdict,
        methods=[replace(row, verdict="inferior") if row.method == "ia3" else row for row in verdict.methods],
        paths=[replace(row, verdict="differs") if row.method == "para" else row for row in verdict.paths],
    )
    first = next(recommendation.sentences(manifest, worse, run))
    assert first.startswith("Recommended for smollm2-135m: lora. ")


def test_nothing_is_said_of_two_backbones(judged: tuple[dict[str, Any], Verdict]) -> None:
    (other,) = read_runs([RESULTS / "cpu-multitenant"])
    assert list(recommendation.sentences(*judged, other)) == []


def test_the_page_of_a_stored_experiment_takes_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    stored, speeds = str(RESULTS / "smollm2-copa"), str(RESULTS / "cpu-real-135m")
    assert main(["report", stored, "--run", speeds, "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "What to serve" in text
    assert "Without a speed in cpu-real-135m: adalora." in text
    assert "Measured in cpu-real-135m with other options than were trained: fanlora, ia3-all." in text
    assert main(["report", speeds, "--run", speeds, "--out", str(tmp_path / "other.html")]) == 2
    assert "--run: adds speeds to an accuracy run, which is not given" in capsys.readouterr().err

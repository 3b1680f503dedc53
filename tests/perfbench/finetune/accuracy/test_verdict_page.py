"""The page and the table: what they join, the front, what they say that was not measured, and a real browser."""

from __future__ import annotations

import json
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.errors import RunDirectoryError
from perfbench.finetune.accuracy import verdict_page, verdict_table, verdict_words
from perfbench.finetune.accuracy.accuracy_folder import AccuracyFolder
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.finetune.accuracy.verdict_page import Point, front
from tests.browser import Browser

RUN = Path(__file__).resolve().parents[4] / "results" / "cpu-multitenant"
Finished = tuple[Path, Path, Verdict]


def test_the_front_is_what_nothing_beats_in_all_three() -> None:
    slow_and_good, fast_and_bad = Point("a", 90, 10, 100), Point("b", 80, 20, 100)
    beaten, small = Point("c", 79, 19, 100), Point("d", 70, 5, 50)
    assert front([slow_and_good, beaten, fast_and_bad, small]) == [small, slow_and_good, fast_and_bad]
    assert front([slow_and_good, Point("twin", 90, 10, 100)]) == [slow_and_good, Point("twin", 90, 10, 100)]
    assert front([Point("x", 90, 10, None), Point("y", 90, 11, None)]) == [Point("y", 90, 11, None)]


def charts_in(html: str) -> list[dict[str, Any]]:
    data = html.split('<script type="application/json" id="data">')[1].split("</script>")[0]
    return [chart for several in json.loads(data)["charts"] for chart in several]


def test_it_joins_accuracy_with_the_speed_and_memory_of_the_same_method(finished: Finished) -> None:
    _, out, verdict = finished
    run = verdict_page.read_run(RUN, {"lora", "para"})
    manifest = AccuracyFolder.open(out).manifest
    html = verdict_page.render(manifest, verdict, run)
    joined = [chart for chart in charts_in(html) if chart["title"] == "sums: accuracy against speed against memory"]
    assert len(joined) == len(run.manifest["comparisons"])
    for chart, comparison in zip(joined, run.manifest["comparisons"], strict=True):
        assert [row[0] for row in chart["rows"]] == ["lora", "fanlora", "ia3", "para"]
        for name, speed, score, *_, peak_mib, _front in chart["rows"]:
            case = run.manifest["cases"][f"{comparison['id']}/{name}-eager"]
            assert speed == pytest.approx(case["summary"]["decode_tokens_per_s"]["median"], rel=1e-4)
            assert peak_mib == pytest.approx(case["memory"]["peak_allocated_bytes"] / 2**20, rel=1e-4)
            row = next(row for row in verdict.methods if row.method == name)
            assert score == pytest.approx(row.test.median * 100)
        assert any(row[-1] == "yes" for row in chart["rows"])
    assert "speed on another backbone" in html, "the run's backbone is not that of the fine-tuning"
    assert "Left out: static-triton-fp32, static-triton-bf16" in html
    assert "Accuracy could not tell these methods from lora: choose among them by cost." in html
    assert "With 6 items and 2 seeds nothing is said of a difference" in html


def test_only_what_equals_the_trained_model_is_left_out_of_the_differences(finished: Finished) -> None:
    """A path that gives another served path's answers may differ from what was trained in bf16."""
    _, out, verdict = finished
    manifest = AccuracyFolder.open(out).manifest

    def shown(of: Verdict) -> set[str]:
        charts = charts_in(verdict_page.render(manifest, of, None))
        return {row[0] for chart in charts if chart["title"].startswith("Difference to") for row in chart["rows"]}

    assert "para, static-eager-fp32" not in shown(verdict)
    paths = tuple(replace(row, anchor="transformers-eager-fp32") for row in verdict.paths)
    assert "para, static-eager-fp32" in shown(replace(verdict, paths=paths))


def test_small_scale_claims_no_ranking(finished: Finished) -> None:
    said = " ".join(verdict_words.findings(finished[2]))
    assert "can&#39;t be told" not in said
    assert "fanlora, ia3, para can't be told from lora: the intervals include 0" in said
    assert "that ranking is neither confirmed nor refuted by this run" in said


def test_without_a_run_it_says_that_speeds_are_missing(finished: Finished) -> None:
    html = (finished[1] / "index.html").read_text()
    assert "No speeds: give a `perfbench run` directory" in html
    assert not any("speed" in chart["title"] for chart in charts_in(html))
    assert any("trained parameters" in chart["title"] for chart in charts_in(html))


def test_names_are_text_and_never_markup(finished: Finished) -> None:
    manifest = AccuracyFolder.open(finished[1]).manifest | {"name": "<b>x</b>", "question": "<script>alert(1)</script>"}
    html = verdict_page.render(manifest, finished[2], None)
    assert "<b>x" not in html
    assert "<script>alert" not in html


def test_a_run_that_is_none_is_refused(finished: Finished, tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="no such folder"):
        verdict_page.read_run(tmp_path / "no", {"lora"})


def test_the_table_fits_a_terminal_and_ends_with_the_answer(finished: Finished) -> None:
    said = StringIO()
    console = Console(width=80, file=said)
    verdict_table.render(AccuracyFolder.open(finished[1]).manifest, finished[2], console)
    lines = said.getvalue().splitlines()
    assert lines[-1].startswith("INCONCLUSIVE.")
    (static,) = [line for line in lines if line.startswith("static-eager-fp32")]
    assert static.split()[1:5] == ["0", "of", "48", "none"]
    assert any(line.split()[:1] == ["para"] and line.rstrip().endswith("inconclusive") for line in lines)
    assert "…" not in said.getvalue(), "nothing is cut"


@pytest.mark.parametrize(("width", "dark"), [(1200, False), (390, True)])
def test_a_browser_draws_it_offline(
    finished: Finished, tmp_path: Path, browser: Browser, width: int, dark: bool
) -> None:
    run = verdict_page.read_run(RUN, {"lora", "para"})
    file = tmp_path / "page.html"
    file.write_text(verdict_page.render(AccuracyFolder.open(finished[1]).manifest, finished[2], run))
    tab = browser.open(file, width=width, dark=dark)
    tab.wait_for("document.querySelectorAll('figure svg').length >= 1")
    assert tab.complaints() == []
    assert len(tab.requests()) == 1, "nothing but the page itself is loaded"
    assert tab.ask("document.documentElement.scrollWidth") <= width
    rings = "[...document.querySelectorAll('figure svg')][0].querySelectorAll('circle').length"
    drawn = tab.ask(rings)
    on_front = sum(row[-1] == "yes" for row in charts_in(file.read_text())[0]["rows"])
    assert drawn == 4 + on_front, "a dot for each method, a ring for each on the front"

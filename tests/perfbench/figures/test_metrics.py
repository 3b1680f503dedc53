"""The figures of one repetition, worked out by hand, and the catalogue that defines them."""

from __future__ import annotations

import pytest

from perfbench.figures.metrics import METRICS, energy_mj_per_token, sample_metrics


def test_figures_of_one_repetition_by_hand() -> None:
    figures = sample_metrics([100.0, 110.0, 130.0, 135.0], requests=4, total_ms=140.0)
    assert figures["total_ms"] == 140.0
    assert figures["ttft_ms"] == 100.0
    assert figures["itl_ms"] == [10.0, 20.0, 5.0]
    # 4 requests x 3 later tokens in the 40 ms after the first token; 4 x 4 tokens in 140 ms.
    assert figures["decode_tokens_per_s"] == pytest.approx(300.0)
    assert figures["tokens_per_s"] == pytest.approx(16 / 0.140)


def test_every_figure_of_a_repetition_is_in_the_catalogue() -> None:
    assert set(sample_metrics([1.0, 2.0], requests=1, total_ms=3.0)) <= set(METRICS)


@pytest.mark.parametrize(
    ("times", "requests", "total", "message"),
    [
        ([], 1, 5.0, "at least 2 tokens, got 0"),
        ([1.0], 1, 5.0, "at least 2 tokens, got 1"),
        ([1.0, 3.0, 2.0], 1, 5.0, r"token_times_ms\[2\]: times go backwards"),
        ([-1.0, 3.0], 1, 5.0, r"token_times_ms\[0\]: times go backwards"),
        ([1.0, 6.0], 1, 5.0, "total_ms: times go backwards"),
        ([1.0, float("nan")], 1, 5.0, r"token_times_ms\[1\]: expected a finite time"),
        ([1.0, 2.0], 1, float("inf"), "total_ms: expected a finite time"),
        ([2.0, 2.0], 1, 2.0, "total_ms: expected more than ttft_ms"),
        ([1.0, 2.0], 0, 5.0, "requests: expected an integer >= 1, got 0"),
    ],
)
def test_impossible_times_are_refused(times: list[float], requests: int, total: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sample_metrics(times, requests, total)


def test_energy_is_shared_out_over_requests_and_tokens() -> None:
    assert energy_mj_per_token(640.0, requests=4, new_tokens=32) == 5.0


def test_the_catalogue_says_unit_direction_and_one_line() -> None:
    for name, metric in METRICS.items():
        assert metric.better in ("higher", "lower", None), name
        assert metric.unit, name
        assert metric.definition, name
        assert "\n" not in metric.definition, name


@pytest.mark.parametrize(
    ("ending", "unit"),
    [("_ms", "ms"), ("_bytes", "bytes"), ("tokens_per_s", "tokens/s"), ("mj_per_token", "mJ/token")],
)
def test_units_in_names_are_the_units(ending: str, unit: str) -> None:
    units = {metric.unit for name, metric in METRICS.items() if name.endswith(ending)}
    assert units == {unit}

"""Every figure of a run is exact, timed or shown, and one of them only; a slow-down has one sign for all of them."""

from __future__ import annotations

import json

import pytest

from perfbench.figures.metrics import METRICS
from perfbench.gate.figures import change, compiled, exact, shown, slowdown, timed
from tests.perfbench.gate import runs


def test_every_figure_of_a_run_has_its_kind() -> None:
    run = json.loads((runs.COMMITTED / "run.json").read_text())
    for case in run["cases"].values():
        for part in ("exact", "memory", "adapters"):
            known = {figure for figure, where in (exact() | shown()).items() if where == part}
            assert set(case[part]) <= known
        assert set(case["summary"]) <= set(timed())


def test_no_figure_has_two_kinds_and_all_are_defined() -> None:
    every = [*exact(), *shown(), *timed(), *compiled()]
    assert len(every) == len(set(every))
    assert set(every) <= set(METRICS)


def test_compiled_figures_are_those_of_the_kernels() -> None:
    kernels = json.loads((runs.ROOT / "kernels" / "resources.json").read_text())["kernels"]
    fields = {field for targets in kernels.values() for resources in targets.values() for field in resources}
    assert set(compiled().values()) <= fields


def test_slower_is_positive_for_speeds_and_for_times() -> None:
    assert slowdown("ttft_ms", 100, 110) == pytest.approx(slowdown("tokens_per_s", 110, 100))
    assert slowdown("ttft_ms", 100, 110) > 0
    assert change("ttft_ms", slowdown("ttft_ms", 100, 110)) == pytest.approx(0.1)
    assert change("tokens_per_s", slowdown("tokens_per_s", 100, 90)) == pytest.approx(-0.1)
    with pytest.raises(ValueError, match="expected values > 0"):
        slowdown("ttft_ms", 0, 1)

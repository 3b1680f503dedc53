"""The simulation beside the committed search of live traffic: files are read, no time is taken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from perfbench.capacity import check
from perfbench.capacity.simulation import Serving, simulate
from perfbench.errors import RunDirectoryError
from perfbench.traffic.traffic_report import TIE

ROOT = Path(__file__).parents[3]
RUN = ROOT / "results" / "cpu-traffic"
# So far apart two searches on one server end that differ in nothing but their seed; the machine, which others use too,
# served 5% more and 5% fewer requests with every row busy at different times of the run.
TENANTS = TIE - 1
# With the step times of the same minutes nothing is left to differ but the simulation, in which every step takes what
# the mean one took. The median gap between tokens jumps with the number of rows; a p95 is made of few requests.
LATENCY = {"ttft_ms": 0.05, "ttft_p95_ms": 0.2, "itl_ms": 0.2, "itl_p99_ms": 0.05}
FULL = 0.1


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return check.compare(RUN)


def outside(rows: list[dict[str, Any]]) -> list[str]:
    """Each figure that is further from what was measured than is said above."""
    limits = {"tenants": TENANTS, "full_per_s": FULL, **LATENCY}
    return [
        f"{row['method']}: {name}: measured {row[name]:.3g}, simulated {row[f'simulated_{name}']:.3g}"
        for row in rows
        for name, limit in limits.items()
        if abs(row[f"simulated_{name}"] / row[name] - 1) > limit
    ]


def test_the_committed_search_is_found_again(rows: list[dict[str, Any]]) -> None:
    assert [row["method"] for row in rows] == ["none", "lora", "fanlora", "ia3", "para"]
    assert outside(rows) == []


def test_just_the_adapters_are_loaded_that_were_loaded(rows: list[dict[str, Any]]) -> None:
    """That hangs on the requests alone, and these are the same."""
    assert [row["simulated_loaded_share"] for row in rows] == [row["loaded_share"] for row in rows]


def test_a_server_with_a_row_less_is_not_taken_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the simulation has one row less than the server."""

    def with_fewer(due: Any, serving: Serving, *arguments: Any) -> Any:
        return simulate(due, Serving(serving.rows - 1, serving.resident, serving.chunk_tokens), *arguments)

    monkeypatch.setattr(check, "simulate", with_fewer)
    assert len(outside(check.compare(RUN))) >= 5


def test_what_is_no_search_is_refused(tmp_path: Path) -> None:
    manifest = json.loads((RUN / "traffic.json").read_text(encoding="utf-8"))
    manifest["scenario"]["traffic"]["tenants"] = [64]
    (tmp_path / "traffic.json").write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(RunDirectoryError, match="expected a search for the most tenants on perfbench's own server"):
        check.compare(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"no-run/traffic.json: can't be read"):
        check.compare(tmp_path / "no-run")

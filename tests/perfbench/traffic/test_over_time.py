"""How long each tenant waited while a measurement ran, and when adapters were loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from perfbench.spec.traffic import NOBODY
from perfbench.traffic import over_time, traffic_folder
from perfbench.traffic.outcome import Answered
from perfbench.traffic.traffic_folder import Key, Measured
from perfbench.traffic.traffic_report import TrafficReport


def answered(due_s: float, tenant: int, ttft_ms: float, loaded: bool | None = False) -> Answered:
    return Answered(due_s, tenant, 0.0, ttft_ms, ttft_ms + 10, (1.0,), loaded)


REQUESTS = [
    answered(0.0, 7, 30.0, True),
    answered(0.4, 7, 90.0),
    answered(1.0, NOBODY, 20.0),
    answered(3.6, 7, 250.0),
    answered(4.8, 2, 40.0, True),
]


def test_a_cell_is_the_longest_of_its_tenant_in_its_stretch() -> None:
    assert over_time.waited(REQUESTS, 0.5) == [
        ("tenant 7", 0.0, 0.5, 90.0),
        ("tenant 7", 3.5, 4.0, 250.0),
        ("no adapter", 1.0, 1.5, 20.0),
        ("tenant 2", 4.5, 5.0, 40.0),
    ]


def test_tenants_beyond_the_busiest_share_a_row() -> None:
    many = [answered(0.0, tenant, 10.0 + tenant) for tenant in range(over_time.TENANTS + 3) for _ in range(2)]
    many += [answered(1.0, 0, 5.0)]
    found = over_time.waited(many, 1.0)
    assert found[0][0] == "tenant 0"
    assert found[-1] == (over_time.OTHERS, 0.0, 1.0, 10.0 + over_time.TENANTS + 2)
    assert len({name for name, *_ in found}) == over_time.TENANTS + 1


def test_loads_are_counted_a_second_and_absent_where_nobody_knows() -> None:
    found = over_time.loaded(REQUESTS, 0.2)
    assert [row for row in found if row[1]] == [(0.0, 5.0, None, None), (pytest.approx(4.6), 5.0, None, None)]
    assert over_time.loaded([answered(0.0, 1, 5.0, None), answered(1.0, 1, 5.0, None)], 0.2) == []


def test_the_charts_are_those_of_the_point_that_is_shown() -> None:
    measured = {
        Key("lora", 5, 2.0, 0): Measured(None, 3, None),
        Key("lora", 5, 2.0, 1): Measured(REQUESTS, 5, 10),
        Key("lora", 9, 4.0, 0): Measured(REQUESTS[:1], 1, 10),
    }
    shown = {"lora": (5, 2.0), "para": (5, 2.0)}
    heat, loads = over_time.charts(measured, shown, 100.0)
    assert (heat.kind, heat.title) == ("heat", "Longest time to the first token: lora, 5 tenants")
    assert heat.data == {"target": 100.0}
    assert [row[3] for row in heat.rows] == [30.0, 90.0, 250.0, 20.0, 40.0]
    assert {row[0] for row in loads.rows} == {"lora"}
    assert list(over_time.charts(measured, {"lora": (9, 4.0)}, 100.0)) == []


def test_a_browser_draws_the_committed_run_and_complains_of_nothing(browser: Any, tmp_path: Path) -> None:
    run = Path("results/cpu-traffic")
    report = TrafficReport(traffic_folder.read_manifest(run), traffic_folder.read_measured(run))
    page = tmp_path / "traffic.html"
    page.write_text(report.page(), encoding="utf-8")
    for width in (1200, 390):
        tab = browser.open(page, width=width, height=40_000)
        tab.wait_for("[...document.querySelectorAll('figure')].every(figure => figure.querySelector('svg'))")
        assert tab.complaints() == []
        titles = tab.ask("[...document.querySelectorAll('figcaption')].map(caption => caption.textContent)")
        assert sum(title.startswith("Longest time to the first token: ") for title in titles) == len(report.rows())
        assert tab.ask("document.documentElement.scrollWidth - innerWidth") <= 0

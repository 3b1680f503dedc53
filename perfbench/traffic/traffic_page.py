"""The page of a traffic run: the answer, the curves, and each tenant's waits over time. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from perfbench.report.chart import Chart
from perfbench.report.html import flatten
from perfbench.report.page import page
from perfbench.traffic import over_time

if TYPE_CHECKING:
    from perfbench.traffic.traffic_report import TrafficReport


def page_of(report: TrafficReport) -> str:
    """The answer, the most tenants of each arm, and the curves of what requests waited."""
    names = list(report.manifest["arms"])
    shown = over_time.points(report.rows())
    charts = [
        *_charts(report),
        *over_time.charts(report.measured, shown, report.manifest["scenario"]["targets"]["ttft_ms"]),
    ]
    environment = flatten(report.manifest["environment"])
    return page(
        title=report.manifest["scenario"]["name"],
        lead=[report.manifest["scenario"]["question"], report.setting()],
        notices=list(report.reasons()),
        verdicts=[{"title": "Live traffic", "sentences": [*report.answer(), report.hardware()]}],
        sections=[{"title": "Tenants and latency", "charts": 0}] if charts else [],
        comparisons=[{
            "title": "All figures", "lines": [], "charts": None,
            "tables": [{
                "caption": "", "columns": report.columns(),
                "rows": [[column.cell(row) for column in report.columns()] for row in report.rows()],
            }],
        }],
        comparisons_title="The table",
        open_first=1,
        environments=[{
            "title": "The environment", "heads": ["", "this run"], "note": "",
            "rows": [{"name": name, "cells": [text], "differs": False} for name, text in environment.items()],
        }],
        legend=report.legend(),
        charts=[charts] if charts else [],
        colors={name: place for place, name in enumerate(names)},
    )  # fmt: skip


def _charts(report: TrafficReport) -> Iterator[Chart]:
    if report.searched:
        most = [(arm, held, None, None) for arm, held in report.most_of_all().items()]
        note = f"At {report.manifest['scenario']['traffic']['rate_per_tenant']:g} requests/s each."
        axis, columns = "tenants, higher is better", ("method", "tenants", "low", "high")
        if most:
            yield Chart("bars", "Tenants served within the targets", axis, columns, most, note)
    targets = report.manifest["scenario"]["targets"]
    along = "requests a second"
    for name, what, target, of in (
        ("ttft_ms", "Time to the first token, p95", targets["ttft_ms"], ""),
        ("itl_ms", "Time between tokens, p99", targets["itl_ms"], " for the mean of a request"),
    ):
        tail = "p95" if name == "ttft_ms" else "p99"
        several = not report.searched and len(report.manifest["scenario"]["traffic"]["tenants"]) > 1
        rows = sorted(
            (f"{arm}, {point['tenants']:,} tenants" if several else arm, point["rate_per_s"], value, None, None)
            for arm, entry in report.manifest["arms"].items()
            for point in entry.get("points", [])
            if (value := ((point["figures"] or {}).get(name) or {}).get(tail)) is not None
        )
        if rows:
            note = f"The target is {target:g} ms{of}. Points that were given up early have no figure."
            axis = "milliseconds, lower is better"
            yield Chart("lines", what, axis, ("method", along, "ms", "low", "high"), rows, note, {"x": along})

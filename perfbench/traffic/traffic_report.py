"""A traffic run for people and programs: the answer in one sentence, a table, a page with the curves. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perfbench import exit_codes
from perfbench.report import formats, tables, words
from perfbench.report.chart import Chart
from perfbench.report.tables import Column

LEGEND = (
    "tenants: how many send requests, each at the same rate. of bare: as a share of the bare backbone's. kept: the "
    "share of the requests within both targets. ttft: the time from when a request is due to its first token. itl: the "
    "time between two tokens. worst: the tenant with the largest median ttft. loaded: the share of the requests whose "
    "adapter had to be brought from the host. full: requests a second with every row busy. check: some answers were "
    "made again by definition, in a wider dtype, each with its own adapter."
)
# Of percentiles there are only those that the requests can tell: see LEGEND of a run's tails.
_TAILS = "A p95 needs 100 values and a p99 1,000; a dash stands where there are fewer."


@dataclass(frozen=True)
class Row:
    """One arm at one point: the one that was searched for, or each of those that were asked for. `point` None: there is
    none, because not even one tenant was served within the targets, or the arm died."""

    arm: str
    entry: Mapping[str, Any]
    point: Mapping[str, Any] | None

    @property
    def figures(self) -> Mapping[str, Any]:
        """Of all repetitions of the point, empty where there are none."""
        return (self.point or {}).get("figures") or {}


def exit_code(manifest: Mapping[str, Any]) -> int:
    """0 where every arm was measured and its answers are right, 1 where some check failed, 4 where an arm died or is
    missing."""
    statuses = {entry["status"] for entry in manifest["arms"].values()}
    if statuses & {"crashed", "pending"}:
        return exit_codes.FAULT
    return exit_codes.OK if statuses == {"ok"} else exit_codes.FAILED


@dataclass(frozen=True)
class TrafficReport:
    """What traffic.json holds as a Subject of formats. `manifest` has to be printable."""

    manifest: Mapping[str, Any]

    @property
    def searched(self) -> bool:
        """Whether the largest number of tenants was looked for."""
        return self.manifest["scenario"]["traffic"]["tenants"] is None

    def rows(self) -> list[Row]:
        """One for each line of the table."""
        found = []
        for arm, entry in self.manifest["arms"].items():
            points = entry.get("points", [])
            if self.searched:
                most = (entry.get("most_tenants") or {}).get("held")
                points = [point for point in points if point["tenants"] == most][-1:]
            found += [Row(arm, entry, point) for point in points or [None]]
        return found

    def columns(self) -> list[Column]:
        """Of the table."""
        bare = (self.manifest["arms"].get("none", {}).get("most_tenants") or {}).get("held")
        found = [Column("arm", lambda row: row.arm, text=True)]
        if self.searched:
            found.append(Column("tenants", lambda row: _count(_most(row))))
            found.append(Column("of bare\n%", lambda row: _share(_most(row) / bare if bare else None)))
        else:
            found.append(Column("tenants", lambda row: _count((row.point or {}).get("tenants"))))
        return [
            *found,
            Column("requests\n/s", lambda row: _number((row.point or {}).get("rate_per_s"))),
            Column("kept\n%", lambda row: _share(row.figures.get("kept_share"))),
            Column("tokens\n/s", lambda row: _count(row.figures.get("tokens_per_s"))),
            Column("ttft\nms", lambda row: _number(_tail(row, "ttft_ms", "median"))),
            Column("p95", lambda row: _number(_tail(row, "ttft_ms", "p95"))),
            Column("itl\nms", lambda row: _number(_tail(row, "itl_ms", "median"))),
            Column("p99", lambda row: _number(_tail(row, "itl_ms", "p99"))),
            Column("worst\nms", lambda row: _number(row.figures.get("worst_tenant_ttft_ms"))),
            Column("loaded\n%", lambda row: _share(row.figures.get("loaded_share"))),
            Column("full\n/s", lambda row: _number(row.entry.get("throughput_per_s"))),
            Column("check", lambda row: _verdict(row.entry), text=True),
        ]

    def print(self, console: Any) -> None:
        """At most 100 columns wide."""
        from rich.text import Text

        width = min(console.width, formats.WIDTH)
        for line in (self.manifest["scenario"]["question"], self.setting()):
            console.print(Text(line), width=width)
        subject = ""
        for some in tables.pieces(self.columns(), self.rows(), width):
            console.print()
            console.print(tables.grid(some, self.rows(), subject), width=width)
        for reason in self.reasons():
            console.print(Text(reason, "red"), width=width)
        console.print(Text(self.hardware(), "dim"), width=width)
        for sentence in self.answer():
            console.print(Text(sentence), width=width)
        console.print()
        console.print(Text(f"{LEGEND} {_TAILS}", "dim"), width=width)

    def markdown(self) -> str:
        """The same as Markdown."""
        lines = [self.manifest["scenario"]["question"], "", tables.plain(self.setting()), ""]
        lines += tables.markdown(self.columns(), self.rows())
        lines += ["", *map(tables.plain, [*self.reasons(), self.hardware(), *self.answer()]), "", LEGEND]
        return "\n".join(lines) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """A flat row for every point that was measured."""
        found = []
        for arm, entry in self.manifest["arms"].items():
            for point in entry.get("points", []):
                figures = point["figures"] or {}
                flat = {name: figures.get(name) for name in _PLAIN}
                for name in _WITH_TAILS:
                    flat |= {f"{name}_{tail}": (figures.get(name) or {}).get(tail) for tail in ("median", "p95", "p99")}
                found.append({
                    "arm": arm, "method": entry["method"], "status": entry["status"], "tenants": point["tenants"],
                    "rate_per_s": point["rate_per_s"], "held": point["held"], **flat,
                })  # fmt: skip
        return found

    def page(self) -> str:
        """The answer, the most tenants of each arm, and the curves of what requests waited."""
        from perfbench.report.html import flatten
        from perfbench.report.page import page

        names = list(self.manifest["arms"])
        charts = list(self._charts())
        environment = flatten(self.manifest["environment"])
        return page(
            title=self.manifest["scenario"]["name"],
            lead=[self.manifest["scenario"]["question"], self.setting()],
            notices=list(self.reasons()),
            verdicts=[{"title": "Live traffic", "sentences": [*self.answer(), self.hardware()]}],
            sections=[{"title": "Tenants and latency", "charts": 0}] if charts else [],
            comparisons=[{
                "title": "All figures", "lines": [], "charts": None,
                "tables": [{
                    "caption": "", "columns": self.columns(),
                    "rows": [[column.cell(row) for column in self.columns()] for row in self.rows()],
                }],
            }],
            comparisons_title="The table",
            open_first=1,
            environments=[{
                "title": "The environment", "heads": ["", "this run"], "note": "",
                "rows": [{"name": name, "cells": [text], "differs": False} for name, text in environment.items()],
            }],
            legend=f"{LEGEND} {_TAILS}",
            charts=[charts] if charts else [],
            colors={name: place for place, name in enumerate(names)},
        )  # fmt: skip

    def setting(self) -> str:
        """What was asked for, in a line."""
        scenario = self.manifest["scenario"]
        server, targets, traffic = scenario["server"], scenario["targets"], scenario["traffic"]
        mix = "uniform" if traffic["zipf_exponent"] is None else f"Zipf {traffic['zipf_exponent']:g}"
        return (
            f"{scenario['backbone']} {scenario['dtype']} {scenario['device']} {scenario['kernels']}; "
            f"{server['rows']} rows, {server['resident']} resident adapters; "
            f"prompts {_lengths(traffic['prompt_tokens'])}, new {_lengths(traffic['new_tokens'])}, "
            f"{traffic['arrivals']} arrivals, {mix} tenants; targets: {targets['ttft_ms']:g} ms to the first token and "
            f"{targets['itl_ms']:g} ms between tokens for {100 * targets['share']:g}% of the requests"
        )

    def hardware(self) -> str:
        """On what, and how many requests."""
        environment, traffic = self.manifest["environment"], self.manifest["scenario"]["traffic"]
        here = words.machine(environment, self.manifest["scenario"]["device"])
        repetitions = self.manifest["scenario"]["repetitions"]
        return (
            f"On {here}; {repetitions} x {traffic['requests']} requests for each point, the first and the last "
            f"tenth of which are not counted.{words.busy(environment)}"
        )

    def answer(self) -> Iterator[str]:
        """What the reader wanted to know."""
        traffic, targets = self.manifest["scenario"]["traffic"], self.manifest["scenario"]["targets"]
        if not self.searched:
            missed = [
                f"{row.arm} with {row.point['tenants']:,} tenants at {_number(row.point['rate_per_s'])} requests/s"
                for row in self.rows()
                if row.point is not None and not row.point["held"]
            ]
            yield f"The targets were missed by {'; '.join(missed)}." if missed else "The targets were held everywhere."
            return
        each = traffic["rate_per_tenant"]
        found = {row.arm: _most(row) for row in self.rows() if row.entry["status"] == "ok"}
        adapted = {arm: most for arm, most in found.items() if arm != "none"}
        if adapted:
            best = max(adapted, key=lambda arm: adapted[arm])
            bare = f", {adapted[best] / found['none']:.0%} of the bare backbone's" if found.get("none") else ""
            yield (
                f"{best} serves most tenants within {targets['ttft_ms']:g} ms to the first token and "
                f"{targets['itl_ms']:g} ms between tokens: {adapted[best]:,}, at {each:g} requests/s "
                f"each{bare}."
            )
        rest = ", ".join(f"{arm} {most:,}" for arm, most in found.items() if not adapted or arm != best)
        if rest:
            yield f"The others: {rest}. The next number tried, about 5% larger, missed the targets."
        none = [
            f"{arm} (less than {(self.manifest['arms'][arm]['most_tenants'] or {}).get('failed'):,})"
            for arm in found
            if not found[arm]
        ]
        if none:
            yield f"Not served within the targets at any load that was tried: {', '.join(none)}."

    def reasons(self) -> Iterator[str]:
        """Why arms have no figures, or none to be trusted."""
        for arm, entry in self.manifest["arms"].items():
            reason = entry.get("reason") or (entry.get("proof") or {}).get("reason")
            if reason:
                yield f"{arm}: {entry['status']}: {reason}"

    def _charts(self) -> Iterator[Chart]:
        if self.searched:
            most = [(row.arm, _most(row), None, None) for row in self.rows() if row.point is not None]
            note = f"At {self.manifest['scenario']['traffic']['rate_per_tenant']:g} requests/s each."
            axis, columns = "tenants, higher is better", ("method", "tenants", "low", "high")
            if most:
                yield Chart("bars", "Tenants served within the targets", axis, columns, most, note)
        targets = self.manifest["scenario"]["targets"]
        along = "requests a second"
        for name, what, target in (
            ("ttft_ms", "Time to the first token, p95", targets["ttft_ms"]),
            ("itl_ms", "Time between tokens, p99", targets["itl_ms"]),
        ):
            tail = "p95" if name == "ttft_ms" else "p99"
            rows = sorted(
                (arm, point["rate_per_s"], value, None, None)
                for arm, entry in self.manifest["arms"].items()
                for point in entry.get("points", [])
                if (value := ((point["figures"] or {}).get(name) or {}).get(tail)) is not None
            )
            if rows:
                note = f"The target is {target:g} ms. Points that were given up early have no figure."
                axis = "milliseconds, lower is better"
                yield Chart("lines", what, axis, ("method", along, "ms", "low", "high"), rows, note, {"x": along})


_PLAIN = (
    "counted", "kept_share", "goodput_per_s", "tokens_per_s", "tenants_seen", "worst_tenant_ttft_ms", "fairness",
    "loaded_share", "wait_growth_ms",
)  # fmt: skip
_WITH_TAILS = ("ttft_ms", "itl_ms", "total_ms", "wait_ms")


def _most(row: Row) -> int:
    return int((row.entry.get("most_tenants") or {}).get("held", 0))


def _tail(row: Row, name: str, tail: str) -> float | None:
    found: float | None = (row.figures.get(name) or {}).get(tail)
    return found


def _verdict(entry: Mapping[str, Any]) -> str:
    return {"ok": "ok", "check_failed": "FAILED", "check_void": "void"}.get(entry["status"], entry["status"])


def _lengths(lengths: Mapping[str, Any]) -> str:
    return f"{lengths['median']}" if not lengths["sigma"] else f"about {lengths['median']} (at most {lengths['most']})"


def _number(value: float | None) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}"


def _count(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}"

"""The simulation beside a measured traffic run: the same requests, at the run's own step times. Free of torch.

Two things are compared. The largest number of tenants, looked for as the run did it, at the mean step times of all its
measurements: that is how well a plan holds. And the latencies of the largest load that held, at the step times of just
these measurements: there the machine was as quick in both, and what differs is the simulation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from perfbench.capacity.fit import plan_of, reads_whole
from perfbench.capacity.simulation import Serving, simulate
from perfbench.capacity.times import MeasuredTimes
from perfbench.capacity.turns import Asked, of_run
from perfbench.errors import RunDirectoryError
from perfbench.files.plain_text import printable_tree
from perfbench.methods.registry import METHODS
from perfbench.report.plain_tables import PlainTables
from perfbench.report.tables import Column
from perfbench.spec.backbone_config import find_config
from perfbench.traffic import outcome, traffic_folder
from perfbench.traffic.requests import draw
from perfbench.traffic.search import search
from perfbench.traffic.traffic_folder import Key

_COMPARED = ("tenants", "full_per_s", "ttft_ms", "ttft_p95_ms", "itl_ms", "itl_p99_ms", "loaded_share")
_LEGEND = (
    "Each figure as it was measured, and as simulated. tenants: the largest number that held the targets, with the "
    "mean step times of the whole run; full: requests a second with every row busy, with those too. ttft, itl: at the "
    "largest load that held, with the step times that were measured there. loaded: the share of requests whose adapter "
    "had to be brought from the host."
)


def compare(folder: Path) -> list[dict[str, Any]]:
    """A flat row for each arm that was proved and held some load: of each figure `NAME` what was measured and
    `simulated_NAME`. RunDirectoryError where there is no such run, or it searched for no largest number."""
    manifest = printable_tree(traffic_folder.read_manifest(folder))
    if manifest["scenario"]["traffic"]["tenants"] is not None or manifest["scenario"].get("target") is not None:
        raise RunDirectoryError(f"{folder}: expected a search for the most tenants on perfbench's own server")
    measured = traffic_folder.read_measured(folder)
    arms = [name for name, arm in manifest["arms"].items() if arm["status"] == "ok" and arm["most_tenants"]["held"]]
    return [_Arm(folder, manifest, measured, name).row() for name in arms]


def table(folder: Path) -> PlainTables:
    """What `compare` finds, measured and simulated figures one above the other. Raises as that does."""
    rows = compare(folder)
    lines = [
        {"method": row["method"], "figures": "simulated" if prefix else "measured"}
        | {name: row[prefix + name] for name in _COMPARED}
        for row in rows
        for prefix in ("", "simulated_")
    ]
    parts = [abs(row["simulated_tenants"] / row["tenants"] - 1) for row in rows]
    lead = (
        f"The largest number of tenants comes out at most {max(parts):.0%} off the measured one, "
        f"{sum(parts) / len(parts):.0%} on average."
    )
    return PlainTables(_columns(), [(f"{folder}, measured and simulated", lines)], _LEGEND, lead=lead)


def _columns() -> list[Column]:
    def shown(name: str, digits: int, factor: float = 1.0) -> Any:
        return lambda row: "-" if row[name] is None else f"{row[name] * factor:,.{digits}f}"

    return [
        Column("method", lambda row: row["method"], text=True),
        Column("tenants", shown("tenants", 0)),
        Column("full\n/s", shown("full_per_s", 1)),
        Column("ttft\nms", shown("ttft_ms", 1)),
        Column("p95", shown("ttft_p95_ms", 1)),
        Column("itl\nms", shown("itl_ms", 2)),
        Column("p99", shown("itl_p99_ms", 2)),
        Column("loaded\n%", shown("loaded_share", 1, 100)),
        Column("figures", lambda row: row["figures"], text=True),
    ]


class _Arm:
    """One arm of a run."""

    def __init__(self, folder: Path, manifest: Any, measured: dict[Key, Any], name: str) -> None:
        self.folder, self.manifest, self.measured, self.name = folder, manifest, measured, name
        self.entry, self.asked = manifest["arms"][name], Asked.of(manifest)
        server = self.asked.server
        chunk = None if self._reads_whole() else server.chunk_tokens
        self.serving = Serving(server.rows, server.resident, chunk, self.entry["method"] != "none")

    def _reads_whole(self) -> bool:
        """Whether scales are made of a prompt's last token."""
        scenario, method = self.manifest["scenario"], self.entry["method"]
        return reads_whole(plan_of(method, METHODS[method].options(), find_config(scenario["backbone"])))

    def row(self) -> dict[str, Any]:
        """As `compare` has it."""
        held = self.entry["most_tenants"]["held"]
        keys = [key for key in self.measured if key.arm == self.name]
        there = [key for key in keys if key.tenants == held and key.rate]
        of_run, of_point = self._times(keys), self._times(there)
        point = next(point for point in reversed(self.entry["points"]) if point["tenants"] == held)
        (full,) = (key for key in keys if not key.rate)
        simulated = self._figures([self._simulated(key, of_point) for key in there])
        return {
            "method": self.name,
            "tenants": held,
            "simulated_tenants": self._most(of_run, held),
            "full_per_s": self.entry["throughput_per_s"],
            "simulated_full_per_s": outcome.throughput_per_s(self._simulated(full, of_run)),
            **_named("", point["figures"]),
            **_named("simulated_", simulated),
        }

    def _times(self, keys: Iterable[Key]) -> MeasuredTimes:
        return of_run(self.manifest, self.measured, keys, self.folder).times(str(self.folder), None)

    def _simulated(self, key: Key, times: MeasuredTimes) -> list[outcome.Answered]:
        found = simulate(self.asked.requests(key, len(self.measured[key].answered)), self.serving, times)
        assert found is not None
        return found

    def _figures(self, simulated: list[list[outcome.Answered]]) -> dict[str, Any]:
        return outcome.figures(simulated, self.asked.targets)

    def _most(self, times: MeasuredTimes, start: int) -> int:
        """The largest number of tenants that holds the targets, looked for as a run does it."""
        tried = search(start)
        tenants = next(tried)
        while True:
            try:
                tenants = tried.send(self._holds(tenants, times))
            except StopIteration as ended:
                return int(ended.value.held)

    def _holds(self, tenants: int, times: MeasuredTimes) -> bool:
        traffic, targets = self.asked.traffic, self.asked.targets
        for repetition in range(self.asked.repetitions):
            due = draw(traffic, tenants, tenants * (traffic.rate_per_tenant or 0.0), f"{self.asked.seed}/{repetition}")
            found = simulate(due, self.serving, times)
            if found is None or not outcome.held(found, targets):
                return False
        return True


def _named(prefix: str, figures: Any) -> dict[str, Any]:
    return {
        f"{prefix}ttft_ms": figures["ttft_ms"]["median"],
        f"{prefix}ttft_p95_ms": figures["ttft_ms"]["p95"],
        f"{prefix}itl_ms": figures["itl_ms"]["median"],
        f"{prefix}itl_p99_ms": figures["itl_ms"]["p99"],
        f"{prefix}loaded_share": figures["loaded_share"],
    }

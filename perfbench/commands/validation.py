"""`perfbench validate`: scenario files checked for every kind of device, without torch and without a network."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from perfbench import exit_codes
from perfbench.errors import PerfbenchError
from perfbench.files.paths import expanded
from perfbench.files.plain_text import printable
from perfbench.files.yaml_source import read
from perfbench.spec import cases, cost, scenario, traffic
from perfbench.spec.backbone_config import is_named


def validate(files: Sequence[Path], *, large: bool = False) -> int:
    """Prints a line for each file, errors on standard error; exit code 0, or 2 where one file is bad.
    large: as in `summary`."""
    bad = 0
    for path in files:
        try:
            print(printable(f"{path}: ok, {summary(path, large=large)}"))
        except PerfbenchError as error:
            print(f"perfbench: {error}", file=sys.stderr)
            bad += 1
    return exit_codes.BAD_INPUT if bad else exit_codes.OK


def summary(path: Path, *, large: bool = False) -> str:
    """How many cases `path` makes on each kind of device. Raises ScenarioError or BackboneError.

    large: also where it costs more than most do. A backbone is checked against the scenario where that needs no
    network: a named shape or a local folder.
    """
    if traffic.is_traffic(read(path).values):
        return _traffic_summary(path)
    document = scenario.load(path)
    parts = []
    for kind in document.device_kinds:
        resolved = scenario.resolve(document, kind)
        remote = [name for name in resolved.backbone if _is_remote(name)]
        if not remote:
            scenario.check_against_backbone(resolved)
        cost.check(resolved, cost.of_scenario(resolved), large=large)
        count = sum(len(comparison.cases) for comparison in cases.expand(resolved, large=large))
        unchecked = f", {', '.join(remote)} not looked up" if remote else ""
        parts.append(f"{count} cases on {kind}{unchecked}")
    return "; ".join(parts)


def _traffic_summary(path: Path) -> str:
    """The same of a traffic scenario."""
    parts = []
    asked = str(read(path).values.get("device", "auto"))
    for kind in scenario.DEVICE_KINDS if asked == "auto" else (asked,):
        found = traffic.load(path, [], lambda _, kind=kind: (kind, ""))  # type: ignore[misc]
        points = "a search" if found.traffic.tenants is None else f"{len(traffic.points_of(found.traffic))} points"
        backbone = found.comparison.backbone
        unchecked = f", {backbone} not looked up" if traffic.is_hub_id(backbone) else ""
        parts.append(f"{points} with each of {len(found.comparison.cases)} methods on {kind}{unchecked}")
    return "; ".join(parts)


def _is_remote(backbone: str) -> bool:
    try:
        return not is_named(backbone) and not expanded(backbone).is_dir()
    except PerfbenchError:  # no path that can be: what is wrong is said where the backbone is looked for
        return False

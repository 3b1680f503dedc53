"""The answer of a profile in words and tables: where the adapter's time goes, against the bare backbone. Free of
torch; the command prints it and the page shows it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from perfbench.profiling.breakdown import bound

# What is read here, and how it is laid out.
PROFILE = "profile.json"
SCHEMA_VERSION = 1

PHASES = ("prefill", "decode step")
# The kinds that make up at least this share of the added time are named in the answer.
WORTH_NAMING = 0.1
# A total that grew by less than this share of itself is no whole to take shares of.
LEAST_EXTRA = 0.02
# Decode steps of a quiet machine lie closer than this (interquartile range over the median).
STEADY = 0.25

Figures = Mapping[str, float]


@dataclass(frozen=True)
class Table:
    """One phase: `heads` and `rows` of the same length, the first column a kind, the last row the total."""

    title: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(profile: Mapping[str, Any]) -> list[Table]:
    """A table for prefill and one for a decode step, where there was one."""
    labels = list(profile["arms"])
    breakdowns = [profile["arms"][label]["breakdown"] for label in labels]
    on_device = _on_device(profile)
    return [
        _table(phase, labels, [one[phase] for one in breakdowns], on_device)
        for phase in PHASES
        if all(phase in one for one in breakdowns)
    ]


def _on_device(profile: Mapping[str, Any]) -> bool:
    return any(phase["total"]["device_ms"] for arm in profile["arms"].values() for phase in arm["breakdown"].values())


def _names(labels: list[str]) -> list[str]:
    """The arms without the kernel set that they share."""
    return [label.rsplit("-", 1)[0] for label in labels]


def _table(phase: str, labels: list[str], arms: list[Mapping[str, Figures]], on_device: bool) -> Table:
    *_, own = arms
    bare = arms[0] if len(arms) > 1 else None
    time, count, idle = ("device_ms", "launches", "gap_ms") if on_device else ("host_ms", "operations", "outside_ms")
    words = ("launches", "gaps ms") if on_device else ("ops", "python ms")
    kinds = [kind for kind in dict.fromkeys([*(bare or {}), *own]) if kind != "total"]
    kinds.sort(key=lambda kind: -(_get(own, kind, time) - (_get(bare, kind, time) if bare else 0)))
    names = _names(labels)
    heads: tuple[str, ...]
    if bare is None:
        heads = ("where", f"{names[0]} ms", "share %", *words)
    else:
        heads = ("where", *(f"{n} ms" for n in names), "extra ms", "share %", words[0], "extra", words[1], "extra")
    rows: list[tuple[str, ...]] = []
    for kind in (*kinds, "total"):
        values = [_get(own, kind, key) for key in (time, count, idle)]
        if bare is None:
            share = _percent(values[0], own["total"][time])
            rows.append((kind, _ms(values[0]), share, _count(values[1]), _ms(values[2])))
            continue
        before = [_get(bare, kind, key) for key in (time, count, idle)]
        extra = [after - first for after, first in zip(values, before, strict=True)]
        grown = own["total"][time] - bare["total"][time]
        whole = grown if grown > LEAST_EXTRA * bare["total"][time] else 0.0
        share = _percent(extra[0], whole) if kind == "total" or _parted(bare, own, kind) else "-"
        rows.append(
            (kind, _ms(before[0]), _ms(values[0]), _ms(extra[0]), share,
             _count(values[1]), _count(extra[1]), _ms(values[2]), _ms(extra[2]))
        )  # fmt: skip
    return Table(f"{phase}, on the {'device' if on_device else 'host'}", heads, tuple(rows))


def answer(profile: Mapping[str, Any]) -> list[str]:
    """The sentences above the tables: what the adapter adds, where most of it is, and what the step waits for."""
    labels = list(profile["arms"])
    arms = [profile["arms"][label] for label in labels]
    names = _names(labels)
    said = []
    for label, arm in profile["arms"].items():
        if arm["check"]["status"] != "ok":
            said.append(f"WARNING: {label} did not pass its check ({arm['check']['reason']}): what is profiled here "
                        f"does not compute what it should")  # fmt: skip
    widest = max(arms, key=lambda arm: arm["decode_step_spread"])["decode_step_spread"]
    if widest > STEADY:
        said.append(f"WARNING: the decode steps of one arm lie {widest:.0%} apart (interquartile): something else "
                    f"uses this machine; profile again before believing the times")  # fmt: skip
    if "decode step" in arms[-1]["breakdown"]:
        on_device = _on_device(profile)
        steps = [arm["breakdown"]["decode step"] for arm in arms]
        times = [arm["unprofiled_decode_step_ms"] for arm in arms]
        if len(arms) > 1:
            said += _added(names, steps, times, on_device)
        else:
            said.append(f"A decode step takes {_ms(times[0])} ms.")
        said += [_waits(name, arm) for name, arm in zip(names, arms, strict=True)]
    said.append(
        "Peak memory of the call: "
        + ", ".join(f"{arm['peak_bytes'] / 2**20:,.1f} MiB ({name})" for name, arm in zip(names, arms, strict=True))
        + "."
    )
    return said


def _added(names: list[str], steps: list[Mapping[str, Figures]], times: list[float], on_device: bool) -> list[str]:
    """What the adapter adds: in time, measured without the profiler; in operations or launches; and where."""
    time, count = ("device_ms", "launches") if on_device else ("host_ms", "operations")
    bare, own = steps
    counted = own["total"][count] - bare["total"][count]
    slower = times[1] - times[0]
    said = [f"A decode step takes {_ms(times[1])} ms with {names[1]} and {_ms(times[0])} ms bare: {slower:+,.2f} ms "
            f"({slower / times[0]:+.0%}), and {counted:+,.0f} {count}."]  # fmt: skip
    extra = own["total"][time] - bare["total"][time]
    added = {kind: _get(own, kind, time) - _get(bare, kind, time) for kind in {**bare, **own} if kind != "total"}
    worth = sorted(
        (kind for kind in added if added[kind] >= WORTH_NAMING * extra > 0 and _parted(bare, own, kind)),
        key=lambda kind: -added[kind],
    )
    where = f", most of it in {', '.join(f'{kind} {added[kind]:+,.2f}' for kind in worth)} ms" if worth else ""
    said.append(f"Under the profiler, which adds to every operation, {extra:+,.2f} ms{where}.")
    return said


def _waits(name: str, arm: Mapping[str, Any]) -> str:
    """Which of host and device a decode step waits for."""
    total, step_ms = arm["breakdown"]["decode step"]["total"], arm["unprofiled_decode_step_ms"]
    if not total["device_ms"]:
        share = total["outside_ms"] / total["host_ms"] if total["host_ms"] else 0.0
        return (f"{name}: no device: the host computes, and spends {share:.0%} of a decode step outside of "
                f"operations, in Python.")  # fmt: skip
    limited, idle = bound(total["device_ms"], step_ms)
    how = ", replayed as a captured graph (profiled launch by launch, or no range would be in it)"
    return (f"{name}: {limited}-bound: the device works for {_ms(total['device_ms'])} ms of a decode step and idles "
            f"for {idle:.0%} of it{how if arm['replays'] else ''}.")  # fmt: skip


def _parted(bare: Mapping[str, Figures], own: Mapping[str, Figures], kind: str) -> bool:
    """Whether the times of a kind differ by more than they vary: the middle halves of both arms' steps lie apart."""
    return (_get(own, kind, "low_ms") > _get(bare, kind, "high_ms")
            or _get(bare, kind, "low_ms") > _get(own, kind, "high_ms"))  # fmt: skip


def _get(kinds: Mapping[str, Figures] | None, kind: str, key: str) -> float:
    return (kinds or {}).get(kind, {}).get(key, 0.0)


def _ms(value: float) -> str:
    text = f"{value:,.2f}"
    return "0.00" if text == "-0.00" else text


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _percent(part: float, whole: float) -> str:
    """A dash where there is no whole to be a part of: an arm that is no slower than the bare one."""
    if whole <= 0:
        return "-"
    text = f"{100 * part / whole:.0f}"
    return "0" if text == "-0" else text


LEGEND = (
    "where: the module kind that the time belongs to; each moment counts for the innermost only. Medians over the "
    "steps of all rounds, and their sum. share: of the sum's extra time, - where steps "
    "vary by more than the arms differ."
)
COLUMNS = {
    False: "ops: ATen operations, those inside others not counted. python ms: the part of the time outside of "
    "operations.",
    True: "ms: kernels and copies. launches: kernels. gaps: the device's idle time before them, under the profiler.",
}


def legend(profile: Mapping[str, Any]) -> str:
    """What the columns mean."""
    return f"{LEGEND} {COLUMNS[_on_device(profile)]}"


def render(profile: Mapping[str, Any], console: Any = None) -> None:
    """Prints the answer and its tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table as Grid
    from rich.text import Text

    console = console or Console()
    console.print(Text(f"{profile['case']}: {profile['decode_steps']} decode steps", style="bold"), soft_wrap=True)
    for table in tables(profile):
        grid = Grid(title=table.title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for number, head in enumerate(table.heads):
            grid.add_column(head, justify="left" if number == 0 else "right", no_wrap=number == 0, overflow="fold")
        for row in table.rows:
            grid.add_row(*map(Text, row), style="bold" if row[0] == "total" else "")
        console.print(grid)
    for line in answer(profile):
        console.print(Text(line, style="bold red" if line.startswith("WARNING") else ""))
    console.print(Text(legend(profile), style="dim"))

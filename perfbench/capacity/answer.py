"""The answer of `perfbench plan`: a sentence, a table, and what its figures mean. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from perfbench.capacity.fleet import MOST_ROWS, Found, Missed, at_share, plan
from perfbench.capacity.question import Asked, Planned
from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import format_bytes
from perfbench.report.plain_tables import PlainTables
from perfbench.report.tables import Column
from perfbench.spec.traffic import Lengths, Targets
from perfbench.traffic import outcome

# Those that a plan would go by first.
ORIGINS = ("measured", "roof")
_WORDS = {"ttft": "to its first token", "itl": "between its tokens"}
_LEGEND = (
    "The busiest device is simulated, {repetitions} times {requests:,} requests or more. resident: adapters that it "
    "holds. loads, MB: of adapters from the host, a second, of one device. ttft, itl: within which {share:g}% of the "
    "requests got their first token, and their tokens on average. bound by: what would be missed with one device less; "
    "memory, rows: they wait for a row, and more do not fit, or are not known of."
)


@dataclass(frozen=True)
class Line:
    """An Asked with what was found."""

    asked: Asked
    found: Found | Missed


def answer(planned: Planned) -> PlainTables:
    """The tables. PerfbenchError where no method can be served by any number of devices."""
    lines = [Line(asked, plan(asked.fleet)) for asked in planned.asked]
    methods = [line for line in lines if line.asked.arm.method != "none"] or lines
    if all(isinstance(line.found, Missed) for line in methods):
        raise PerfbenchError(f"no number of devices will do: {_missed(methods[0])}")
    rows = [_record(planned, line) for line in lines]
    return PlainTables(_columns(rows), [(_title(planned), rows)], _note(planned), lead=_lead(methods))


def _title(planned: Planned) -> str:
    question, traffic, targets = planned.question, planned.scenario.traffic, planned.scenario.targets
    device = planned.device.name if planned.device is not None else question.device
    mix = f"Zipf {traffic.zipf_exponent:g}" if traffic.zipf_exponent else "all alike"
    return (
        f"{question.model} {question.dtype} on {device}; {question.tenants:,} tenants, {mix}, {question.rate:,.6g} "
        f"requests/s in all; prompts {_lengths(traffic.prompt_tokens)}, new {_lengths(traffic.new_tokens)}; "
        f"{100 * targets.share:g}% within {targets.ttft_ms:g} ms to the first token and {targets.itl_ms:g} ms between "
        "tokens, on average"
    )


def _lengths(lengths: Lengths) -> str:
    return f"about {lengths.median} (at most {lengths.most})" if lengths.sigma else str(lengths.median)


def _columns(rows: Sequence[dict[str, Any]]) -> list[Column]:
    found = [
        Column("method", lambda row: row["method"], text=True),
        Column("devices", lambda row: "none" if row["devices"] is None else f"{row['devices']:,}"),
        Column("rows", lambda row: _count(row["rows"])),
        Column("resident", lambda row: _count(row["resident"])),
        Column("loads\n/s", lambda row: _number(row["loads_per_s"])),
        Column("MB\n/s", lambda row: _number(row["load_bytes_per_s"], 1e6)),
        Column("ttft\nms", lambda row: _number(row["ttft_ms"])),
        Column("itl\nms", lambda row: _number(row["itl_ms"])),
    ]
    if any(row["cost_per_hour"] is not None for row in rows):
        found.append(Column("cost\nan hour", lambda row: _number(row["cost_per_hour"])))
        found.append(Column("cost of\na million", lambda row: _number(row["cost_of_a_million"])))
    found.append(Column("bound\nby", lambda row: row["bound_by"] or "-", text=True))
    found.append(Column("figures", lambda row: row["figures"], text=True))
    return found


def _count(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def _number(value: float | None, unit: float = 1.0) -> str:
    """Three digits that count."""
    if value is None:
        return "-"
    value /= unit
    return f"{value:,.0f}" if value >= 100 or not value else f"{value:#.3g}"


def _record(planned: Planned, line: Line) -> dict[str, Any]:
    fleet, found = line.asked.fleet, line.found
    price = planned.scenario.price_per_hour
    record: dict[str, Any] = {
        "method": line.asked.arm.label,
        "figures": line.asked.origin,
        **dict.fromkeys(_FIGURES),
        "bytes_per_tenant": fleet.memory.adapter,
    }
    if isinstance(found, Missed):
        return record | {"bound_by": found.what} | ({f"{found.what}_ms": found.by} if found.what in _WORDS else {})
    figures = outcome.figures(found.simulated, fleet.targets)
    loads = figures["loaded_share"] * found.load.rate if fleet.adapters else None
    answered = [one for answered in found.simulated for one in outcome.counted(answered)]
    tokens_per_s = fleet.rate * fmean(len(one.itl_ms) + 1 for one in answered)
    cost = None if price is None else found.devices * price
    return record | {
        "devices": found.devices,
        "rows": found.rows,
        "resident": found.resident if fleet.adapters else None,
        "tenants": len(found.load.weights),
        "rate_per_s": found.load.rate,
        "in_flight": found.load.rate * fmean(one.total_ms - one.wait_ms for one in answered) / 1e3,
        "loaded_share": figures["loaded_share"] if fleet.adapters else None,
        "loads_per_s": loads,
        "load_bytes_per_s": None if loads is None else loads * fleet.memory.adapter,
        "kept_share": figures["kept_share"],
        "ttft_ms": at_share(found.simulated, fleet.targets, "ttft"),
        "itl_ms": at_share(found.simulated, fleet.targets, "itl"),
        "cost_per_hour": cost,
        "cost_of_a_million": None if cost is None else cost / 3600 / tokens_per_s * 1e6,
        "bound_by": bound_by(line.asked, found),
    }


_FIGURES = (
    "devices", "rows", "resident", "tenants", "rate_per_s", "in_flight", "loaded_share", "loads_per_s",
    "load_bytes_per_s", "kept_share", "ttft_ms", "itl_ms", "cost_per_hour", "cost_of_a_million", "bound_by",
)  # fmt: skip


def bound_by(asked: Asked, found: Found) -> str | None:
    """What would be missed with one device less: ttft or itl; where requests wait for a row, memory if more rows do not
    fit, and rows if no more of them are asked for, were measured, or are tried. None where one device is enough."""
    if found.fewer is None:
        return None
    counted = [one for answered in found.fewer for one in outcome.counted(answered)]
    late, slow = _shares(found.fewer, asked.fleet.targets)
    if slow > late:
        return "itl"
    if fmean(one.wait_ms for one in counted) <= fmean(one.ttft_ms - one.wait_ms for one in counted):
        return "ttft"
    if asked.fleet.memory.resident(2 * found.fewer_rows) < (1 if asked.fleet.adapters else 0):
        return "memory"
    return "rows" if found.fewer_rows == _most_rows(asked)[0] else "ttft"


def _most_rows(asked: Asked) -> tuple[int, str]:
    """(how many rows a device may have whatever fits, why)"""
    if asked.fleet.rows is not None:
        return asked.fleet.rows, "are asked for"
    measured = asked.fleet.times.most_rows
    return (MOST_ROWS, "are tried") if measured is None else (measured, "were measured")


def _shares(simulated: Sequence[Sequence[outcome.Answered]], targets: Targets) -> tuple[float, float]:
    """Of the requests that count those that were late with their first token, and those that were slow afterwards."""
    counted = [one for answered in simulated for one in outcome.counted(answered)]
    late = sum(one.ttft_ms > targets.ttft_ms for one in counted)
    slow = sum(bool(one.itl_ms) and fmean(one.itl_ms) > targets.itl_ms for one in counted)
    return late / len(counted), slow / len(counted)


def _lead(methods: Sequence[Line]) -> str:
    """The answer in a sentence or two, of measured figures where every method has them."""
    labels = [{line.asked.arm.label for line in methods if line.asked.origin == origin} for origin in ORIGINS]
    origin = ORIGINS[0] if labels[0] >= labels[1] else ORIGINS[1]
    own = [line for line in methods if line.asked.origin == origin]
    held = [(line, line.found) for line in own if isinstance(line.found, Found)]
    fewest = min((found.devices for _, found in held), default=0)
    best = [(line, found) for line, found in held if found.devices == fewest]
    names = [line.asked.arm.label for line, _ in best]
    least = "at least " if origin == "roof" else ""
    others = [f"{line.asked.arm.label} {found.devices:,}" for line, found in held if found.devices > fewest]
    text = f"{_listed(names)} {'needs' if len(names) == 1 else 'need'} the fewest devices, {least}{fewest:,}"
    text += f" ({', '.join(others)})." if others else "."
    return f"{text} {_why(*best[0])}" + "".join(
        f" {_missed(line)[0].upper()}{_missed(line)[1:]}." for line in own if isinstance(line.found, Missed)
    )


def _why(line: Line, found: Found) -> str:
    by = bound_by(line.asked, found)
    if found.fewer is None or by is None:
        return f"One keeps all targets, and serves {found.load.rate:,.3g} requests/s."
    late, slow = _shares(found.fewer, line.asked.fleet.targets)
    name, one = line.asked.arm.label, found.devices - 1
    if by == "itl":
        return f"What binds is the time between tokens: with {one:,}, {slow:.1%} of {name}'s requests miss it."
    if by == "memory":
        return (
            f"What binds is memory: with {one:,}, requests wait for a row, and beside the weights there is no room for "
            "enough of them."
        )
    if by == "rows":
        most, why = _most_rows(line.asked)
        return f"What binds are the rows: with {one:,}, requests wait for one, and no more than {most} {why}."
    if not late:
        return f"What binds is the time to the first token: with {one:,}, the wait for a row grows with every request."
    return f"What binds is the time to the first token: with {one:,}, {late:.1%} of {name}'s requests miss it."


def _missed(line: Line) -> str:
    found, name = line.found, line.asked.arm.label
    assert isinstance(found, Missed)
    if found.what == "memory":
        return (
            f"{name} does not fit the device: weights, one adapter and {_rows(found.rows)} take "
            f"{format_bytes(int(found.by))} of {format_bytes(int(found.limit))}"
        )
    if found.what not in _WORDS:
        return f"{name} needs more than {found.limit:,.0f} devices"
    return (
        f"{name}'s requests miss a target on a device of their own: one takes {found.by:,.3g} ms {_WORDS[found.what]}, "
        f"{found.by - found.limit:,.3g} ms more than the {found.limit:g} ms that it may ({line.asked.origin})"
    )


def _rows(count: int) -> str:
    return "one row" if count == 1 else f"{count:,} rows"


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _note(planned: Planned) -> str:
    fleet = planned.asked[0].fleet
    legend = _LEGEND.format(
        requests=fleet.traffic.requests, repetitions=fleet.repetitions, share=100 * fleet.targets.share
    )
    return "\n".join([legend, *planned.notes])

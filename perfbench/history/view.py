"""What `perfbench history` shows, in every format: how one figure moved over runs. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.figures.change_points import FEWEST, Change
from perfbench.figures.metrics import METRICS
from perfbench.history.store import LEAST_CHANGE, Point, Series
from perfbench.report.chart import Chart
from perfbench.report.page import page
from perfbench.report.tables import Column, grid, markdown, plain

# Series whose runs are listed one by one; of more, one line each.
DETAILED = 3


@dataclass(frozen=True)
class Movement:
    """How one figure moved, as a Subject of `report.formats`: its series, at least one."""

    series: Sequence[Series]

    def print(self, console: Any) -> None:
        """One line for each series, and the runs of the first few one by one where there are no more."""
        render(self.series, console)

    def markdown(self) -> str:
        """A line for each series in a table for each machine."""
        return to_markdown(self.series)

    def records(self) -> list[dict[str, Any]]:
        """A row for each run of each series; `change` is the ratio of the level after to that before, where it
        changes."""
        found = []
        for one in self.series:
            marks = {change.index: change for change in one.changes()}
            for at, point in enumerate(one.points):
                identity = {"figure": one.figure, "machine": one.machine, "case": one.case_id, "options": one.options}
                found.append({**identity, **vars(point), "change": _ratio(marks[at]) if at in marks else None})
        return found

    def page(self) -> str:
        """A plot of each series."""
        return to_html(self.series)


def render(series: Sequence[Series], console: Any) -> None:
    """Prints one line for each series, and the runs of the first few one by one where there are no more."""
    from rich.text import Text

    console.print(Text(_what(series[0].figure)), soft_wrap=True)
    for machine, own in _by_machine(series):
        console.print()
        console.print(Text(f"On {machine}", "bold"), soft_wrap=True)
        for one in own:
            if len(series) <= DETAILED:
                console.print(Text(_name(one, series)), soft_wrap=True)
                console.print(grid(_columns(one), range(len(one.points))))
            else:
                console.print(Text(f"{_name(one, series)}: {_line(one)}"), soft_wrap=True)
    console.print()
    console.print(Text(_how(series[0].figure), "dim"), soft_wrap=True)


def to_markdown(series: Sequence[Series]) -> str:
    """The same for a pull request: the runs of each series in a table of its own, or a table of the series."""
    lines = [plain(_what(series[0].figure)), ""]
    for machine, own in _by_machine(series):
        lines += [f"**On {plain(machine)}**", ""]
        if len(series) <= DETAILED:
            for one in own:
                lines += [plain(_name(one, series)), "", *markdown(_columns(one), range(len(one.points))), ""]
        else:
            name = Column("case", lambda one: _name(one, series), text=True)
            lines += [*markdown([name, Column("runs", _line, text=True)], own), ""]
    return "\n".join([*lines, plain(_how(series[0].figure))]) + "\n"


def _what(figure: str) -> str:
    metric = METRICS[figure]
    better = f", {metric.better} is better" if metric.better else ""
    return f"{figure} ({metric.unit}{better}): {metric.definition}"


def _by_machine(series: Sequence[Series]) -> Iterator[tuple[str, list[Series]]]:
    for machine in dict.fromkeys(one.machine for one in series):
        yield machine, [one for one in series if one.machine == machine]


def _columns(one: Series) -> list[Column]:
    """The columns of a table of one series, whose rows are the places of its points."""
    points, marks = one.points, {change.index: change for change in one.changes()}
    return [
        Column("measured", lambda at: points[at].started_at[:19].replace("T", " "), text=True),
        Column("commit", lambda at: _commit(points[at]), text=True),
        Column(one.figure, lambda at: _value(points[at])),
        Column("change", lambda at: _words(marks[at], one.figure) if at in marks else "", text=True),
    ]


def _line(one: Series) -> str:
    """A series in a line: how many runs, from what to what, and where it changed."""
    first, last = one.points[0], one.points[-1]
    text = f"{len(one.points)} run(s), {_number(first.value)}"
    text += f" to {_number(last.value)}" if len(one.points) > 1 else ""
    found = [f"{_words(change, one.figure)} at {_commit(one.points[change.index])}" for change in one.changes()]
    return "; ".join([text, *found])


def to_html(series: Sequence[Series]) -> str:
    """A page with a plot for each series, change points marked; the machines under their own headings."""
    charts: list[list[Chart]] = []
    sections = []
    for machine, own in _by_machine(series):
        sections.append({"title": f"On {machine}", "charts": len(charts)})
        charts.append([_chart(one, series) for one in own])
    figure = series[0].figure
    changed = [f"{_name(one, series)}: {_line(one)}" for one in series if one.changes()]
    return page(
        title=f"{figure} over {max(len(one.points) for one in series)} runs",
        lead=[METRICS[figure].definition, _how(figure)],
        verdicts=[
            {"title": f"{len(series)} series", "sentences": changed or ["No level changed."]},
        ],
        sections=sections,
        charts=charts,
        colors={},
    )


def _chart(one: Series, series: Sequence[Series]) -> Chart:
    metric = METRICS[one.figure]
    marks = {change.index: change for change in one.changes()}
    better = f", {metric.better} is better" if metric.better else ""
    return Chart(
        "history",
        _name(one, series),
        f"{one.figure}, {metric.unit}{better}",
        ("run", "commit", one.figure, "low", "high", "change", "measured"),
        [
            (
                at + 1, _commit(point), point.value, point.low, point.high,
                _words(marks[at], one.figure) if at in marks else None, point.started_at,
            )
            for at, point in enumerate(one.points)
        ],
    )  # fmt: skip


def _how(figure: str) -> str:
    order = "Runs stand in the order in which they were measured; * marks a checkout with changes of its own."
    if METRICS[figure].kind == "exact":
        return f"This figure is exact: every difference is a change. {order}"
    return (
        "A change: a permutation test on Pettitt's statistic gives p <= 0.01, series without a step whose runs depend "
        "on those before them as these do seem to have one as large as seldom, and the level moves by "
        f"{LEAST_CHANGE:.0%} or more; that takes {FEWEST} runs, and several after the change. {order}"
    )


def _name(one: Series, series: Sequence[Series]) -> str:
    """The case, and its options where the same case was run with several."""
    several = any(other.case_id == one.case_id and other.options != one.options for other in series)
    return f"{one.case_id} {one.options}" if several else one.case_id


def _ratio(change: Change) -> float | None:
    return change.ratio if change.before else None


def _words(change: Change, figure: str) -> str:
    """Such as `-12.3% (worse)`, or the two values where a ratio says nothing."""
    ratio, better = _ratio(change), METRICS[figure].better
    size = f"{ratio - 1:+.1%}" if ratio is not None else f"{_number(change.before)} to {_number(change.after)}"
    if better is None:
        return size
    return f"{size} ({'better' if (change.after > change.before) == (better == 'higher') else 'worse'})"


def _commit(point: Point) -> str:
    return (point.commit or "unknown")[:9] + ("*" if point.dirty else "")


def _value(point: Point) -> str:
    text = _number(point.value)
    return text if point.low is None or point.high is None else f"{text} [{_number(point.low)}, {_number(point.high)}]"


def _number(value: float) -> str:
    """Whole numbers as they are, others to four digits that count."""
    return f"{value:,.0f}" if value == int(value) else f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"

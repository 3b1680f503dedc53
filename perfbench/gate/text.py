"""A report for people: on the terminal, and as Markdown for a pull request. Free of torch.

The verdict comes first. Names and reasons come from files that others wrote, so nothing in them is taken as markup.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from perfbench.figures.metrics import METRICS
from perfbench.files.plain_text import one_line
from perfbench.gate.gate_report import Finding, Report
from perfbench.report import tables
from perfbench.report.formats import console_of
from perfbench.report.tables import Column, grid

_MAX_ROWS = 40
# GitHub shows no step summary of more than 1 MiB: this much is left for all the rows, and so much for one text.
_MAX_MARKDOWN = 600_000
_MAX_TEXT = 600


def shared_prefix(names: Sequence[str]) -> str:
    """What all of `names` start with, up to and with a `/`; "" for a single name."""
    if len(set(names)) < 2:
        return ""
    first, last = min(names), max(names)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: first.rfind("/", 0, same) + 1]


def _prefix(report: Report) -> str:
    return shared_prefix([one.case for one in report.findings if one.kind == "case" and not one.figure])


def columns_of(prefix: str, name: Callable[[str], str] = str) -> list[Column]:
    """The columns of a table of findings, each cell in one line, without the cases' shared `prefix`; `name` makes of
    a case or a figure what a format shows as it is."""
    return [
        Column("case", lambda one: name(one_line(one.case.removeprefix(prefix)) or "-"), text=True),
        Column("figure", lambda one: name(one_line(one.figure)) if one.figure else "is measured", text=True),
        Column("baseline", lambda one: _value(one.baseline)),
        Column("candidate", lambda one: _value(one.candidate)),
        Column("change", change_words),
        Column(
            "verdict",
            lambda one: one.status.upper() if one.status in ("fail", "inconclusive") else one.status,
            text=True,
        ),
    ]


def change_words(finding: Finding) -> str:
    """`-4.8% [-5.2%, -4.3%]`: the change of the figure, with its bound where it has one."""
    if finding.change is None:
        return "-"
    if finding.kind == "exact" and finding.change == 0:
        return "equal"
    text = f"{finding.change:+.2%}"
    return text if finding.low is None or finding.high is None else f"{text} [{finding.low:+.2%}, {finding.high:+.2%}]"


def _value(value: float | None) -> str:
    if value is None:
        return "-"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.{4 if abs(value) < 10 else 2 if abs(value) < 1000 else 0}f}"


def _main(report: Report) -> list[Finding]:
    """What is worth a row of its own: what failed or is open, and the timed figures that carry the verdict."""
    carrying = [one for one in report.findings if one.kind == "timed" and _is_carrying(one)]
    changed = [one for one in report.findings if _held(one, "exact") and one.change != 0]
    return [*report.of("fail", "inconclusive"), *carrying, *changed]


def _is_carrying(finding: Finding) -> bool:
    return finding.status == "pass" or (finding.status == "shown" and bool(finding.note))


def sides(report: Report) -> Iterator[str]:
    """What was compared with what, a line each."""
    if report.baseline or report.candidate:
        yield f"baseline {one_line(report.baseline)}"
        yield f"candidate {one_line(report.candidate)}"


def _rest(report: Report, shown: Sequence[Finding]) -> str:
    """In words: what the rows above leave out."""
    told = set(map(id, shown))
    others = [one for one in report.findings if id(one) not in told]
    counts = {
        "exact figures equal": sum(one.change == 0 for one in others if _held(one, "exact")),
        "exact figures changed within the policy": sum(one.change != 0 for one in others if _held(one, "exact")),
        "cases measured on both sides": sum(_held(one, "case") for one in others),
        "figures shown only": sum(one.kind != "case" and one.status == "shown" for one in others),
    }
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count)


def _held(finding: Finding, kind: str) -> bool:
    return finding.kind == kind and finding.status == "pass"


def print_report(report: Report, *, verdict: bool = True, every: bool = False, console: Any = None) -> None:
    """Prints `report` to `console` (rich's; standard output by default): the verdict line first, then the rows that
    matter, or `every` one."""
    from rich.text import Text

    console = console or console_of()

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style), soft_wrap=True)

    if verdict:
        say(one_line(report.headline), "bold green" if report.verdict == "pass" else "bold red")
    for line in sides(report):
        say(line)
    shown = list(report.findings) if every else _main(report)[:_MAX_ROWS]
    prefix = _prefix(report)
    if shown:
        if prefix:
            say(f"cases {one_line(prefix)}...", "dim")
        console.print(grid(columns_of(prefix), shown), width=min(console.width, 120))
        for finding in shown:
            if finding.status in ("fail", "inconclusive") or (finding.kind == "timed" and finding.note):
                say(one_line(f"{finding.case.removeprefix(prefix)} {finding.figure}: {finding.note}"))
    if rest := _rest(report, shown):
        say(f"beside these: {rest}" if shown else rest)
    for note in report.notes:
        say(one_line(f"note: {note}"), "dim")


def markdown(report: Report) -> str:
    """`report` as GitHub's Markdown: the verdict, the rows that matter, and every other row folded away."""
    prefix = _prefix(report)
    shown = _main(report)
    lines = [f"### {_escaped(report.headline)}", ""]
    lines += [f"- {_escaped(line)}" for line in sides(report)]
    if prefix:
        lines.append(f"- cases {_code(prefix)}")
    lines += [f"- {_escaped(note)}" for note in report.notes] + [""]
    lines += _table(shown[:_MAX_ROWS], prefix)
    if len(shown) > _MAX_ROWS:
        lines.append(f"and {len(shown) - _MAX_ROWS} more, below")
    lines += [
        f"- {_code(one.case.removeprefix(prefix))} {_code(one.figure) if one.figure else ''}: {_escaped(one.note)}"
        for one in shown[:_MAX_ROWS]
        if one.note
    ]
    if report.findings:
        summary = _rest(report, shown) or "all rows"
        rows = _within(_table(report.findings, prefix), _MAX_MARKDOWN)
        lines += ["", f"<details><summary>{_escaped(summary)}</summary>", "", *rows, "", "</details>"]
    return "\n".join(lines) + "\n"


def _within(rows: Sequence[str], characters: int) -> list[str]:
    """The first `rows` that fit, and how many were left out."""
    total = list(itertools.accumulate(len(row.encode()) + 1 for row in rows))
    fit = sum(length <= characters for length in total)
    return [*rows[:fit], *([f"and {len(rows) - fit} more"] if fit < len(rows) else [])]


def _table(findings: Sequence[Finding], prefix: str) -> list[str]:
    return [*tables.markdown(columns_of(prefix, _code), findings, escape=str), ""] if findings else []


def _code(text: str) -> str:
    """A name as a code span, in which nothing is markup, mention or link; inside a table too."""
    return f"`{_cut(one_line(text)).replace('`', chr(39)).replace('|', '¦')}`"


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[: _MAX_TEXT - 1]}…"


def _escaped(text: str) -> str:
    """A sentence as Markdown shows it literally: no HTML, emphasis, table cell, mention or link."""
    text = _cut(one_line(text)).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace("|", "¦")
    for char in "\\`*_[]~#":
        text = text.replace(char, f"\\{char}")
    # A zero-width space keeps GitHub from making a mention or a link of it.
    return text.replace("@", "@\u200b").replace("://", ":\u200b//").replace("www.", "www\u200b.")


def unit_of(figure: str) -> str:
    """The unit of a figure, from the metric catalogue; "" for one that is not in it."""
    return METRICS[figure].unit if figure in METRICS else ""

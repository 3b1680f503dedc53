"""The first page of `perfbench view`, as HTML; text from files is escaped. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from perfbench.files.plain_text import printable
from perfbench.profiling import profile_table


@dataclass(frozen=True)
class Timeline:
    """One trace: its name, the addresses of its chart and of the file itself, and the file's name."""

    name: str
    address: str
    download: str
    file: str


def render(
    folder: str,
    timelines: Sequence[Timeline],
    profile: Mapping[str, Any] | None,
    pictures: Mapping[str, str],
    faults: Sequence[str] = (),
) -> str:
    """The page: the answer and its tables where there is a profile, memory, and the chart of the first trace.

    pictures: label -> address; faults: why a trace is not shown, a line each.
    """
    title = profile["case"] if profile else folder
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(str(title))}</title>",
        '<link rel="icon" href="/speedscope/favicon-32x32-3EB2YCUY.png"><link rel="stylesheet" href="/page.css">',
        f"</head><body><header><h1>{escape(str(title))}</h1></header>",
    ]
    if profile:
        parts += _answer(profile)
    parts += [f'<p class="warning">Not shown: {escape(printable(fault))}</p>' for fault in faults]
    parts += _timelines(timelines)
    if profile:
        parts += _tables(profile)
    if pictures:
        parts.append('<section><h2>Memory</h2><div class="pictures">')
        parts += [
            f'<img src="{escape(address)}" alt="{escape(label)}: memory by category over one call">'
            for label, address in pictures.items()
        ]
        parts.append("</div></section>")
    parts.append("</body></html>")
    return "\n".join(parts)


def _answer(profile: Mapping[str, Any]) -> list[str]:
    sentences = [
        f'<p class="warning">{escape(line)}</p>' if line.startswith("WARNING") else f"<li>{escape(line)}</li>"
        for line in profile_table.answer(profile)
    ]
    warnings = [line for line in sentences if line.startswith("<p")]
    items = [line for line in sentences if line.startswith("<li")]
    return ["<section>", *warnings, "<ul>", *items, "</ul></section>"]


def _tables(profile: Mapping[str, Any]) -> list[str]:
    parts = ["<section><h2>Where the time goes</h2>", '<div class="tables">']
    for table in reversed(profile_table.tables(profile)):
        parts.append(f"<table><caption>{escape(table.title)}</caption><thead><tr>")
        parts += [f"<th>{escape(head)}</th>" for head in table.heads]
        parts.append("</tr></thead><tbody>")
        for row in table.rows:
            cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
            parts.append(f'<tr class="total">{cells}</tr>' if row[0] == "total" else f"<tr>{cells}</tr>")
        parts.append("</tbody></table>")
    parts.append(f'</div><p class="legend">{escape(profile_table.legend(profile))}</p></section>')
    return parts


def _timelines(timelines: Sequence[Timeline]) -> list[str]:
    links = "".join(f'<a href="{escape(one.address)}" target="timeline">{escape(one.name)}</a>' for one in timelines)
    files = ", ".join(
        f'<a href="{escape(one.download)}" download="{escape(one.file)}">{escape(one.file)}</a>' for one in timelines
    )
    return [
        f"<section><h2>Timeline</h2><nav>{links}</nav>",
        f'<iframe name="timeline" src="{escape(timelines[0].address)}" title="timeline"></iframe>',
        f'<p class="legend">Scroll to zoom, drag to move, click for the figures of one kind; the line above the chart '
        f"chooses the thread or stream. The trace itself, for Perfetto: {files}.</p></section>",
    ]

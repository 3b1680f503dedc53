"""The end of a study: a line for each row, in the terminal, in Markdown and as a picture; the paper's numbers too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.text import Text

from perfbench.files.plain_text import printable_tree
from perfbench.files.whole import write as write_file
from perfbench.finetune.search.pictures import FAINT, INK, LOWER, MARGIN_PX, ROW_PX, TOP_PX, UPPER, box, document, label
from perfbench.report import tables
from perfbench.report.words import machine

TABLE, PICTURE = "study.md", "study.svg"
_PANEL_PX, _GAP_PX, _DOT_PX, _LETTER_PX = 190, 24, 8, 7


def write(out: Path, manifest: Mapping[str, Any]) -> None:
    """study.md and study.svg."""
    lines = [
        f"# {tables.plain(manifest['question'])}",
        "",
        *markdown(manifest),
        "",
        *map(tables.plain, notes(manifest)),
    ]
    write_file(out / TABLE, ("\n".join(lines) + "\n").encode())
    write_file(out / PICTURE, picture(manifest).encode())


def columns(manifest: Mapping[str, Any]) -> list[tables.Column]:
    """The row's name, its figures, and the paper's number where one of the rows has one."""

    def figure(name: str, form: str, title: str) -> tables.Column:
        return tables.Column(title, lambda row: shown(row["cells"][name], form))

    found = [tables.Column("", lambda row: row["label"], text=True)]
    found += [figure(name, **one) for name, one in manifest["columns"].items()]
    if manifest["paper"] is not None:
        form = _form(manifest["paper"])
        found.append(tables.Column("the paper", lambda row: shown(row["paper"], form)))
    return found


def _form(paper: Mapping[str, Any]) -> str:
    """How the paper's numbers are written."""
    return ".3f" if paper["unit"] == "Spearman" else ".1f"


def shown(values: Sequence[float], form: str) -> str:
    """The median and, between brackets, lowest and highest: `61.3 (60.0 to 62.0)`; `-` for none."""
    if not values:
        return "-"
    low, middle, high = (format(number, form) for number in (min(values), median(values), max(values)))
    return middle if low == high else f"{middle} ({low} to {high})"


def notes(manifest: Mapping[str, Any]) -> list[str]:
    """What has to be known to read the table."""
    found = ["Median, and between brackets the lowest and the highest, where there are several seeds."]
    if paper := manifest["paper"]:
        found.append(f"The paper: {paper['title']}; {paper['unit']}: {paper['finding']}.")
    environment = manifest["environment"]
    found += [f"NOT SHOWN TO BE SERVED AS TRAINED: {line}." for line in manifest["differs"]]
    size = f"Size {manifest['size']}, on" if manifest["size"] else "On"
    return [*found, f"{size} {machine(environment, environment['device_kind'])}."]


def markdown(manifest: Mapping[str, Any]) -> list[str]:
    """The lines of the table."""
    return tables.markdown(columns(manifest), manifest["rows"])


def render(manifest: Mapping[str, Any], console: Console | None = None) -> None:
    """Prints the question, the table, in pieces where the terminal is narrow, and the notes."""
    console, manifest = console or Console(), printable_tree(manifest)
    console.print(Text(manifest["question"]), soft_wrap=True)
    for some in tables.pieces(columns(manifest), manifest["rows"], console.width):
        console.print(tables.grid(some, manifest["rows"]))
    for line in notes(manifest):
        console.print(Text(line), soft_wrap=True)


def picture(manifest: Mapping[str, Any]) -> str:
    """A panel for each column, each on an axis of its own: a dot for the median, a bar from lowest to highest."""
    panels = [
        (one["title"], one["form"], [row["cells"][name] for row in manifest["rows"]])
        for name, one in manifest["columns"].items()
    ]
    paper = manifest["paper"]
    if paper is not None and any(row["paper"] for row in manifest["rows"]):
        panels.append((f"the paper: {paper['unit']}", _form(paper), [row["paper"] for row in manifest["rows"]]))
    labels = [row["label"] for row in manifest["rows"]]
    left = MARGIN_PX + _LETTER_PX * max(map(len, labels)) + 12
    body = [label(left - 8, _row_px(place) + 4, text, anchor="end") for place, text in enumerate(labels)]
    for place, (title, form, values) in enumerate(panels):
        body += _panel(left + place * (_PANEL_PX + _GAP_PX), title, form, values)
    width = left + len(panels) * (_PANEL_PX + _GAP_PX) + MARGIN_PX
    subtitle = f"{manifest['name']} {manifest['size']}; each panel has its own axis"
    return document(width, _row_px(len(labels)) + 2 * ROW_PX, manifest["question"], subtitle, body)


def _row_px(place: int) -> float:
    return TOP_PX + ROW_PX * (place + 1.5)


def _panel(left: float, title: str, form: str, rows: Sequence[Sequence[float]]) -> list[str]:
    """One column from `left` on; its axis goes from the lowest to the highest value."""
    every = [value for values in rows for value in values]
    low, high = min(every, default=0.0), max(every, default=1.0)
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return left + _DOT_PX + (_PANEL_PX - 2 * _DOT_PX) * ((value - low) / span if high > low else 0.5)

    body = [label(left, TOP_PX + 12, title, INK, size=12)]
    for place, values in enumerate(rows):
        y = _row_px(place)
        body.append(box(left, y - 0.5, _PANEL_PX, 1, "#e8e8e8", title))
        if not values:
            body.append(label(left + _PANEL_PX / 2, y + 4, "–", FAINT, anchor="middle"))
            continue
        tip = shown(values, form)
        body.append(box(x(min(values)), y - 1.5, x(max(values)) - x(min(values)), 3, LOWER, tip))
        middle = x(median(values))
        body.append(box(middle - _DOT_PX / 2, y - _DOT_PX / 2, _DOT_PX, _DOT_PX, UPPER, tip))
    if every:
        foot = _row_px(len(rows)) + 4
        ends = [(low, left, "start")] + ([(high, left + _PANEL_PX, "end")] if high > low else [])
        body += [label(at, foot, format(value, form), FAINT, size=11, anchor=anchor) for value, at, anchor in ends]
    return body

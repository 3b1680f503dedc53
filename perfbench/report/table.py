"""A run as text: a table in the terminal, Markdown, CSV, JSON. Free of torch.

`FORMATS` has the formats; `table` prints with rich, the others give text.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.files.plain_text import printable_tree
from perfbench.report.columns import Column, arm_name, columns_of, paper_columns, peak_column, plain
from perfbench.report.rows import Row, groups, paper_of, rows, verdict
from perfbench.report.words import conclusion, hardware, heading, legend, paper_title, title

WIDTH = 100


def render(manifest: Mapping[str, Any], format: str = "table", console: Any = None) -> str | None:
    """The run `manifest` in one of `FORMATS`: text, or None for `table`, which prints to `console` (rich's;
    by default standard output, at most 100 columns wide).

    Raises PerfbenchError on an unknown format.
    """
    manifest = printable_tree(manifest)
    if format == "table":
        _print(manifest, console)
        return None
    if format not in FORMATS:
        raise PerfbenchError(f"--format: unknown format {format!r}; {nearest(format, FORMATS)}")
    return _TEXTS[format](manifest)


def _print(manifest: Mapping[str, Any], console: Any) -> None:
    from rich.console import Console
    from rich.text import Text

    console = console or Console(width=None if sys.stdout.isatty() else WIDTH)
    width = min(console.width, WIDTH)

    def say(line: str, style: str = "") -> None:
        # Text, not a string: names are printed as they are, never read as markup.
        console.print(Text(line, style), width=width)

    for line in heading(manifest):
        say(line)
    for comparison, group in groups(manifest):
        columns = [*columns_of(group), Column("check", lambda row: row["check"], text=True)]
        console.print()
        grid, left_out = _fitting(title(comparison, manifest["comparisons"]), columns, group, console, width)
        console.print(grid, width=width)
        if left_out:
            say(f"left out at a width of {width}: {', '.join(left_out)}; --format csv has every figure", "dim")
        for row in group:
            if row["reason"]:
                say(f"{arm_name(row, group)}: {verdict(row)}", "red")
        say(hardware(manifest, comparison, group), "dim")
        for sentence in conclusion(group):
            say(sentence)
        paper = paper_of(manifest)
        beside = [row for row in group if row["paper"]]
        if paper and beside:
            console.print()
            grid = _grid(paper_title(paper), [columns[0], *paper_columns(paper, peak_column(group))], beside)
            console.print(grid, width=width)
    console.print()
    say(legend(manifest), "dim")


def _fitting(
    title: str, columns: Sequence[Column], group: Sequence[Row], console: Any, width: int
) -> tuple[Any, list[str]]:
    """(The table with as many columns as can be read at this width, the heads of the others): figures give way from
    the right, never the first column and never the last, which is the proof."""
    from rich.measure import Measurement

    kept, left_out = list(columns), list[str]()
    while True:
        grid = _grid(title, kept, group)
        # The title wraps; what counts is the columns.
        table = _grid("", kept, group)
        if len(kept) == 2 or Measurement.get(console, console.options.update(width=10_000), table).minimum <= width:
            return grid, left_out
        left_out.insert(0, " ".join(kept.pop(-2).head.split()))


def _grid(title: str, columns: Sequence[Column], group: Sequence[Row]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, "bold"), title_justify="left", box=box.HORIZONTALS, show_edge=False)
    grid.collapse_padding, grid.pad_edge = True, False
    for place, column in enumerate(columns):
        # Figures never wrap, and arms only beyond 15 characters; the verdict wraps between its words.
        cells = [column.cell(row) for row in group]
        least = min(15, max(map(len, cells), default=0)) if place == 0 else None
        if not column.text:
            least = max(map(len, [*cells, *column.head.split("\n")]))
        justify: Any = "left" if column.text else "right"
        grid.add_column(Text(column.head), justify=justify, overflow="fold", min_width=least, no_wrap=not column.text)
    for row in group:
        grid.add_row(*(Text(column.cell(row)) for column in columns))
    return grid


def _markdown(manifest: Mapping[str, Any]) -> str:
    lines, paper = [], paper_of(manifest)
    for line in heading(manifest):
        lines += [plain(line), ""]
    for comparison, group in groups(manifest):
        columns = columns_of(group)
        if paper:
            columns += paper_columns(paper, peak_column(group))
        columns.append(Column("check", verdict, text=True))
        lines += [f"**{plain(title(comparison, manifest['comparisons']))}**", ""]
        lines.append(f"| {' | '.join(plain(column.head) for column in columns)} |")
        lines.append(f"|{'|'.join(' --- ' if column.text else ' ---: ' for column in columns)}|")
        lines += [f"| {' | '.join(plain(column.cell(row)) for column in columns)} |" for row in group]
        lines += ["", plain(hardware(manifest, comparison, group)), *map(plain, conclusion(group))]
        if paper:
            lines.append(plain(f"{paper_title(paper)}."))
        lines.append("")
    return "\n".join([*lines, legend(manifest)]) + "\n"


def _csv(manifest: Mapping[str, Any]) -> str:
    flat, text = rows(manifest), io.StringIO()
    if flat:
        writer = csv.DictWriter(text, fieldnames=list(flat[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(flat)
    return text.getvalue()


def _json(manifest: Mapping[str, Any]) -> str:
    return json.dumps(rows(manifest), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


_TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {"markdown": _markdown, "csv": _csv, "json": _json}
FORMATS = ("table", *_TEXTS)

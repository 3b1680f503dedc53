"""Tables, whatever they are about: in the terminal, in Markdown, as CSV and Parquet. Free of torch."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.files.plain_text import printable


@dataclass(frozen=True)
class Column:
    """A column: its `head`, how its `cell` of a row reads, whether it is `text` (left-aligned, and wrapped where the
    terminal is narrow), and the fewest characters of it that stay together."""

    head: str
    cell: Callable[[Any], str]
    text: bool = False
    least_width: int | None = None


def grid(columns: Sequence[Column], rows: Sequence[Any], title: str = "") -> Any:
    """A table of rich; names in it are printed as they are, never read as markup."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    found = Table(title=Text(title, "bold") if title else None, title_justify="left", box=box.HORIZONTALS)
    found.show_edge, found.collapse_padding, found.pad_edge = False, True, False
    for column in columns:
        justify: Any = "left" if column.text else "right"
        found.add_column(
            Text(column.head), justify=justify, overflow="fold", min_width=column.least_width, no_wrap=not column.text
        )
    for row in rows:
        found.add_row(*(Text(column.cell(row)) for column in columns))
    return found


def pieces(columns: Sequence[Column], rows: Sequence[Any], width: int) -> list[list[Column]]:
    """`columns` as several tables where one would be wider than `width` characters, which rich would crop: each has
    the first column, which names the rows, and the last, the verdict."""
    first, *middle, last = columns
    room = width - _width(first, rows) - _width(last, rows)
    found: list[list[Column]] = [[]]
    used = 0
    for column in middle:
        used += _width(column, rows)
        if used > room and found[-1]:
            found.append([])
            used = _width(column, rows)
        found[-1].append(column)
    return [[first, *some, last] for some in found]


def _width(column: Column, rows: Sequence[Any]) -> int:
    """The fewest characters that a column takes, with the two beside it: those of its longest line or, where it wraps,
    of its longest word."""
    lines = [*column.head.split("\n"), *(column.cell(row) for row in rows)]
    lines = [word for line in lines for word in line.split()] if column.text else lines
    return 2 + (column.least_width or max(map(len, lines), default=0))


def plain(text: str) -> str:
    """`text` in one line that Markdown shows as it is, inside a table too: no HTML, link, picture or mention."""
    text = " ".join(printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
    # Brackets stay: intervals have them. What follows them is what makes a link.
    text = re.sub(r"\](?=[(\[:])", "]\\\\", text.replace("`", "\\`"))
    # A zero-width space keeps GitHub from making a mention or a link of it.
    return re.sub(r"@(?=\w)", "@\u200b", text).replace("://", ":\u200b//").replace("www.", "www\u200b.")


def markdown(columns: Sequence[Column], rows: Sequence[Any], escape: Callable[[str], str] = plain) -> list[str]:
    """The lines of a Markdown table; `escape` makes of a cell what Markdown shows as it is."""
    return [
        f"| {' | '.join(plain(column.head) for column in columns)} |",
        f"|{'|'.join(' --- ' if column.text else ' ---: ' for column in columns)}|",
        *(f"| {' | '.join(escape(column.cell(row)) for column in columns)} |" for row in rows),
    ]


def as_csv(records: Sequence[Mapping[str, Any]]) -> str:
    """`records`, all with the fields of the first, under one line of heads; a list becomes its values, separated by
    spaces."""
    text = io.StringIO()
    if records:
        writer = csv.DictWriter(text, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({
                key: " ".join(map(str, value)) if isinstance(value, list) else value for key, value in record.items()
            })  # fmt: skip
    return text.getvalue()


def as_parquet(records: Sequence[Mapping[str, Any]]) -> bytes:
    """`records` as a Parquet file. PerfbenchError where its library is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise PerfbenchError(
            "--format parquet: needs pyarrow, which is not installed; pip install 'adapter-perfbench[parquet]', "
            "or use csv"
        ) from None
    columns = {name: _one_type([record[name] for record in records]) for name in (records[0] if records else ())}
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), buffer)
    return buffer.getvalue()


def _one_type(values: list[Any]) -> list[Any]:
    """A figure may be whole in one row and broken in another: then all of its column is."""
    broken = any(isinstance(value, float) for value in values)
    return [float(value) if broken and value is not None else value for value in values]

"""A few tables under one another, with a closing note, in every format but a page: what `params` and `roof` give.
Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError
from perfbench.report import tables
from perfbench.report.tables import Column


@dataclass(frozen=True)
class PlainTables:
    """Tables with the same `columns`: (title, rows) of each, every row a flat record; `note` stands below them all, the
    answer in a sentence, `lead`, above them.

    It is a Subject of `perfbench.report.formats`; a page raises PerfbenchError."""

    columns: Sequence[Column]
    parts: Sequence[tuple[str, Sequence[dict[str, Any]]]]
    note: str = ""
    lead: str = ""

    def print(self, console: Any) -> None:
        """Prints every table, each as several where one would be wider than the console."""
        if self.lead:
            console.print(self.lead, "", sep="\n", markup=False)
        for title, rows in self.parts:
            for index, some in enumerate(tables.pieces(self.columns, rows, console.width)):
                console.print(tables.grid(some, rows, "" if index else title))
        if self.note:
            console.print(self.note, style="dim", markup=False, highlight=False)

    def markdown(self) -> str:
        """Each title as a line of its own above its table."""
        lines = [line for title, rows in self.parts for line in (
            f"**{tables.plain(title)}**", "", *tables.markdown(self.columns, rows), "",
        )]  # fmt: skip
        above = [tables.plain(self.lead), ""] if self.lead else []
        return "\n".join([*above, *lines, *([tables.plain(self.note)] if self.note else [])]).rstrip() + "\n"

    def records(self) -> list[dict[str, Any]]:
        """The rows of all tables."""
        return [record for _, rows in self.parts for record in rows]

    def page(self) -> str:
        """PerfbenchError: these tables are made in a moment and need no page."""
        raise PerfbenchError("--format html: these tables have no page; choose table, markdown, csv, json or parquet")

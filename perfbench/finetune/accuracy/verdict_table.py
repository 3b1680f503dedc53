"""The end of `perfbench accuracy` in the terminal. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from rich.console import Console
from rich.text import Text

from perfbench.finetune.accuracy import verdict_words
from perfbench.finetune.accuracy.verdict import Verdict
from perfbench.report import tables


def render(manifest: Mapping[str, Any], verdict: Verdict, console: Console | None = None) -> None:
    """Prints the tables of each task, then the answer."""
    console = console or Console()
    if manifest["question"]:
        console.print(Text(manifest["question"]), soft_wrap=True)
    for task in dict.fromkeys(row.task for row in verdict.methods):
        console.print()
        console.print(Text(task, "bold"))
        rows = [row for row in verdict.methods if row.task == task]
        cells = [verdict_words.method_cells(row, manifest, verdict.reference) for row in rows]
        cells = [*verdict_words.zero_shot_cells(task, verdict, manifest), *cells]
        _print(verdict_words.METHOD_HEADS, cells, (0, 9), console)
        served = [row for row in verdict.paths if row.task == task]
        paths = dict.fromkeys(row.path for row in served)
        summed_up = [verdict_words.summary_cells([row for row in served if row.path == path]) for path in paths]
        if summed_up:
            _print(verdict_words.SUMMARY_HEADS, summed_up, (0, 4), console)
        for one in rows:
            if one.verdict != "pass":
                decides = verdict_words.points(one.versus[one.decides])
                console.print(Text(f"{one.method}: {one.verdict} on {one.decides}: {decides} points"), soft_wrap=True)
        for row in served:
            if row.reason:
                console.print(Text(f"{row.method} on {row.path}: {row.verdict}: {row.reason}"), soft_wrap=True)
    console.print()
    for line in (*verdict_words.left_out(manifest), *verdict_words.findings(verdict)):
        console.print(Text(line), soft_wrap=True)
    console.print(Text(verdict_words.headline(verdict), "bold"), soft_wrap=True)


def _print(heads: Sequence[str], rows: Sequence[Sequence[str]], text: Sequence[int], console: Console) -> None:
    """A table, or several where the terminal is narrow. A column in which no row has anything is left out."""
    shown = [place for place in range(len(heads)) if any(row[place] != verdict_words.NOTHING for row in rows)]
    columns = [tables.Column(heads[place], itemgetter(place), text=place in text) for place in shown]
    for some in tables.pieces(columns, rows, console.width):
        console.print(tables.grid(some, rows))

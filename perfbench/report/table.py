"""A run as a table of its cases: what `perfbench run` and `perfbench show` give, in every format. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perfbench.files.plain_text import printable_lines, printable_tree
from perfbench.report import formats
from perfbench.report.columns import MAIN, arm_name, columns_of, metrics_of, paper_columns
from perfbench.report.read import Run
from perfbench.report.rows import groups, paper_of, rows, verdict
from perfbench.report.tables import Column, grid, markdown, pieces, plain
from perfbench.report.words import conclusion, hardware, heading, legend, paper_title, title
from perfbench.run_folder.run_schema import Manifest, Sample


def render(manifest: Manifest, format: str = "table", console: Any = None, columns: str = MAIN) -> str | bytes | None:
    """The run `manifest` in one of `formats.FORMATS`; None for `table`, which is printed to `console` (rich's; by
    default standard output, at most 100 columns wide). `columns`: as in `columns.metrics_of`.

    Raises PerfbenchError on an unknown format and on unknown columns.
    """
    subject = RunTable(printable_tree(manifest), columns)
    if format == "table":
        subject.print(console or formats.console_of())
        return None
    return formats.rendered(subject, format)


@dataclass(frozen=True)
class RunTable:
    """One run as a Subject of formats. `manifest` has to be printable; `samples`, for the page alone: case -> its
    valid repetitions."""

    manifest: Manifest
    columns: str = MAIN
    samples: Mapping[str, Sequence[Sample]] | None = None

    def __post_init__(self) -> None:
        metrics_of(self.columns)  # a wrong name is refused before the first line is printed

    def print(self, console: Any) -> None:
        """At most 100 columns wide; the paper's figures stand in a table of their own."""
        from rich.text import Text

        manifest, width = self.manifest, min(console.width, formats.WIDTH)

        def say(line: str, style: str = "") -> None:
            # Text, not a string: names are printed as they are, never read as markup.
            console.print(Text(line, style), width=width)

        for line in heading(manifest):
            say(line)
        for comparison, group in groups(manifest):
            columns = [*columns_of(group, self.columns), Column("check", lambda row: row["check"], text=True)]
            subject = title(comparison, manifest["comparisons"])
            for some in pieces(columns, group, width):
                console.print()
                console.print(grid(some, group, subject), width=width)
                subject = ""
            for row in group:
                if row["reason"]:
                    say(f"{arm_name(row, group)}: {verdict(row)}", "red")
            say(hardware(manifest, comparison, group), "dim")
            for sentence in conclusion(group):
                say(sentence)
            paper = paper_of(manifest)
            beside = [row for row in group if row["paper"]]
            if paper and beside:
                subject = paper_title(paper)
                for some in pieces([columns[0], *paper_columns(paper)], beside, width):
                    console.print()
                    console.print(grid(some, beside, subject), width=width)
                    subject = ""
        console.print()
        say(legend(manifest, self.columns), "dim")

    def markdown(self) -> str:
        """The same as Markdown, the paper's figures in the columns beside ours, verdicts with their reasons."""
        manifest = self.manifest
        lines, paper = [], paper_of(manifest)
        for line in heading(manifest):
            lines += [plain(line), ""]
        for comparison, group in groups(manifest):
            columns = columns_of(group, self.columns)
            if paper:
                columns += paper_columns(paper)
            columns.append(Column("check", verdict, text=True))
            lines += [f"**{plain(title(comparison, manifest['comparisons']))}**", "", *markdown(columns, group)]
            lines += ["", plain(hardware(manifest, comparison, group)), *map(plain, conclusion(group))]
            if paper:
                lines.append(plain(f"{paper_title(paper)}."))
            lines.append("")
        return "\n".join([*lines, legend(manifest, self.columns)]) + "\n"

    def records(self) -> list[dict[str, Any]]:
        """One flat row for each case with all of its figures, whatever the columns."""
        return rows(self.manifest)

    def page(self) -> str:
        """The page of `perfbench report` of this run alone."""
        from perfbench.report import html

        name = str(self.manifest["scenario"].get("name"))
        samples: dict[str, list[Sample]] = {case_id: [] for case_id in self.manifest["cases"]}
        samples |= {printable_lines(case_id): list(own) for case_id, own in (self.samples or {}).items()}
        return html.render([Run(name, Path(), self.manifest, samples, ())])

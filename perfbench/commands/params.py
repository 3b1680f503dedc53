"""`perfbench params`: what one tenant's adapter is, in parameters and in bytes served, for every method."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfbench.figures.papers import PARAMETERS
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import find_config, shape_of


def render(backbone: str, dtype: str, console: Console | None = None) -> None:
    """Prints the table; nothing is allocated. BackboneError where there is no such backbone."""
    find_config(backbone)
    rows = [row for method in METHODS if (row := _row(method, backbone, dtype)) is not None]
    title = Text(f"One tenant's adapter on {backbone}, served in {dtype}", "table.title")
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    for heading in ("trained parameters", "served MiB", "papers, on llama2-7b"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(*map(Text, row))
    (console or Console()).print(table)


def _row(method: str, backbone: str, dtype: str) -> tuple[str, str, str, str] | None:
    """One line, or None for the arms that serve another method's adapters."""
    from perfbench.methods import parameters

    entry = METHODS[method]
    if entry.module is None or not entry.has_one_size:
        return None
    shape, options = shape_of(backbone), entry.options()
    count = parameters.parameter_count(method, shape, options)
    served = parameters.served_count(method, shape, options) * DTYPES[dtype].bytes
    return method, f"{count:,}", f"{served / 2**20:,.2f}", _papers(method)


def _papers(method: str) -> str:
    """What a paper prints, with the exact count; nothing where no paper counts this method."""
    if method not in PARAMETERS:
        return ""
    paper = PARAMETERS[method]
    exact = f"{paper.exact:,}" + (f", {paper.note}" if paper.note else "")
    return f"{paper.printed} ({exact})"

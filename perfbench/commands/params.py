"""`perfbench params`: what one tenant's adapter is, in parameters and in bytes served, for every method."""

from __future__ import annotations

from typing import Any

from perfbench.figures.papers import PARAMETERS
from perfbench.methods.dtypes import DTYPES
from perfbench.methods.registry import METHODS
from perfbench.report.plain_tables import PlainTables
from perfbench.report.tables import Column
from perfbench.spec.backbone_config import find_config, shape_of

COLUMNS = (
    Column("method", lambda row: row["method"], text=True),
    Column("trained\nparameters", lambda row: f"{row['trained_parameters']:,}"),
    Column("served\nMiB", lambda row: f"{row['served_bytes'] / 2**20:,.2f}"),
    Column("papers, on llama2-7b", lambda row: _papers(row["method"]), text=True),
)


def table(backbone: str, dtype: str) -> PlainTables:
    """A row for each method; nothing is allocated. BackboneError where there is no such backbone."""
    find_config(backbone)
    rows = [row for method in METHODS if (row := _row(method, backbone, dtype)) is not None]
    return PlainTables(COLUMNS, [(f"One tenant's adapter on {backbone}, served in {dtype}", rows)])


def _row(method: str, backbone: str, dtype: str) -> dict[str, Any] | None:
    """One line, or None for the arms that serve another method's adapters."""
    from perfbench.methods import parameters

    entry = METHODS[method]
    if entry.module is None or not entry.has_one_size:
        return None
    shape, options = shape_of(backbone), entry.options()
    return {
        "backbone": backbone,
        "dtype": dtype,
        "method": method,
        "trained_parameters": parameters.parameter_count(method, shape, options),
        "served_bytes": parameters.served_count(method, shape, options) * DTYPES[dtype].bytes,
        "printed_in_paper": PARAMETERS[method].printed if method in PARAMETERS else None,
    }


def _papers(method: str) -> str:
    """What a paper prints, with the exact count; nothing where no paper counts this method."""
    if method not in PARAMETERS:
        return ""
    paper = PARAMETERS[method]
    exact = f"{paper.exact:,}" + (f", {paper.note}" if paper.note else "")
    return f"{paper.printed} ({exact})"

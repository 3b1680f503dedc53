"""A chart as data: what is drawn, and the same as a table. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# How charts.js draws it. bars: from zero, [name, value, low, high]; dots: the same on an axis that need not start at
# zero; stack: [name, one value for each part]; lines: [series, x, value, low, high]; histogram and drift: one small
# panel for each row, drawn from `data`; history: [order, name, value, low, high, mark]; scatter: [name, x, y, lowest y,
# highest y, size or None, "yes" on the front], `data.x` says what the other axis shows; heat: [name, from, to, value],
# of which those above `data.target` stand out.
KINDS = ("bars", "dots", "stack", "lines", "histogram", "drift", "history", "scatter", "heat")


@dataclass(frozen=True)
class Chart:
    """`title` says what it is about, `axis` what the axis of values shows, with its unit; `columns` and `rows` are
    the chart as a table; `note` says how to read it; `data` is what a kind needs beside the rows."""

    kind: str
    title: str
    axis: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    note: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data, numbers cut to five digits that count."""
        found: dict[str, Any] = _shorten(vars(self))
        return {key: value for key, value in found.items() if value not in ("", {})}


def _shorten(value: Any) -> Any:
    if isinstance(value, float):
        short = float(f"{value:.7g}")
        return int(short) if short.is_integer() else short
    if isinstance(value, Mapping):
        return {key: _shorten(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_shorten(member) for member in value]
    return value

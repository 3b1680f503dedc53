"""The columns of a table of cases: heads, and how a row's figures read. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from perfbench.figures.papers import Paper
from perfbench.files.plain_text import MIB, NOTHING, format_bytes, printable
from perfbench.report.rows import ENDS, Row


@dataclass(frozen=True)
class Column:
    """A column of the table: its `head`, how a row's `cell` reads, whether it is `text` (left-aligned)."""

    head: str
    cell: Callable[[Row], str]
    text: bool = False


def _figure(value: float | None) -> str:
    """At least three digits that count: 1.23, 12.3, 123, 1,234."""
    if value is None:
        return NOTHING
    return f"{value:,.{2 if abs(value) < 10 else 1 if abs(value) < 100 else 0}f}"


def _mib(value: float | None) -> str:
    return NOTHING if value is None else f"{value / MIB:,.0f}"


def _count(value: int | None) -> str:
    """A count in at most six characters: 9,999, 553k, 7.6M."""
    if value is None or value < 10_000:
        return NOTHING if value is None else f"{value:,}"
    return f"{value // 1000}k" if value < 1_000_000 else f"{value / 1e6:,.1f}M"


def _interval(row: Row, name: str, scale: float, digits: int) -> str:
    """`ratio [low, high]`; the ratio alone where one round gave no interval."""
    ratio, low, high = (row[f"{name}{end}"] for end in ENDS)
    if ratio is None:
        return NOTHING
    text = f"{ratio * scale:.{digits}f}"
    return text if low is None else f"{text} [{low * scale:.{digits}f}, {high * scale:.{digits}f}]"


def _kept(row: Row) -> str:
    if row["method"] == "none" and row["decode_tokens_per_s"] is not None:
        return "the bare one"
    return _interval(row, "kept_decode_tokens_per_s", 100, 1)


def _versus_lora(row: Row) -> str:
    """Ours, laid beside a paper's: nothing where the paper has no such arm, 1 for LoRA itself."""
    if row["paper"] is None:
        return NOTHING
    ratio = row["versus_lora_tokens_per_s"]
    if row["method"] == "lora" and ratio is None and row["tokens_per_s"] is not None:
        return "1.00"
    return _interval(row, "versus_lora_tokens_per_s", 1, 2)


# Of tensors: what a process has resident grows from arm to arm and compares none of them.
PEAK = Column("peak\nMiB", lambda row: _mib(row["peak_allocated_bytes"]))


def columns_of(group: Sequence[Row]) -> list[Column]:
    """The columns of one comparison; the ratio to the plain runtime and kernels where that was measured too, and the
    second turn's time in the place of the operations."""
    turns = any(row["follow_up_ttft_ms"] is not None for row in group)
    kernels, plain = len({row["kernels"] for row in group}) > 1, "versus_plain_decode_tokens_per_s"
    return [
        Column("arm", lambda row: f"{row['arm']} ({row['kernels']})" if kernels else row["arm"], text=True),
        Column("tokens\n/s", lambda row: _figure(row["decode_tokens_per_s"])),
        Column("kept\n%", _kept),
        *([Column("times\nplain", lambda row: _figure(row[plain]))] if any(row[plain] for row in group) else []),
        Column("ttft\nms", lambda row: _figure(row["ttft_ms"])),
        *([Column("turn 2\nttft", lambda row: _figure(row["follow_up_ttft_ms"]))] if turns else []),
        PEAK,
        Column("a\ntenant", lambda row: ("~" if row["tenants_differ"] else "") + format_bytes(row["bytes_per_tenant"])),
        Column("more\nfit", lambda row: _count(row["tenants_that_fit"])),
        Column("roof\n%", lambda row: NOTHING if row["roof_share"] is None else f"{row['roof_share'] * 100:.0f}"),
        *([] if turns else [Column("ops\n/step", lambda row: _count(row["aten_ops_per_decode_step"]))]),
    ]


def paper_columns(paper: Paper) -> list[Column]:
    """The paper's numbers beside ours; speeds as ratios to LoRA, because the machines differ."""

    def theirs(row: Row) -> str:
        ratio = row["paper_versus_lora_tokens_per_s"]
        return (paper.speeds or NOTHING) if ratio is None and row["paper"] else _figure(ratio)

    return [
        Column("tokens/s to LoRA's, ours", _versus_lora),
        Column("the paper's ratio", theirs),
        Column(f"{plain(PEAK.head)}, ours", lambda row: PEAK.cell(row) if row["paper"] else NOTHING),
        Column("the paper's MiB", lambda row: f"{row['paper_mib']:,}" if row["paper_mib"] else NOTHING),
    ]


def arm_name(row: Row, group: Sequence[Row]) -> str:
    return columns_of(group)[0].cell(row)


def plain(text: str) -> str:
    """`text` in one line that Markdown shows as it is, inside a table too: no HTML, link, picture or mention."""
    text = " ".join(printable(text).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())
    # Brackets stay: intervals have them. What follows them is what makes a link.
    text = re.sub(r"\](?=[(\[:])", "]\\\\", text.replace("`", "\\`"))
    # A zero-width space keeps GitHub from making a mention or a link of it.
    return re.sub(r"@(?=\w)", "@\u200b", text).replace("://", ":\u200b//").replace("www.", "www\u200b.")

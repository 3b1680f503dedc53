"""The columns of a table of cases: heads, and how a row's figures read. Free of torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from perfbench.errors import PerfbenchError, nearest
from perfbench.figures.metrics import METRICS, named
from perfbench.figures.papers import Paper
from perfbench.files.plain_text import MIB, NOTHING, format_bytes
from perfbench.report.rows import ENDS, Row, field_of
from perfbench.report.tables import Column, plain


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


def arm_column(group: Sequence[Row]) -> Column:
    """The arms' names, with their kernels where there are several; they wrap only beyond 15 characters."""
    several = len({row["kernels"] for row in group}) > 1
    names = [f"{row['arm']} ({row['kernels']})" if several else row["arm"] for row in group]
    width = min(15, max(map(len, names), default=0))
    return Column("arm", lambda row: f"{row['arm']} ({row['kernels']})" if several else row["arm"], True, width)


def main_columns(group: Sequence[Row]) -> list[Column]:
    """What `run` prints of one comparison; the ratio to the plain runtime and kernels where that was measured too,
    and the second turn's time in the place of the operations."""
    turns = any(row["follow_up_ttft_ms"] is not None for row in group)
    plain = "versus_plain_decode_tokens_per_s"
    return [
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


def metric_column(name: str) -> Column:
    """Any figure of METRICS as a column, headed by its name."""
    metric, (*words, last) = METRICS[name], name.split("_")

    def cell(row: Row) -> str:
        value = row.get(field_of(name))
        if metric.unit == "bytes":
            return format_bytes(value)
        return _count(value) if isinstance(value, int) else _figure(value)

    return Column(f"{' '.join(words)}\n{last}" if words else last, cell)


# Name for --columns -> the metrics.
COLUMNS: dict[str, Callable[[], Sequence[str]]] = {"tails": lambda: list(named("tail"))}
MAIN = "main"


def metrics_of(columns: str) -> list[str] | None:
    """The metrics of `--columns A,B`, each a name of COLUMNS or of METRICS; None for MAIN, whose columns follow the
    run. PerfbenchError on a name that is neither."""
    if columns == MAIN:
        return None
    found: list[str] = []
    for name in columns.split(","):
        if name not in COLUMNS and name not in METRICS:
            known = (MAIN, *COLUMNS, *METRICS)
            raise PerfbenchError(f"--columns: unknown column {name!r}; {nearest(name, known)}")
        found += COLUMNS[name]() if name in COLUMNS else [name]
    return found


def columns_of(group: Sequence[Row], columns: str = MAIN) -> list[Column]:
    """The columns of one comparison: the arm, then those that `metrics_of` names."""
    metrics = metrics_of(columns)
    rest = main_columns(group) if metrics is None else [metric_column(name) for name in metrics]
    return [arm_column(group), *rest]


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
    return arm_column(group).cell(row)

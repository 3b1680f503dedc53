"""A run as a table: from the manifest of a run to rows, and from rows to text. Free of torch.

`FORMATS` has the formats; `table` prints with rich, the others give text.
"""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perfbench.errors import PerfbenchError, nearest
from perfbench.papers import Paper, find_paper
from perfbench.roof import Device, Work
from perfbench.stats import overlap

Row = dict[str, Any]
WIDTH = 100
NOTHING = "-"
_MIB = 2**20
_WORKLOAD = ("prompt_tokens", "new_tokens", "beams", "requests", "tenants", "resident", "tenant_mix")
_RARE = {"follow_up_tokens": "second turn"}
_TIMES = ("total_ms", "ttft_ms", "follow_up_ttft_ms", "itl_ms")
_MEDIANS = (*_TIMES, "decode_tokens_per_s", "tokens_per_s", "energy_mj_per_token")
_PEAKS = tuple(f"peak_{kind}_bytes" for kind in ("allocated", "reserved", "device", "process", "resident"))
_FIGURES = {
    "memory": (*_PEAKS, "adapter_bytes", "kv_cache_bytes", "tenants_that_fit"),
    "adapters": ("parameters_per_tenant", "bytes_per_tenant", "admit_ms"),
    "exact": (
        "aten_ops_per_decode_step",
        "kernel_launches_per_decode_step",
        "flops_per_decode_step",
        "bytes_per_decode_step",
        "least_flops_per_decode_step",
        "kept_bound",
    ),
}
_VERDICTS = {
    "pending": "pending",
    "check_failed": "FAILED",
    "check_void": "void",
    "crashed": "CRASHED",
    "out_of_memory": "OUT OF MEMORY",
}
_LEGEND = (
    "kept: the share of the bare backbone's decode speed that is left with the adapters in, the median over "
    "rounds with its 95% interval. ttft: until the first token. a tenant: adapter "
    "memory that one more takes; more fit: how many more. roof: the least time of the last step, from what it must "
    "read, over the time between tokens. ops: ATen operations in a decode step."
)
_LEGEND_TURNS = (
    " turn 2 ttft: until the first token of the second turn; all arms but those whose scales are generated from the "
    "prompt (PARA) read the first turn out of the cache."
)
_LEGEND_PLAIN = " times plain: decode speed over that of the same arm on runtime transformers with kernels eager."



def rows(manifest: Mapping[str, Any]) -> list[Row]:
    """One flat row for each case: identity, then every figure under its metric's name (the median, where it
    was sampled), then the paper's numbers. What was not measured is None; units are in the names.

    Raises ScenarioError where the scenario names a paper that there is not.
    """
    name = manifest["scenario"].get("paper")
    paper = find_paper(name) if name else None
    return [
        _row(comparison, manifest["cases"][case_id], name, paper)
        for comparison in manifest["comparisons"]
        for case_id in comparison["case_ids"]
    ]


def _row(
    comparison: Mapping[str, Any], case: Mapping[str, Any], name: str | None, paper: Paper | None
) -> Row:
    row: Row = {"comparison": comparison["id"]}
    row |= {field: comparison[field] for field in ("backbone", "dtype", "device", "runtime")}
    row |= {field: comparison["workload"].get(field) for field in _WORKLOAD}
    row |= {"case": case["id"]} | {field: case[field] for field in ("arm", "method", "kernels", "status")}
    summary = case["summary"] or {}
    row |= {"check": _check(case), "reason": case["reason"]}
    row |= {"rounds": summary["total_ms"]["rounds"] if summary else None}
    row |= {metric: summary[metric]["median"] if metric in summary else None for metric in _MEDIANS}
    for field in ("kept", "versus_lora", "versus_plain"):
        for speed in ("decode_tokens_per_s", "tokens_per_s"):
            interval = (case[field] or {}).get(speed) or {}
            row |= {f"{field}_{speed}{end}": interval.get(key) for end, key in _ENDS.items()}
    for field, figures in _FIGURES.items():
        row |= {figure: (case[field] or {}).get(figure) for figure in figures}
    least_ms = _least_ms(comparison, row)
    row |= {"least_ms_per_decode_step": least_ms}
    row |= {"roof_share": least_ms / row["itl_ms"] if least_ms and row["itl_ms"] else None}
    beams = comparison["workload"].get("beams")
    theirs = paper.row(case["method"], beams, case["options"]) if paper else None
    ratio = paper.versus_lora(case["method"], beams) if paper and theirs else None
    return row | {
        "paper": name if theirs else None,
        "paper_tokens_per_s": theirs.tokens_per_s if theirs else None,
        "paper_versus_lora_tokens_per_s": ratio,
        "paper_mib": theirs.mib if theirs else None,
    }


def _least_ms(comparison: Mapping[str, Any], row: Row) -> float | None:
    """The least time of the last decode step on the device of this comparison; None where something is not known."""
    roof = comparison.get("roof")
    if not roof or row["bytes_per_decode_step"] is None or row["least_flops_per_decode_step"] is None:
        return None
    device = Device(**roof)
    work = Work(row["bytes_per_decode_step"], 0, 0, row["least_flops_per_decode_step"])
    return work.least_s(device, row["dtype"]) * 1e3


_ENDS = {"": "ratio", "_low": "low", "_high": "high"}


def _check(case: Mapping[str, Any]) -> str:
    """The verdict on a case in a word or two, without its reason."""
    if case["status"] != "ok":
        return _VERDICTS[case["status"]]
    if case["summary"] is None:
        return "no valid sample"
    ties = (case["check"] or {}).get("ties")
    return f"tie {ties}" if ties else "ok"


def verdict(row: Row) -> str:
    """The verdict with its reason, in one line."""
    return " ".join(f"{row['check']} {row['reason'] or ''}".split())


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


def _count(value: int | None) -> str:
    """A count in at most six characters: 9,999, 553k, 7.6M."""
    if value is None or value < 10_000:
        return NOTHING if value is None else f"{value:,}"
    return f"{value // 1000}k" if value < 1_000_000 else f"{value / 1e6:,.1f}M"


def format_bytes(value: float | None) -> str:
    if not value:
        return NOTHING
    return f"{value / 1024:,.1f} KiB" if value < _MIB else f"{value / _MIB:,.1f} MiB"


def _interval(row: Row, name: str, scale: float, digits: int) -> str:
    """`ratio [low, high]`; the ratio alone where one round gave no interval."""
    ratio, low, high = (row[f"{name}{end}"] for end in _ENDS)
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


def peak_column(group: Sequence[Row]) -> Column:
    """Peak memory is that of tensors, or the host's where it is not known."""
    known = any(row["peak_allocated_bytes"] is not None for row in group)
    peak, head = ("peak_allocated_bytes", "peak\nMiB") if known else ("peak_resident_bytes", "host\nMiB")
    return Column(head, lambda row: NOTHING if row[peak] is None else f"{row[peak] / _MIB:,.0f}")


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
        peak_column(group),
        Column("a\ntenant", lambda row: format_bytes(row["bytes_per_tenant"])),
        Column("more\nfit", lambda row: _count(row["tenants_that_fit"])),
        Column("roof\n%", lambda row: NOTHING if row["roof_share"] is None else f"{row['roof_share'] * 100:.0f}"),
        *([] if turns else [Column("ops\n/step", lambda row: _count(row["aten_ops_per_decode_step"]))]),
    ]


def paper_columns(paper: Paper, peak: Column) -> list[Column]:
    """The paper's numbers beside ours; speeds as ratios to LoRA, because the machines differ."""

    def theirs(row: Row) -> str:
        ratio = row["paper_versus_lora_tokens_per_s"]
        return (paper.speeds or NOTHING) if ratio is None and row["paper"] else _figure(ratio)

    return [
        Column("tokens/s to LoRA's, ours", _versus_lora),
        Column("the paper's ratio", theirs),
        Column(f"{plain(peak.head)}, ours", lambda row: peak.cell(row) if row["paper"] else NOTHING),
        Column("the paper's MiB", lambda row: f"{row['paper_mib']:,}" if row["paper_mib"] else NOTHING),
    ]


def title(comparison: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What one table is about; the workload's rarer fields where the run has several of their values."""
    load = comparison["workload"]
    counts = {field: load.get(field) for field in ("new_tokens", "beams", "requests")}
    parts = [
        " ".join(str(comparison[field]) for field in ("backbone", "dtype", "device", "runtime")),
        f"prompt {load.get('prompt_tokens') or 'as in the file'}, "
        + ", ".join(f"{field.removesuffix('_tokens')} {count}" for field, count in counts.items()),
        f"tenants {load.get('tenants')} ({load.get('tenant_mix')}), resident {load.get('resident')}",
    ]
    parts += [f"{what} {load[field]}" for field, what in _RARE.items() if load.get(field)]
    for field, value in load.items():
        if field not in (*_WORKLOAD, *_RARE) and any(other["workload"].get(field) != value for other in others):
            parts.append(f"{field} {value}")
    return "; ".join(parts)


def machine(environment: Mapping[str, Any], device: str) -> str:
    """What a comparison on `device` ran on, in words: the GPUs and their host, or the CPU and its threads."""
    cpu = environment.get("cpu") or {}
    host = f"{cpu.get('model') or 'unknown CPU'}, {cpu.get('threads') or 'unknown'} threads"
    gpus = sorted({gpu.get("name") or "unknown" for gpu in environment.get("gpus") or []})
    return f"{', '.join(gpus) or 'unknown GPU'} (host: {host})" if device.startswith("cuda") else host


def hardware(manifest: Mapping[str, Any], comparison: Mapping[str, Any], group: Sequence[Row]) -> str:
    """The machine and the number of rounds, which belong beside every number."""
    here = machine(manifest["environment"], str(comparison["device"]))
    counted = sorted({row["rounds"] for row in group if row["rounds"] is not None})
    if not counted:
        return f"On {here}; nothing was timed."
    planned, few = manifest["scenario"].get("repetitions"), str(counted[0])
    processes = manifest["scenario"].get("processes", 1)
    if planned is not None:
        planned *= processes
    rounds = few if len(counted) == 1 else f"{few} to {counted[-1]}"
    # Void samples, or a run that was stopped: said, because the medians rest on fewer rounds than planned.
    within = f" in {processes} processes" if processes > 1 else ""
    of = f" of {planned} planned" if planned is not None and counted != [planned] else ""
    return f"On {here}; medians of {rounds}{of} rounds{within}."


def conclusion(group: Sequence[Row]) -> Iterator[str]:
    """In words: which arm kept most of the bare backbone's speed, with its ties, and which costs least."""
    measured = [row for row in group if row["kept_decode_tokens_per_s"] is not None]
    if measured:
        best = max(measured, key=lambda row: row["kept_decode_tokens_per_s"])
        share = f"{best['kept_decode_tokens_per_s']:.1%}"
        if len(measured) == 1:
            yield f"{arm_name(best, group)} kept {share} of the bare backbone's decode speed."
        else:
            name, ties = arm_name(best, group), _ties(best, measured)
            yield f"{name} kept most of the bare backbone's decode speed, {share}{ties}"
    priced = [row for row in group if row["bytes_per_tenant"] and row["status"] == "ok"]
    if priced:
        least = min(row["bytes_per_tenant"] for row in priced)
        names = [arm_name(row, group) for row in priced if row["bytes_per_tenant"] == least]
        yield f"A tenant costs least with {_enumerated(names)}: {format_bytes(least)}."


def _ties(best: Row, measured: Sequence[Row]) -> str:
    """The rest of the sentence: whose interval overlaps that of the `best`."""
    others = [row for row in measured if row is not best]
    overlaps = {arm_name(row, measured): overlap(_kept_interval(best), _kept_interval(row)) for row in others}
    if None in overlaps.values():
        return "; with a single round there is no interval, so the order may be chance."
    ties = [name for name, tied in overlaps.items() if tied]
    if not ties:
        return ", and no other arm's interval reaches it."
    return f", a tie with {_enumerated(ties)}: the intervals overlap."


def is_best(row: Row, measured: Sequence[Row]) -> bool:
    """Whether `row` kept most of all `measured`, or its interval overlaps that of the one that did."""
    best = max(measured, key=lambda row: row["kept_decode_tokens_per_s"])
    return row is best or bool(overlap(_kept_interval(best), _kept_interval(row)))


def _kept_interval(row: Row) -> Row:
    return {key: row[f"kept_decode_tokens_per_s{end}"] for end, key in _ENDS.items()}


def _enumerated(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1]) if part])


def arm_name(row: Row, group: Sequence[Row]) -> str:
    return columns_of(group)[0].cell(row)


def render(manifest: Mapping[str, Any], format: str = "table", console: Any = None) -> str | None:
    """The run `manifest` in one of `FORMATS`: text, or None for `table`, which prints to `console` (rich's;
    by default standard output, at most 100 columns wide).

    Raises PerfbenchError on an unknown format.
    """
    if format == "table":
        _print(manifest, console)
        return None
    if format not in FORMATS:
        raise PerfbenchError(f"--format: unknown format {format!r}; {nearest(format, FORMATS)}")
    return _TEXTS[format](manifest)


def legend(manifest: Mapping[str, Any]) -> str:
    beside_plain = any(case["versus_plain"] for case in manifest["cases"].values())
    turns = any(comparison["workload"].get("follow_up_tokens") for comparison in manifest["comparisons"])
    return _LEGEND + (_LEGEND_PLAIN if beside_plain else "") + (_LEGEND_TURNS if turns else "")


def groups(manifest: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[Row]]]:
    flat = rows(manifest)
    for comparison in manifest["comparisons"]:
        yield comparison, [row for row in flat if row["comparison"] == comparison["id"]]


def heading(manifest: Mapping[str, Any]) -> list[str]:
    scenario = manifest["scenario"]
    head = f"{scenario.get('name')}: {scenario.get('question') or 'no question given'}"
    return [" ".join(str(line).split()) for line in (head, *(scenario.get("notes") or ()))]


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
        console.print(_grid(title(comparison, manifest["comparisons"]), columns, group), width=width)
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


def _grid(title: str, columns: Sequence[Column], group: Sequence[Row]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=Text(title, "bold"), title_justify="left", box=box.HORIZONTALS, show_edge=False)
    grid.collapse_padding, grid.pad_edge = True, False
    for place, column in enumerate(columns):
        # Figures never wrap, and arms only beyond 15 characters; the verdict wraps.
        name = min(15, max((len(column.cell(row)) for row in group), default=0)) if place == 0 else None
        justify: Any = "left" if column.text else "right"
        grid.add_column(
            Text(column.head), justify=justify, overflow="fold", min_width=name, no_wrap=not column.text
        )
    for row in group:
        grid.add_row(*(Text(column.cell(row)) for column in columns))
    return grid


def paper_of(manifest: Mapping[str, Any]) -> Paper | None:
    name = manifest["scenario"].get("paper")
    return find_paper(name) if name else None


def paper_title(paper: Paper) -> str:
    return f"Beside {paper.title}; on {paper.machine}"


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


def plain(text: str) -> str:
    """`text` in one line that Markdown shows as it is, inside a table too."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


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

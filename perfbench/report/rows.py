"""A run as rows: from its manifest to one flat mapping for each case. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perfbench.figures.metrics import METRICS, PARTS, named
from perfbench.figures.papers import Paper, find_paper
from perfbench.figures.roof import least_ms
from perfbench.figures.stats import LEAST_ROUNDS
from perfbench.run_folder.run_schema import Case, Comparison, Manifest

Row = dict[str, Any]
ENDS = {"": "ratio", "_low": "low", "_high": "high"}
WORKLOAD = ("prompt_tokens", "new_tokens", "beams", "requests", "tenants", "resident", "tenant_mix")
SPEEDS = ("decode_tokens_per_s", "tokens_per_s")
_VERDICTS = {
    "pending": "pending",
    "check_failed": "FAILED",
    "check_void": "void",
    "crashed": "CRASHED",
    "out_of_memory": "OUT OF MEMORY",
}


def rows(manifest: Manifest) -> list[Row]:
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


def _row(comparison: Comparison, case: Case, name: str | None, paper: Paper | None) -> Row:
    row: Row = {"comparison": comparison["id"]}
    row |= {field: comparison[field] for field in ("backbone", "dtype", "device", "runtime")}
    row |= {"quantisation": comparison.get("quantisation", "none")}
    row |= {"tensor_parallel_size": comparison.get("tensor_parallel_size", 1)}
    row |= {field: comparison["workload"].get(field) for field in WORKLOAD}
    row |= {"case": case["id"]} | {field: case[field] for field in ("arm", "method", "kernels", "status")}
    summary = case["summary"] or {}
    row |= {"check": _check(case), "reason": case["reason"]}
    row |= {"rounds": summary["total_ms"]["rounds"] if summary else None}
    row |= {name: summary.get(name, {}).get("median") for name in named("sample")}
    for name, metric in named("tail").items():
        of, key = metric.tail or ("", "")
        row |= {name: summary.get(of, {}).get(key)}
    parts: Mapping[str, Any] = case
    for name in named("ratio"):
        for speed in SPEEDS:
            interval = (parts.get(name) or {}).get(speed) or {}
            if (interval.get("rounds") or 0) < LEAST_ROUNDS:  # version 0.1 wrote an interval of two rounds already
                interval = {"ratio": interval.get("ratio")}
            row |= {f"{name}_{speed}{end}": interval.get(key) for end, key in ENDS.items()}
    row |= {name: (parts[metric.source] or {}).get(name) for name, metric in named(*PARTS).items()}
    row |= {"tenants_differ": bool((case["adapters"] or {}).get("of_tenants"))}
    least = least_ms(comparison, case)
    row |= {"least_ms_per_decode_step": least}
    row |= {"roof_share": least / row["itl_ms"] if least and row["itl_ms"] else None}
    beams: Any = comparison["workload"].get("beams")
    theirs = paper.row(case["method"], beams, case["options"]) if paper else None
    ratio = paper.versus_lora(case["method"], beams) if paper and theirs else None
    return row | {
        "paper": name if theirs else None,
        "paper_tokens_per_s": theirs.tokens_per_s if theirs else None,
        "paper_versus_lora_tokens_per_s": ratio,
        "paper_mib": theirs.mib if theirs else None,
    }


def field_of(name: str) -> str:
    """Where a row has the figure of a metric: a ratio is that of the decode speed."""
    return f"{name}_{SPEEDS[0]}" if METRICS[name].source == "ratio" else name


def _check(case: Case) -> str:
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


def groups(manifest: Manifest) -> Iterator[tuple[Comparison, list[Row]]]:
    flat = rows(manifest)
    for comparison in manifest["comparisons"]:
        yield comparison, [row for row in flat if row["comparison"] == comparison["id"]]


def paper_of(manifest: Manifest) -> Paper | None:
    name = manifest["scenario"].get("paper")
    return find_paper(name) if name else None

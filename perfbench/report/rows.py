"""A run as rows: from its manifest to one flat mapping for each case. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from perfbench.figures.papers import Paper, find_paper
from perfbench.figures.roof import least_ms

Row = dict[str, Any]
ENDS = {"": "ratio", "_low": "low", "_high": "high"}
WORKLOAD = ("prompt_tokens", "new_tokens", "beams", "requests", "tenants", "resident", "tenant_mix")
_TIMES = ("total_ms", "ttft_ms", "follow_up_ttft_ms", "itl_ms")
_MEDIANS = (*_TIMES, "decode_tokens_per_s", "tokens_per_s", "energy_mj_per_token")
_PEAKS = tuple(f"peak_{kind}_bytes" for kind in ("allocated", "reserved", "device", "process", "resident"))
_FIGURES = {
    "memory": (*_PEAKS, "adapter_bytes", "kv_cache_bytes", "tenants_that_fit"),
    "adapters": ("parameters_per_tenant", "bytes_per_tenant", "resident_bytes_per_tenant", "admit_ms"),
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


def _row(comparison: Mapping[str, Any], case: Mapping[str, Any], name: str | None, paper: Paper | None) -> Row:
    row: Row = {"comparison": comparison["id"]}
    row |= {field: comparison[field] for field in ("backbone", "dtype", "device", "runtime")}
    row |= {field: comparison["workload"].get(field) for field in WORKLOAD}
    row |= {"case": case["id"]} | {field: case[field] for field in ("arm", "method", "kernels", "status")}
    summary = case["summary"] or {}
    row |= {"check": _check(case), "reason": case["reason"]}
    row |= {"rounds": summary["total_ms"]["rounds"] if summary else None}
    row |= {metric: summary[metric]["median"] if metric in summary else None for metric in _MEDIANS}
    for field in ("kept", "versus_lora", "versus_plain"):
        for speed in ("decode_tokens_per_s", "tokens_per_s"):
            interval = (case[field] or {}).get(speed) or {}
            row |= {f"{field}_{speed}{end}": interval.get(key) for end, key in ENDS.items()}
    for field, figures in _FIGURES.items():
        row |= {figure: (case[field] or {}).get(figure) for figure in figures}
    row |= {"tenants_differ": bool((case["adapters"] or {}).get("of_tenants"))}
    least = least_ms(comparison, case)
    row |= {"least_ms_per_decode_step": least}
    row |= {"roof_share": least / row["itl_ms"] if least and row["itl_ms"] else None}
    beams = comparison["workload"].get("beams")
    theirs = paper.row(case["method"], beams, case["options"]) if paper else None
    ratio = paper.versus_lora(case["method"], beams) if paper and theirs else None
    return row | {
        "paper": name if theirs else None,
        "paper_tokens_per_s": theirs.tokens_per_s if theirs else None,
        "paper_versus_lora_tokens_per_s": ratio,
        "paper_mib": theirs.mib if theirs else None,
    }


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


def groups(manifest: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], list[Row]]]:
    flat = rows(manifest)
    for comparison in manifest["comparisons"]:
        yield comparison, [row for row in flat if row["comparison"] == comparison["id"]]


def paper_of(manifest: Mapping[str, Any]) -> Paper | None:
    name = manifest["scenario"].get("paper")
    return find_paper(name) if name else None

"""A run in words: what a table is about, the machine, the conclusion, what the columns mean. Free of torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perfbench.figures.metrics import METRICS
from perfbench.figures.papers import Paper
from perfbench.figures.stats import LEAST_ROUNDS, overlap
from perfbench.files.plain_text import format_bytes
from perfbench.report.columns import MAIN, arm_name, metrics_of
from perfbench.report.rows import ENDS, WORKLOAD, Row
from perfbench.run_folder.run_schema import Manifest

_RARE = {"follow_up_tokens": "second turn", "own_tokens": "own tokens"}
_LEGEND = (
    "kept: the share of the bare backbone's decode speed that is left with the adapters in, the median over "
    "rounds with its 95% interval. ttft: the time until the first token. a tenant: the size of one adapter as "
    "it is served; where tenants differ, ~ and their mean. more fit: how many more tenants' adapters fit into the "
    "memory that a running batch leaves. roof: the least time that the median step can take for what it must read and "
    "compute, as a share of the median time between tokens."
)
_LEGEND_OPS = " ops: ATen operations in a decode step."
_LEGEND_TURNS = (
    " turn 2 ttft: the time until the first token of the second turn; all arms but those whose scales are generated "
    "from the prompt (PARA) read the first turn out of the cache."
)
_LEGEND_PLAIN = " times plain: decode speed over that of the same arm on runtime transformers with kernels eager."


def heading(manifest: Manifest) -> list[str]:
    scenario = manifest["scenario"]
    head = f"{scenario.get('name')}: {scenario.get('question') or 'no question given'}"
    return [" ".join(str(line).split()) for line in (head, *(scenario.get("notes") or ()))]


def title(comparison: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """What one table is about; the workload's rarer fields where the run has several of their values."""
    load = comparison["workload"]
    counts = {field: load.get(field) for field in ("new_tokens", "beams", "requests")}
    parts = [
        where(comparison),
        f"prompt {load.get('prompt_tokens') or 'as in the file'}, "
        + ", ".join(f"{field.removesuffix('_tokens')} {count}" for field, count in counts.items()),
        f"tenants {load.get('tenants')} ({load.get('tenant_mix')}), resident {load.get('resident')}",
    ]
    parts += [f"{what} {load[field]}" for field, what in _RARE.items() if load.get(field)]
    for field, value in load.items():
        if field not in (*WORKLOAD, *_RARE) and any(other["workload"].get(field) != value for other in others):
            parts.append(f"{field} {value}")
    return "; ".join(parts)


def where(comparison: Mapping[str, Any]) -> str:
    """The backbone and what it runs in, such as `llama-110m fp32 int8 cpu static`, and over how many ranks."""
    quantisation, ranks = comparison.get("quantisation", "none"), comparison.get("tensor_parallel_size", 1)
    numbers = comparison["dtype"] if quantisation == "none" else f"{comparison['dtype']} {quantisation}"
    over = "" if ranks == 1 else f", tensor parallel over {ranks} ranks"
    return f"{comparison['backbone']} {numbers} {comparison['device']} {comparison['runtime']}{over}"


def machine(environment: Mapping[str, Any], device: str) -> str:
    """What a comparison on `device` ran on, in words: the GPUs and their host, or the CPU and its threads."""
    cpu = environment.get("cpu") or {}
    host = f"{cpu.get('model') or 'unknown CPU'}, {cpu.get('threads') or 'unknown'} threads"
    gpus = sorted({gpu.get("name") or "unknown" for gpu in environment.get("gpus") or []})
    return f"{', '.join(gpus) or 'unknown GPU'} (host: {host})" if device.startswith("cuda") else host


def hardware(manifest: Manifest, comparison: Mapping[str, Any], group: Sequence[Row]) -> str:
    """The machine and the number of rounds, which belong beside every number."""
    measured_on = comparison.get("machine") or manifest["environment"]  # a node of a cluster, or what started the run
    here = machine(measured_on, str(comparison["device"]))
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
    return (
        f"On {here}; medians of {rounds}{of} rounds{within}."
        f"{busy(measured_on)}{_correlated(manifest, comparison, group)}"
    )


def _correlated(manifest: Manifest, comparison: Mapping[str, Any], group: Sequence[Row]) -> str:
    """A sentence where each round was like the one before it: an interval that takes them to be independent is too
    narrow then."""
    kept = {case: (manifest["cases"][case]["kept"] or {}).get("decode_tokens_per_s") for case in comparison["case_ids"]}
    names = [arm_name(row, group) for row in group if (kept.get(row["case"]) or {}).get("correlated")]
    if not names:
        return ""
    return (
        f" The rounds of {_enumerated(names)} are correlated, each with the one before it, so that intervals are too "
        f"narrow: measure in several processes (--processes {LEAST_ROUNDS})."
    )


def busy(environment: Mapping[str, Any]) -> str:
    """A sentence where other work filled the machine's cores when the run began: then nothing here is steady."""
    load, cores = environment.get("load_average"), (environment.get("cpu") or {}).get("usable_cores")
    # A run that follows another finds about as much load as there are cores, its predecessor's.
    if not load or not cores or load[0] < 1.5 * cores:
        return ""
    return f" The machine was busy when the run began (load {load[0]:.1f} on {cores} cores): measure on a quiet one."


def conclusion(group: Sequence[Row]) -> Iterator[str]:
    """In words: which arm kept most of the bare backbone's speed, with its ties, and which costs least."""
    measured = [row for row in group if row["kept_decode_tokens_per_s"] is not None]
    if measured:
        best = max(measured, key=lambda row: row["kept_decode_tokens_per_s"])
        share = f"{best['kept_decode_tokens_per_s']:.1%}"
        enough = _enough(measured)
        if not enough:
            yield f"Nothing is ranked: fewer than {LEAST_ROUNDS} rounds, as here, don't tell arms apart."
        elif len(measured) == 1:
            yield f"{arm_name(best, group)} kept {share} of the bare backbone's decode speed."
        else:
            name, ties = arm_name(best, group), _ties(best, measured)
            yield f"{name} kept most of the bare backbone's decode speed, {share}{ties}"
        above = [row for row in measured if (row["kept_decode_tokens_per_s_low"] or 0) > 1 and enough]
        if above:
            yield (
                f"Implausible: with {_enumerated([arm_name(row, group) for row in above])} decoding was faster than "
                f"without adapters, its interval lies above 100%; look for what differs beside the adapter."
            )
    priced = [row for row in group if row["bytes_per_tenant"] and row["status"] == "ok"]
    if priced:
        least = min(row["bytes_per_tenant"] for row in priced)
        names = [arm_name(row, group) for row in priced if row["bytes_per_tenant"] == least]
        yield f"A tenant costs least with {_enumerated(names)}: {format_bytes(least)}."


def _enough(measured: Sequence[Row]) -> bool:
    """Whether every arm has, in common with the bare backbone, the rounds that an interval takes."""
    return all(row["kept_decode_tokens_per_s_low"] is not None and row["rounds"] >= LEAST_ROUNDS for row in measured)


def _ties(best: Row, measured: Sequence[Row]) -> str:
    """The rest of the sentence: whose interval overlaps that of the `best`."""
    others = [row for row in measured if row is not best]
    overlaps = {arm_name(row, measured): overlap(_kept_interval(best), _kept_interval(row)) for row in others}
    ties = [name for name, tied in overlaps.items() if tied]
    if not ties:
        return ", and no other arm's interval reaches it."
    return f", a tie with {_enumerated(ties)}: the intervals overlap."


def is_best(row: Row, measured: Sequence[Row]) -> bool:
    """Whether `row` kept most of all `measured`, or its interval overlaps that of the one that did; no row, where the
    rounds are too few to tell."""
    if not _enough(measured):
        return False
    best = max(measured, key=lambda row: row["kept_decode_tokens_per_s"])
    return row is best or bool(overlap(_kept_interval(best), _kept_interval(row)))


def _kept_interval(row: Row) -> Row:
    return {key: row[f"kept_decode_tokens_per_s{end}"] for end, key in ENDS.items()}


def _enumerated(names: Sequence[str]) -> str:
    """a; a and b; a, b and c."""
    return " and ".join([part for part in (", ".join(names[:-1]), names[-1]) if part])


def legend(manifest: Manifest, columns: str = MAIN) -> str:
    """What the columns mean: those that were asked for by their metrics' definitions."""
    if (metrics := metrics_of(columns)) is not None:
        return " ".join(f"{name} ({METRICS[name].unit}): {METRICS[name].definition}." for name in metrics)
    beside_plain = any(case["versus_plain"] for case in manifest["cases"].values())
    turns = any(comparison["workload"].get("follow_up_tokens") for comparison in manifest["comparisons"])
    # The second turn's column takes the place of the operations.
    whole_turns = all(comparison["workload"].get("follow_up_tokens") for comparison in manifest["comparisons"])
    operations = "" if turns and whole_turns else _LEGEND_OPS
    return _LEGEND + operations + (_LEGEND_PLAIN if beside_plain else "") + (_LEGEND_TURNS if turns else "")


def paper_title(paper: Paper) -> str:
    return f"Beside {paper.title}; on {paper.machine}"

"""What each figure means: the one place that defines them. Free of torch.

A *request* is one prompt; rows = requests x beams. Beams are never multiplied in. N, the number of new
tokens, is exact, because end-of-sequence is off in latency work. A *sample* is one repetition of one case; a
*round* is one turn of all the cases of a comparison; an *arm* is one case of a comparison.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

Take = Callable[[Mapping[str, Any], int], list[float]]

# The parts of a case of run.json in which a figure stands under its metric's name.
PARTS = ("memory", "adapters", "exact")
# Beside them. sample: in every repetition, and summarised in the `summary` of a case; tail: a percentile of such
# a figure; ratio: a part of a case of its own, an interval for each speed; row: worked out from other figures where a
# table is made; compiled: in kernels/resources.json, under the metric's name without `compiled_`.
SOURCES = (*PARTS, "sample", "tail", "ratio", "row", "compiled")
# exact: the same in any two runs of one commit, so that any difference past its tolerance is a change; timed: sampled,
# and judged by a bound where a policy names it; shown: taken once in a run, or worked out from others, never judged.
KINDS = ("exact", "timed", "shown")


def _stored(name: str) -> Take:
    """What a sample holds under `name`: its one value or its list of them, nothing where it has none."""

    def take(sample: Mapping[str, Any], _requests: int) -> list[float]:
        value = sample.get(name)
        return value if isinstance(value, list) else [] if value is None else [value]

    return take


def _energy(sample: Mapping[str, Any], requests: int) -> list[float]:
    energy, steps = sample["energy_mj"], len(sample["itl_ms"])
    return [] if energy is None else [energy_mj_per_token(energy, requests, steps + 1)]


@dataclass(frozen=True)
class Metric:
    """One figure, declared here and nowhere else: tables, CSV, JSON, Parquet, pages, history, gate, schema and
    `perfbench list` all read this entry.

    unit; better: "higher", "lower" or None; definition: in one line; source: where it is found, of SOURCES; kind: of
    KINDS. optional: of a source "sample", that samples may lack it, as those of older runs do. take: how its values
    are found in a sample of so many requests, where they don't stand there under its name. tail: of a source "tail",
    (the metric, the key of its summary). one_machine: an exact figure that depends on threads and instruction set,
    and is exact only among runs that have both in common.
    """

    unit: str
    better: str | None
    definition: str
    source: str
    kind: str
    optional: bool = False
    take: Take | None = None
    tail: tuple[str, str] | None = None
    one_machine: bool = False
    tolerance: float = 0.0


METRICS: dict[str, Metric] = {
    "total_ms": Metric("ms", "lower", "the whole time of one generate call", "sample", "timed"),
    "ttft_ms": Metric(
        "ms", "lower", "the time from the start of generate until the first new token is chosen", "sample", "timed"
    ),
    "follow_up_ttft_ms": Metric(
        "ms", "lower",
        "the time to the first token of the second turn, which goes on from the first turn's cache where the "
        "method allows it",
        "sample", "timed", optional=True,
    ),
    "itl_ms": Metric(
        "ms", "lower", "the time between two tokens: one value for each decode step, the time since the step before it",
        "sample", "timed",
    ),
    "decode_tokens_per_s": Metric(
        "tokens/s", "higher",
        "requests x (N - 1) / (total_ms - ttft_ms): the speed without the prefill; beams are never multiplied in",
        "sample", "timed",
    ),
    "tokens_per_s": Metric(
        "tokens/s", "higher", "requests x N / total_ms: the speed with the prefill, which the papers print",
        "sample", "timed",
    ),
    "energy_mj_per_token": Metric(
        "mJ/token", "lower", "energy that the device takes during generate (NVML) / (requests x N)",
        "sample", "timed", optional=True, take=_energy,
    ),
    "ttft_p50_ms": Metric(
        "ms", "lower", "the median of ttft_ms over all valid repetitions", "tail", "timed", tail=("ttft_ms", "median")
    ),
    "ttft_p95_ms": Metric(
        "ms", "lower", "95% of the repetitions have a ttft_ms of at most this; known from 100 repetitions on",
        "tail", "timed", tail=("ttft_ms", "p95"),
    ),
    "ttft_p99_ms": Metric(
        "ms", "lower", "99% of the repetitions have a ttft_ms of at most this; known from 1,000 repetitions on",
        "tail", "timed", tail=("ttft_ms", "p99"),
    ),
    "itl_p50_ms": Metric(
        "ms", "lower", "the median of itl_ms over the steps of all valid repetitions",
        "tail", "timed", tail=("itl_ms", "median"),
    ),
    "itl_p95_ms": Metric(
        "ms", "lower", "95% of the steps of all repetitions have an itl_ms of at most this; known from 100 steps on",
        "tail", "timed", tail=("itl_ms", "p95"),
    ),
    "itl_p99_ms": Metric(
        "ms", "lower", "99% of the steps of all repetitions have an itl_ms of at most this; known from 1,000 steps on",
        "tail", "timed", tail=("itl_ms", "p99"),
    ),
    "kept": Metric(
        "ratio", "higher", "the arm's speed / that of `none` in the same round, the median over the rounds",
        "ratio", "shown",
    ),
    "versus_lora": Metric(
        "ratio", "higher",
        "the arm's speed / that of `lora` in the same round, the median over the rounds: the papers have this "
        "ratio",
        "ratio", "shown",
    ),
    "versus_plain": Metric(
        "ratio", "higher",
        "the arm's speed / that of the same arm on runtime transformers with kernels eager in the same round, the"
        " median over the rounds",
        "ratio", "shown",
    ),
    # The workspace of a CPU's kernels grows with the threads and differs between instruction sets.
    "peak_allocated_bytes": Metric(
        "bytes", "lower", "the most memory that tensors take on the device while a batch runs, with that arm alone",
        "memory", "exact", one_machine=True,
    ),
    "peak_reserved_bytes": Metric(
        "bytes", "lower", "the most device memory that torch's allocator holds while a batch runs, with that arm alone",
        "memory", "shown",
    ),
    "peak_device_bytes": Metric(
        "bytes", "lower", "the most memory of the device that all processes use together (NVML)", "memory", "shown"
    ),
    "peak_process_bytes": Metric(
        "bytes", "lower", "the most memory of the device that the measuring process uses (NVML)", "memory", "shown"
    ),
    "peak_resident_bytes": Metric(
        "bytes", "lower",
        "the most host memory that the measuring process had resident; it grows from arm to arm, so it compares "
        "none",
        "memory", "shown",
    ),
    "adapter_bytes": Metric(
        "bytes", "lower", "memory on the device of the adapters of all resident tenants", "memory", "exact"
    ),
    "kv_cache_bytes": Metric(
        "bytes", "lower", "memory of the keys and values when the cache is full, after the last step", "memory", "exact"
    ),
    "tenants_that_fit": Metric(
        "tenants", "higher", "how many more tenants' adapters fit into the memory that is left while a batch runs",
        "memory", "shown",
    ),
    "parameters_per_tenant": Metric(
        "parameters", None, "trained parameters of one tenant's adapter; the mean where tenants differ",
        "adapters", "exact",
    ),
    "bytes_per_tenant": Metric(
        "bytes", "lower", "size of one tenant's adapter as it is served; the mean where tenants differ",
        "adapters", "exact",
    ),
    "resident_bytes_per_tenant": Metric(
        "bytes", "lower",
        "memory that one more resident tenant takes: a slot of the bank, or all that PEFT makes of the adapter",
        "adapters", "shown",
    ),
    "admit_ms": Metric(
        "ms", "lower",
        "the time that one tenant's adapter takes from its checkpoint folder, in the page cache, into its slot",
        "adapters", "shown",
    ),
    "conversion_error": Metric(
        "ratio", "lower",
        "of adapters converted to LoRA: the part of what they did to a weight that is lost, in Frobenius' norm; the "
        "mean over the modules of a few tenants",
        "adapters", "shown",
    ),
    "conversion_logit_distance": Metric(
        "ratio", "lower",
        "of adapters converted to LoRA: how far that moves the logits from what they were, relative to their size, at "
        "the worst token of a prompt; the mean over a few prompts",
        "adapters", "shown",
    ),
    "compile_ms": Metric(
        "ms", "lower",
        "of kernels compiled: the first decode step of the batch, which compiles it, or finds it in the compiler's "
        "cache; no part of any other figure",
        "adapters", "shown",
    ),
    "aten_ops_per_decode_step": Metric(
        "operations", "lower",
        "ATen operations called in one decode step; of kernels compiled: those that it consists of before it is "
        "compiled",
        "exact", "exact",
    ),
    "kernel_launches_per_decode_step": Metric(
        "launches", "lower", "device kernels launched in one decode step", "exact", "exact"
    ),
    "flops_per_decode_step": Metric(
        "FLOPs", "lower",
        "floating-point operations of one decode step: those that were counted, or the least that it needs where "
        "that is more",
        "exact", "exact",
    ),
    # Three times what seven runs of one commit differed by at most (callgrind, llama-256x8, two methods, two runtimes).
    "instructions_per_decode_step": Metric(
        "instructions", "lower",
        "instructions that the host executes in one decode step, in user space on one thread, counted where `perfbench "
        "ab --instructions` asks for it",
        "exact", "exact", one_machine=True, tolerance=0.006,
    ),
    "bytes_per_decode_step": Metric(
        "bytes", "lower", "bytes of weights, adapters and cache that the last decode step has to read", "exact", "exact"
    ),
    "least_flops_per_decode_step": Metric(
        "FLOPs", "lower", "floating-point operations of the products that the last decode step can't do without",
        "exact", "exact",
    ),
    "bytes_per_first_decode_step": Metric(
        "bytes", "lower", "bytes of weights, adapters and cache that the first decode step has to read",
        "exact", "exact",
    ),
    "least_flops_per_first_decode_step": Metric(
        "FLOPs", "lower", "floating-point operations of the products that the first decode step can't do without",
        "exact", "exact",
    ),
    "kept_bound": Metric(
        "ratio", "higher",
        "bytes that a step of `none` reads / bytes that a step of the arm reads: the highest `kept` that memory "
        "traffic allows",
        "exact", "exact",
    ),
    "least_ms_per_decode_step": Metric(
        "ms", "lower",
        "the least time of the median decode step: its bytes over the device's bandwidth, or its FLOPs over the "
        "device's peak, whichever takes longer",
        "row", "shown",
    ),
    "roof_share": Metric("ratio", "higher", "least_ms_per_decode_step / the median of itl_ms", "row", "shown"),
    "compiled_registers": Metric(
        "registers", "lower", "registers that one thread of a compiled kernel uses (ptxas)", "compiled", "exact"
    ),
    "compiled_spill_bytes": Metric(
        "bytes", "lower", "registers' worth of bytes that one thread of a compiled kernel keeps in memory instead",
        "compiled", "exact",
    ),
    "compiled_shared_bytes": Metric(
        "bytes", "lower", "shared memory that one program of a compiled kernel uses", "compiled", "exact"
    ),
}  # fmt: skip


def named(*sources: str, kind: str | None = None) -> dict[str, Metric]:
    """The entries of METRICS of any of these `sources`, and of this `kind` where one is said, in their order."""
    return {
        name: metric for name, metric in METRICS.items() if metric.source in sources and kind in (None, metric.kind)
    }


def sample_values(name: str, sample: Mapping[str, Any], requests: int) -> list[float]:
    """The values of a metric of source "sample" in one repetition of so many prompts: one for each step of `itl_ms`,
    one of any other; none where the repetition has none."""
    return (METRICS[name].take or _stored(name))(sample, requests)


def required_of_samples() -> list[str]:
    """The metrics that every sample has to have, under their own names."""
    return [name for name, metric in named("sample").items() if not metric.optional]


def tails_of(name: str) -> list[str]:
    """The keys of the tails that are declared of a sampled metric, such as `p95`."""
    return [metric.tail[1] for metric in named("tail").values() if metric.tail and metric.tail[0] == name]


def sample_metrics(token_times_ms: Sequence[float], requests: int, total_ms: float) -> dict[str, Any]:
    """The figures of one repetition.

    `token_times_ms`: the N instants, in ms since the start of generate, at which each step's token was
    chosen; `requests`: prompts in the batch, not rows; `total_ms`: the whole generate call. Gives `total_ms`,
    `ttft_ms`, `itl_ms` (N - 1 values), `decode_tokens_per_s` and `tokens_per_s`.
    Raises ValueError on fewer than 2 tokens, on fewer than 1 request, and on times that are not finite, go
    backwards, or leave no time for decoding.
    """
    times = [float(instant) for instant in token_times_ms]
    tokens = len(times)
    if tokens < 2:
        raise ValueError(f"token_times_ms: expected at least 2 tokens, got {tokens}")
    if requests < 1:
        raise ValueError(f"requests: expected an integer >= 1, got {requests}")
    instants = [0.0, *times, float(total_ms)]
    for step, (before, after) in enumerate(pairwise(instants)):
        name = "total_ms" if step == tokens else f"token_times_ms[{step}]"
        if not math.isfinite(after):
            raise ValueError(f"{name}: expected a finite time in ms, got {after}")
        if after < before:
            raise ValueError(f"{name}: times go backwards, {after} ms follows {before} ms")
    ttft_ms, decode_ms = times[0], float(total_ms) - times[0]
    if decode_ms <= 0:
        raise ValueError(f"total_ms: expected more than ttft_ms ({ttft_ms} ms), got {total_ms} ms")
    return {
        "total_ms": float(total_ms),
        "ttft_ms": ttft_ms,
        "itl_ms": [after - before for before, after in pairwise(times)],
        "decode_tokens_per_s": requests * (tokens - 1) / decode_ms * 1000.0,
        "tokens_per_s": requests * tokens / float(total_ms) * 1000.0,
    }


def contradiction(sample: Mapping[str, Any], requests: int, new_tokens: int) -> str | None:
    """What in a sample of `requests` prompts and `new_tokens` each can't be so, worked out from the times alone; None
    where all agrees."""
    steps, total_ms, ttft_ms = sample["itl_ms"], sample["total_ms"], sample["ttft_ms"]
    if len(steps) != new_tokens - 1:
        return f"itl_ms: expected {new_tokens - 1} steps after the first token, got {len(steps)}"
    if not 0 < ttft_ms + sum(steps) <= total_ms * (1 + 1e-9):
        return f"total_ms: the steps take {ttft_ms + sum(steps)} ms, the whole call {total_ms} ms"
    for name, tokens, ms in (
        ("tokens_per_s", new_tokens, total_ms), ("decode_tokens_per_s", new_tokens - 1, total_ms - ttft_ms),
    ):  # fmt: skip
        if not math.isclose(sample[name], requests * tokens / ms * 1e3, rel_tol=1e-9):
            return f"{name}: {requests} requests x {tokens} tokens in {ms} ms are not {sample[name]}"
    return None


def energy_mj_per_token(energy_mj: float, requests: int, new_tokens: int) -> float:
    """Energy of one generate call in mJ, shared out over its requests x N new tokens."""
    return energy_mj / (requests * new_tokens)

"""Which figures of a run the gate compares, and how. Free of torch.

What each of them is, of which kind, and where it is found, is declared in `perfbench.figures.metrics.METRICS`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from perfbench.errors import ComparisonError
from perfbench.figures.metrics import METRICS, PARTS, named, sample_values
from perfbench.figures.stats import tail


def exact() -> dict[str, str]:
    """Figure -> the part of a case in run.json that holds it. Two runs of one commit give the same value."""
    return {name: metric.source for name, metric in named(*PARTS, kind="exact").items()}


def compiled() -> dict[str, str]:
    """Figure -> the field of kernels/resources.json, for each kernel and target. Exact for one version of triton."""
    return {name: name.removeprefix("compiled_") for name in named("compiled")}


def shown() -> dict[str, str]:
    """Figure -> the part of a case that holds it. Taken once a run and noisy: never gated."""
    return {name: metric.source for name, metric in named(*PARTS, kind="shown").items()}


def sampled() -> list[str]:
    """Found in every repetition; a process, or a block, gives one value of each, the median over its repetitions."""
    return list(named("sample", kind="timed"))


def timed() -> list[str]:
    """The sampled figures and their tails, of which a process gives one value over all its repetitions. The tails of
    a block would be those of too few."""
    return list(named("sample", "tail", kind="timed"))


def case_figures(case: Mapping[str, Any], figures: Mapping[str, str]) -> dict[str, float | int | None]:
    """The values of EXACT or SHOWN `figures` in one case of a run.json; None where one was not measured.

    Raises ComparisonError where one is no finite number >= 0, which no size, count or share can be.
    """
    for part in set(figures.values()):
        if not isinstance(case[part], dict | None):
            raise ComparisonError(f"{case['id']}: {part}: expected an object or null, got {case[part]!r}; run again")
    found = {figure: (case[part] or {}).get(figure) for figure, part in figures.items()}
    for figure, value in found.items():
        if value is not None and not _is_size(value):
            raise ComparisonError(f"{case['id']}: {figure}: expected a number >= 0 or null, got {value!r}; run again")
    return found


def _is_size(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and 0 <= value < math.inf


def sample_figures(sample: Mapping[str, Any], requests: int) -> dict[str, float]:
    """The sampled figures of one repetition: `itl_ms` as the median over its steps, one that samples may lack where
    it was measured.

    Raises ValueError where one is not a finite number > 0.
    """
    figures = {}
    for name in sampled():
        values = sample_values(name, sample, requests)
        value = statistics.median(values) if values or not METRICS[name].optional else 0.0
        if value or not METRICS[name].optional:  # energy is 0 where the call was shorter than the meter's step
            figures[name] = value
    for name, value in figures.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: expected a finite number > 0, got {value}")
    return figures


def tail_figures(samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The tails over all these repetitions of one process, those that their number tells."""
    found = {}
    for name, metric in named("tail", kind="timed").items():
        of, key = metric.tail or ("", "")
        value = tail([value for one in samples for value in sample_values(of, one, 1)], key)
        if value is not None:
            found[name] = value
    return found


def medians(figures: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The median of each figure over repetitions that all have it."""
    figures = list(figures)
    common = set[str]().union(*figures).intersection(*figures)
    return {name: statistics.median(one[name] for one in figures) for name in sorted(common)}


def slowdown(figure: str, baseline: float, candidate: float) -> float:
    """The log of how many times worse `candidate` is than `baseline` in a timed figure: 0.05 is about 5% slower.

    Raises ValueError where either is not > 0, which no timed figure can be.
    """
    if not (baseline > 0 and candidate > 0):
        raise ValueError(f"{figure}: expected values > 0, got {baseline} and {candidate}")
    return worse_sign(figure) * math.log(candidate / baseline)


def worse_sign(figure: str) -> int:
    """1 where a larger value of `figure` is worse, else -1."""
    return -1 if METRICS[figure].better == "higher" else 1


def change(figure: str, log_slowdown: float) -> float:
    """A log slow-down as the relative change of the figure itself: tokens/s fall (-0.05) where ms rise (+0.05)."""
    return math.expm1(worse_sign(figure) * log_slowdown)


def trimmed_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest fifth. Blocks are disturbed now and then, and else vary as a normal
    sample does: over 24 blocks its spread was 1.8%, the median's and the mean's 2.0% (shared machine, two cores)."""
    cut = len(values) // 5
    return statistics.fmean(sorted(values)[cut : len(values) - cut])

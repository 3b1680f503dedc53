"""How important each LoRA module is: AB-score, Shapley value, sensitivity; and how alike two rankings are.

S(setting) = -(mean cross-entropy over the answer tokens of the held-out set), higher is better. A score is measured in
units of work (a batch, or a permutation on a batch), each of which leaves one line on disk, and is the combination of
all lines: an interrupted search so goes on with the next unit.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from perfbench.finetune.search.evaluate import Ablations, Batch, ablations, additions, gate_gradients
from perfbench.finetune.search.gates import GatedModel
from perfbench.methods.shape import MODULES

Line = dict[str, Any]
Unit = tuple[int, ...]


@dataclass(frozen=True)
class Scores:
    """values, errors: for each layer one number for each of MODULES; the error is a standard error, 0 if unknown."""

    values: tuple[tuple[float, ...], ...]
    errors: tuple[tuple[float, ...], ...]

    def flat(self) -> list[float]:
        """All values, layer by layer."""
        return [value for layer in self.values for value in layer]


@dataclass(frozen=True)
class Measurement:
    """What every score is measured with. `tokens_per_forward` bounds the memory; `seed` is that of permutations."""

    model: GatedModel
    batches: Sequence[Batch]
    tokens_per_forward: int
    permutations: int
    seed: int


@dataclass(frozen=True)
class Score:
    """One line of SCORES. unit: of the values; units: the work, in order; measure: the line of one unit, plain data;
    combine: all lines."""

    title: str
    unit: str
    units: Callable[[Measurement], list[Unit]]
    measure: Callable[[Measurement, Unit], Line]
    combine: Callable[[Sequence[Line]], Scores]


def _each_batch(measurement: Measurement) -> list[Unit]:
    return [(index,) for index in range(len(measurement.batches))]


def _measure_ab(measurement: Measurement, unit: Unit) -> Line:
    batch = measurement.batches[unit[0]]
    return ab_line(ablations(measurement.model, batch, measurement.tokens_per_forward), batch)


def ab_line(found: Ablations, batch: Batch) -> Line:
    """The losses of one batch as plain data."""
    losses = {name: losses.tolist() for name, losses in vars(found).items()}
    return {"tokens": batch.answer_tokens().tolist(), **losses}


def _combine_ab(lines: Sequence[Line]) -> Scores:
    """V = S(all) - S(all without it) + S(only it) - S(none), whole, since its sign decides what is dropped. The error
    is over examples, as that of a ratio of sums."""

    def joined(name: str) -> torch.Tensor:
        return torch.cat([torch.tensor(line[name], dtype=torch.float64) for line in lines], dim=-1)

    tokens = joined("tokens")
    # Of negative log-likelihoods, so every sign is turned.
    gains = -joined("every") + joined("without") - joined("only") + joined("none")
    return _ratio(gains, tokens)


def _ratio(sums: torch.Tensor, weights: torch.Tensor) -> Scores:
    """sums [layers, 7, examples] / weights [examples], summed over examples, with the error of that ratio."""
    examples, total = weights.numel(), weights.sum()
    values = sums.sum(-1) / total
    spread = ((sums - values[..., None] * weights) ** 2).sum(-1)
    errors = (spread * examples / max(1, examples - 1)).sqrt() / total
    return _scores(values, errors)


def _permutation_units(measurement: Measurement) -> list[Unit]:
    batches = range(len(measurement.batches))
    return [(permutation, batch) for permutation in range(measurement.permutations) for batch in batches]


def _order(measurement: Measurement, permutation: int) -> list[tuple[int, str]]:
    places = [(layer, module) for layer in range(measurement.model.shape.layers) for module in MODULES]
    random.Random(f"{measurement.seed}/{permutation}").shuffle(places)
    return places


def _measure_shapley(measurement: Measurement, unit: Unit) -> Line:
    permutation, index = unit
    batch, order = measurement.batches[index], _order(measurement, permutation)
    losses = additions(measurement.model, batch, order).sum(1).tolist()
    return {"tokens": int(batch.answer_tokens().sum()), "order": order, "nll": losses}


def _combine_shapley(lines: Sequence[Line]) -> Scores:
    """The mean gain at a module's turn over random orders; the error is over the orders."""
    by_order: dict[int, list[Line]] = {}
    for line in lines:
        by_order.setdefault(line["unit"][0], []).append(line)
    layers = 1 + max(layer for layer, _ in lines[0]["order"])
    gains = torch.zeros(len(by_order), layers, len(MODULES), dtype=torch.float64)
    for row, members in enumerate(by_order.values()):
        nll = [sum(losses) for losses in zip(*(line["nll"] for line in members), strict=True)]
        tokens = sum(line["tokens"] for line in members)
        for (layer, module), before, after in zip(members[0]["order"], nll[:-1], nll[1:], strict=True):
            gains[row, layer, MODULES.index(module)] = (before - after) / tokens
    errors = gains.std(0) / math.sqrt(len(gains)) if len(gains) > 1 else torch.zeros_like(gains[0])
    return _scores(gains.mean(0), errors)


def _measure_sensitivity(measurement: Measurement, unit: Unit) -> Line:
    return {"gradients": gate_gradients(measurement.model, measurement.batches[unit[0]]).tolist()}


def _combine_sensitivity(lines: Sequence[Line]) -> Scores:
    """Michel et al. (2019): the mean over examples of |dL / dg| at g = 1. It has no sign, so no module is dropped for
    one; their scaling by layer is left out, as it can't change which modules of a layer come first."""
    gradients = torch.cat([torch.tensor(line["gradients"], dtype=torch.float64) for line in lines], dim=-1).abs()
    return _ratio(gradients, torch.ones(gradients.shape[-1], dtype=torch.float64))


def _scores(values: torch.Tensor, errors: torch.Tensor) -> Scores:
    return Scores(tuple(map(tuple, values.tolist())), tuple(map(tuple, errors.tolist())))


SCORES: dict[str, Score] = {
    "ab": Score("AB-score", "nats per token", _each_batch, _measure_ab, _combine_ab),
    "shapley": Score("Shapley value", "nats per token", _permutation_units, _measure_shapley, _combine_shapley),
    "sensitivity": Score("Sensitivity", "nats per token", _each_batch, _measure_sensitivity, _combine_sensitivity),
}


def mean(several: Sequence[Scores]) -> Scores:
    """The mean over seeds; the error is over the seeds where there are two or more, else the one there is."""
    if len(several) == 1:
        return several[0]
    values = torch.tensor([scores.values for scores in several], dtype=torch.float64)
    return _scores(values.mean(0), values.std(0) / math.sqrt(len(several)))


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    """Spearman's rank correlation, ties with their mean rank; None where one of the two is constant."""
    ranks = [_ranks(one), _ranks(other)]
    if any(len(set(values)) < 2 for values in ranks):
        return None
    return statistics.correlation(*ranks)


def _ranks(values: Iterable[float]) -> list[float]:
    values = list(values)
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for at in order[start : end + 1]:
            ranks[at] = (start + end) / 2
        start = end + 1
    return ranks

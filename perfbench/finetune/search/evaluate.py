"""The loss of a gated model under many settings of its gates, naively and with the backbone's work shared.

`ablations` and `naive_ablations` give the same figures. What is shared: a setting that differs from all-on (or from
all-off) in one gate of layer l has the same activations below l, and below that gate within l. It so costs only the
layers above, where its gates stand as in the base: the settings of one layer go up side by side as rows of one batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from perfbench.errors import FinetuneError
from perfbench.finetune.encoding import IGNORED
from perfbench.finetune.search.gates import GatedModel
from perfbench.methods.shape import MODULES

# Logits of so many answer positions are alive at a time: 128 MiB in fp32 with 32k words.
HEAD_POSITIONS = 1024


@dataclass(frozen=True)
class Batch:
    """Rows of tokens padded on the right. ids, labels: int64 [rows, S]; a label is -100 where no loss is taken."""

    ids: torch.Tensor
    labels: torch.Tensor

    @property
    def rows(self) -> int:
        """How many examples."""
        return self.ids.shape[0]

    def answer_tokens(self) -> torch.Tensor:
        """int64 [rows]: the tokens that the loss counts; the first token of a row is never predicted."""
        return (self.labels[:, 1:] != IGNORED).sum(1)


@dataclass(frozen=True)
class Ablations:
    """Summed negative log-likelihood of the answers, fp64, on the CPU. every, none: [rows] with all gates on and off;
    without, only: [layers, 7, rows] with one gate flipped."""

    every: torch.Tensor
    none: torch.Tensor
    without: torch.Tensor
    only: torch.Tensor


class Answers:
    """Where the answers of a batch are, and how likely a model finds them."""

    def __init__(self, batch: Batch):
        targets = batch.labels[:, 1:]
        self.rows = batch.rows
        self.row, self.position = (targets != IGNORED).nonzero(as_tuple=True)
        self.target = targets[self.row, self.position]

    def nll(self, model: GatedModel, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [settings x rows, S, hidden] before the last norm -> fp64 [settings, rows], with a gradient where
        hidden has one. The head sees the answers' positions only."""
        settings = hidden.shape[0] // self.rows
        wanted = hidden.unflatten(0, (settings, self.rows))[:, self.row, self.position].flatten(0, 1)
        targets = self.target.repeat(settings)
        losses = []
        for start in range(0, len(targets), HEAD_POSITIONS):
            logits = model.head(model.norm(wanted[start : start + HEAD_POSITIONS]))
            logits = logits if logits.dtype == torch.float64 else logits.float()
            losses.append(F.cross_entropy(logits, targets[start : start + HEAD_POSITIONS], reduction="none"))
        each = torch.cat(losses).double().view(settings, -1)
        return torch.zeros(settings, self.rows, dtype=torch.float64, device=each.device).index_add(1, self.row, each)


@torch.no_grad()
def ablations(model: GatedModel, batch: Batch, tokens_per_forward: int) -> Ablations:
    """All 2 x 7 x layers + 2 settings, the backbone's work shared; at most `tokens_per_forward` tokens (one setting at
    least) go up side by side, which bounds the memory. FinetuneError for a loss that is not finite."""
    every, without = _family(model, batch, True, tokens_per_forward)
    none, only = _family(model, batch, False, tokens_per_forward)
    return _finite(Ablations(every, none, without, only))


def _family(model: GatedModel, batch: Batch, gate: bool, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """([rows], [layers, 7, rows]): all gates at `gate`, and each of them alone at the other value."""
    model.set_all(gate)
    answers, layers = Answers(batch), model.shape.layers
    hidden, arguments = model.stem(batch.ids)
    flipped = []
    for layer in range(layers):
        out = model.run_ablated(layer, hidden, arguments[layer])
        # A copy, so that the next layer does not keep all eight blocks alive.
        hidden = out[: batch.rows].clone()
        losses = []
        for rows in _chunks(out[batch.rows :], batch, tokens):
            for above in range(layer + 1, layers):
                rows = model.run(above, rows, arguments[above])
            losses.append(answers.nll(model, rows))
        flipped.append(torch.cat(losses))
    return answers.nll(model, hidden)[0].cpu(), torch.stack(flipped).cpu()


def _chunks(rows: torch.Tensor, batch: Batch, tokens: int) -> Iterable[torch.Tensor]:
    """`rows` cut between settings, as evenly as can be, into pieces of at most `tokens`."""
    settings = rows.shape[0] // batch.rows
    at_once = min(settings, max(1, tokens // batch.ids.numel()))
    even = math.ceil(settings / math.ceil(settings / at_once))
    return rows.split(even * batch.rows)


@torch.no_grad()
def naive_ablations(model: GatedModel, batch: Batch) -> Ablations:
    """The same, one pass through all layers for each setting: what the sharing is measured against. Here too a LoRA
    whose gate is off costs nothing, and the head sees the answers' positions only."""
    answers, shape = Answers(batch), (model.shape.layers, len(MODULES), batch.rows)
    bases, flips = [], []
    for gate in (True, False):
        model.set_all(gate)
        bases.append(_whole(model, batch, answers))
        losses = []
        for layer in range(model.shape.layers):
            for module in MODULES:
                model.set_layer(layer, {module: not gate})
                losses.append(_whole(model, batch, answers))
                model.set_layer(layer, {module: gate})
        flips.append(torch.stack(losses).view(shape))
    return _finite(Ablations(bases[0], bases[1], flips[0], flips[1]))


def _whole(model: GatedModel, batch: Batch, answers: Answers) -> torch.Tensor:
    """fp64 [rows] of one pass through all layers, the gates as they stand."""
    hidden, arguments = model.stem(batch.ids)
    for layer in range(model.shape.layers):
        hidden = model.run(layer, hidden, arguments[layer])
    return answers.nll(model, hidden)[0].cpu()


@torch.no_grad()
def additions(model: GatedModel, batch: Batch, order: list[tuple[int, str]]) -> torch.Tensor:
    """fp64 [1 + len(order), rows]: the loss with no gate on, then with those of `order` switched on one after another.
    What lies below the layer of a switched gate is kept from the setting before. FinetuneError if not finite."""
    model.set_all(False)
    answers, layers = Answers(batch), model.shape.layers
    hidden, arguments = model.stem(batch.ids)
    enters = [hidden]  # what enters each layer, and what leaves the last, as the gates stand now
    for layer in range(layers):
        enters.append(model.run(layer, enters[layer], arguments[layer]))
    losses = [answers.nll(model, enters[layers])[0].cpu()]
    for first, module in order:
        model.set_layer(first, {module: True})
        for layer in range(first, layers):
            enters[layer + 1] = model.run(layer, enters[layer], arguments[layer])
        losses.append(answers.nll(model, enters[layers])[0].cpu())
    return _check(torch.stack(losses))


def gate_gradients(model: GatedModel, batch: Batch) -> torch.Tensor:
    """fp64 [layers, 7, rows]: the gradient of each example's mean answer loss with respect to each gate, at all-on."""
    rows, layers = batch.rows, model.shape.layers
    gates = torch.ones(layers, len(MODULES), rows, 1, 1, dtype=model.dtype, device=model.device, requires_grad=True)
    for layer in range(layers):
        model.set_layer(layer, dict(zip(MODULES, gates[layer], strict=True)))
    try:
        with torch.no_grad():
            hidden, arguments = model.stem(batch.ids)
        for layer in range(layers):
            hidden = model.run(layer, hidden, arguments[layer])
        loss = Answers(batch).nll(model, hidden)[0] / batch.answer_tokens().to(model.device)
        _check(loss)
        # A row's loss depends on its own gates only, so the gradient of the sum has every row's own.
        (found,) = torch.autograd.grad(loss.sum(), gates)
    finally:
        model.set_all(True)
    return _check(found[..., 0, 0].double().cpu())


def _finite(found: Ablations) -> Ablations:
    for losses in (found.every, found.none, found.without, found.only):
        _check(losses)
    return found


def _check(losses: torch.Tensor) -> torch.Tensor:
    if not torch.isfinite(losses).all():
        raise FinetuneError(
            "the loss of a setting is not finite: the backbone or the adapter overflows; use dtype fp32, or an "
            "adapter that was trained with a lower learning rate"
        )
    return losses

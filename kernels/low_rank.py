"""The low-rank pair of each request's own adapter: y += (x a^T) b, unmerged; and the two halves of it.

Shapes: y [G, M, D_out] (written in place), x [G, M, D_in], a [G, R, D_in], b [G, R, D_out]; G groups of rows that
share an adapter (one per request, or one in all), M rows of each: beams x tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from perfbench.kernels.later import later
from perfbench.kernels.placement import onednn_has

# A matrix of more values than this, which all rows share, oneDNN reads in half the time that torch's other products
# take; a smaller one in up to three times theirs, since the call alone takes 12 microseconds (AMD EPYC, 2 threads,
# fp32, 4 to 48 rows, either side of the matrix 16 to 2,048).
MANY_VALUES = 2**17


def eager(y: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Two batched products. a stays in rows and is read transposed: on CPUs the product along contiguous D_in was
    2 to 4 times as fast as with a [D_in, R] copy, and 10 times as fast as one masked GEMM over all adapters."""
    y.baddbmm_(torch.bmm(x, a.transpose(1, 2)), b)


class VectorPart(NamedTuple):
    """The second half of one module's pair, b [R, D_out], which all adapters share, between two vectors of each:
    of_ranks [T, R] before it and of_columns [T, D_out] after it. rank, column: its first of each."""

    rank: int
    column: int
    b: torch.Tensor
    of_ranks: torch.Tensor
    of_columns: torch.Tensor


class JointVectors(NamedTuple):
    """The parts with vectors of all modules of a product, which have one second half b [R, D_out] between them:
    of_ranks [T, modules, R], of_columns [T, modules x D_out], and their first rank."""

    rank: int
    b: torch.Tensor
    of_ranks: torch.Tensor
    of_columns: torch.Tensor


class Expansion(NamedTuple):
    """The second halves of the modules that lie side by side in one fused product.

    parts: for each module (first rank, first column, b [T, R, D_out]); alike: [T, modules, R, D_out] where the modules
    fill the product and have one size, whose views the parts then are; own: int64 [requests], which of the T adapters
    each request has, -1 none; where it is None there is one for each request in order, or one for all; shared: so many
    ranks, the last ones, are the same with every adapter; vectors: modules whose second halves are shared too, and
    joint: all of them in one, where they fill the product and share one half; bias: (first column, [T, columns]), which
    each adapter adds beside what hangs on its ranks.
    """

    parts: tuple[tuple[int, int, torch.Tensor], ...]
    alike: torch.Tensor | None = None
    own: torch.Tensor | None = None
    shared: int = 0
    vectors: tuple[VectorPart, ...] = ()
    bias: tuple[int, torch.Tensor] | None = None
    joint: JointVectors | None = None

    @property
    def ranks(self) -> int:
        """Of all modules together; those with vectors have the same ones, the last of all."""
        return sum(b.shape[1] for _, _, b in self.parts) + (len(self.vectors[0].b) if self.vectors else 0)

    @property
    def adapters(self) -> int:
        """T."""
        return len(self.parts[0][2] if self.parts else self.vectors[0].of_ranks)


def shrink(x: torch.Tensor, a: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
    """x [requests x M, D_in] -> h [G, M, R]; `a` [G, R, D_in] holds the pairs of all modules that read x."""
    assert own is None, "plain torch takes one adapter for each request in order, or one for all"
    return torch.bmm(x.view(a.shape[0], -1, x.shape[-1]), a.transpose(1, 2))


def own_ranks(columns: torch.Tensor, groups: int, shared: int = 0) -> torch.Tensor:
    """h [G, M, R]: of columns [G x M, G x R], what every row gives with every adapter, each row's own, a view; with
    what the last `shared` columns give with any adapter behind it."""
    if shared:
        last = columns[:, columns.shape[1] - shared :].unflatten(0, (groups, -1))
        others = columns[:, : columns.shape[1] - shared]
        return joined(own_ranks(others, groups) if others.shape[1] else None, last)
    rows, every = columns.shape
    down, across = columns.stride()
    m, ranks = rows // groups, every // groups
    return columns.as_strided((groups, m, ranks), (m * down + ranks * across, down, across))


def joined(own: torch.Tensor | None, shared: torch.Tensor) -> torch.Tensor:
    """h of ranks that hang on the adapter, if there are any, and of those that do not, all [G, M, any]."""
    return shared if own is None else torch.cat([own, shared], dim=2)


def expand(y: torch.Tensor, h: torch.Tensor, expansion: Expansion, acts: torch.Tensor | None = None) -> None:
    """Adds to y [G x M, D] in place, for each module the product of its ranks of h [G, M, R] and its b, and its bias;
    acts: bool [G x M, 1], which rows get a bias, None for all."""
    groups, rows, _ = h.shape
    if expansion.bias is not None:
        add_bias(y, *expansion.bias, acts)
    if torch.compiler.is_compiling():
        _expand_by_sums(y.view(groups, rows, -1), h, expansion)
        return
    if expansion.alike is not None and rows == 1 and y.is_contiguous():
        # One product for all modules: on a CPU 6 microseconds in place of 40 for three.
        weight = expansion.alike.flatten(0, 1)
        y.view(len(weight), 1, -1).baddbmm_(h.reshape(len(weight), 1, -1), weight)
        return
    grouped = y.view(groups, rows, -1)
    for rank, column, weight in expansion.parts:
        own = h if weight.shape[1] == h.shape[2] else h[:, :, rank : rank + weight.shape[1]]
        if weight.shape[2] == y.shape[1] and y.is_contiguous():
            grouped.baddbmm_(own, weight)
        else:  # in place on some of the columns torch would take the groups one by one
            grouped[:, :, column : column + weight.shape[2]].add_(torch.bmm(own, weight))
    if expansion.joint is not None and rows == 1 and y.is_contiguous():
        _add_joint(y, h, expansion.joint)
        return
    for part in expansion.vectors:
        add_between_vectors(grouped, h, part, part.of_ranks, part.of_columns)


def add_bias(y: torch.Tensor, first: int, bias: torch.Tensor, acts: torch.Tensor | None) -> None:
    """Adds to y [G x M, D] in place, from column `first` on, each group's bias [G, columns] where its row `acts`."""
    own = y if bias.shape[1] == y.shape[1] else y[:, first : first + bias.shape[1]]
    if acts is not None:
        own.unflatten(0, (len(bias), -1)).addcmul_(acts.view(len(bias), -1, 1).to(y.dtype), bias.unsqueeze(1))
    elif len(bias) == len(y):
        own.add_(bias)
    else:
        own.unflatten(0, (len(bias), -1)).add_(bias.unsqueeze(1))


def _expand_by_sums(y: torch.Tensor, h: torch.Tensor, expansion: Expansion) -> None:
    """The same for y [G, M, D], in sums that Inductor fuses with what stands around them; a product it has to call."""
    for rank, column, weight in expansion.parts:
        own = h[:, :, rank : rank + weight.shape[1]]
        y[:, :, column : column + weight.shape[2]].add_((own.unsqueeze(3) * weight.unsqueeze(1)).sum(dim=2))
    for part in expansion.vectors:
        add_between_vectors(y, h, part, part.of_ranks, part.of_columns)


def add_between_vectors(
    y: torch.Tensor, h: torch.Tensor, part: VectorPart, of_ranks: torch.Tensor, of_columns: torch.Tensor
) -> None:
    """Adds to y [G, M, D] in place what the module adds with h [G, M, R] and each group's own vectors."""
    ranks, columns = part.b.shape
    own = h[:, :, part.rank : part.rank + ranks] * of_ranks.unsqueeze(1)
    added = _times(own.flatten(0, 1), part.b).unflatten(0, own.shape[:2])
    y[:, :, part.column : part.column + columns].addcmul_(added, of_columns.unsqueeze(1))


def _add_joint(y: torch.Tensor, h: torch.Tensor, joint: JointVectors) -> None:
    """The same for all modules at once, y [G, D] and h [G, 1, R], with one product that reads b once."""
    ranks = len(joint.b)
    own = (h if h.shape[2] == ranks else h[:, :, joint.rank : joint.rank + ranks]) * joint.of_ranks
    added = _times(own.view(-1, ranks), joint.b)
    y.addcmul_(added.view(len(y), -1), joint.of_columns)


def _times(x: torch.Tensor, shared: torch.Tensor) -> torch.Tensor:
    """x [rows, R] times what all rows share [R, D], by the library that `MANY_VALUES` chooses."""
    by_onednn = x.dtype == torch.float32 and shared.numel() > MANY_VALUES and onednn_has(x)
    if not by_onednn or torch.compiler.is_compiling():
        return torch.mm(x, shared)
    found: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, shared.t(), None, "none", [], "")
    return found


def each_request_s(stacked: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """[requests, D]: the row of `stacked` [T, D] that each request has by `own` of `Expansion`, zeros for -1."""
    if own is None:
        return stacked
    return stacked[own.clamp(min=0)].masked_fill_((own < 0).unsqueeze(1), 0.0)


def as_ranks(columns: torch.Tensor, groups: int) -> torch.Tensor:
    """h [G, M, R] of what a product gave for the ranks that all adapters share, [G x M, R]."""
    return columns.unflatten(0, (groups, -1))


FORMS = {"eager": eager, "compiled": eager, "triton": later("low_rank_triton", "add_low_rank")}
EXPANDS = {"eager": expand, "compiled": expand, "triton": later("low_rank_triton", "expand")}
# Triton's gives fp32 planes [splits, rows, R], which the Triton forms of the fused operations add up.
SHRINKS = {"eager": shrink, "compiled": shrink, "triton": later("low_rank_triton", "shrink")}
# h of what a product of its own gave for the ranks that all adapters share.
AS_RANKS = {"eager": as_ranks, "compiled": as_ranks, "triton": later("low_rank_triton", "as_plane")}
JOINED = {"eager": joined, "compiled": joined, "triton": later("low_rank_triton", "joined")}
# The same h out of a product that gave every row's ranks with every adapter.
FROM_PRODUCT = {"eager": own_ranks, "compiled": own_ranks, "triton": later("low_rank_triton", "one_plane")}

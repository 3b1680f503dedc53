"""The table of cases that every kernel is held against its fp64 reference with; tests and `perfbench verify` share it.

Odd sizes, requests without an adapter, repeated and unsorted slots, ranks 1 to 128, modules that are not there, fp32,
bf16 and fp16, and outputs full of NaN where nothing was written. Each case is also run with every request given the
next one's adapter: a case that does not see that proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from perfbench.kernels import (
    decode_attention,
    few_rows_product,
    grouped_sum,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    rotation,
    row_scale,
    settings,
    swiglu_epilogue,
    vector_generator,
)
from perfbench.verify.on_device import reference
from perfbench.verify.on_device.kernel_check import FORMS, FUSED, ONE, KernelCase, Problem, Setting

# How the requests get their adapters: one each (or one for all) in the order of the stack; or each names its own, its
# ranks coming as planes of a shrink, or as columns of the base product, with every adapter's.
IN_ORDER, PLANES, PRODUCT = "in-order", "own-planes", "own-product"
OWN, ADAPTERS = (2, -1, 0, 2), 3


# A rotation as the reference takes it, or none.
Turned = tuple[torch.Tensor, int, int] | None


class Batch:
    """Rows of requests with their adapters, and the ranks of each row with every adapter [rows, T x R], of which the
    last `shared` are the same with any."""

    def __init__(self, setting: Setting, way: str, rows: int, ranks: int, groups: int, seed: int, shared: int = 0):
        self.setting, self.way = setting, way
        self.adapters = groups if way == IN_ORDER else ADAPTERS
        of_requests = tuple(range(groups)) if way == IN_ORDER else OWN
        self.beams = rows // len(of_requests)
        self._of_requests = torch.tensor(of_requests)
        self._every = setting.normal(seed)(rows, self.adapters * (ranks - shared))
        self._shared = setting.normal(seed + 1000)(rows, shared)

    @property
    def of_rows(self) -> list[int]:
        """The adapter of each row, -1 none."""
        found: list[int] = self._of_requests.repeat_interleave(self.beams).tolist()
        return found

    def ranks(self, own: Sequence[int]) -> torch.Tensor:
        """[rows, R]: of each row with the adapter that `own` names; NaN, never to be read, where it is -1."""
        every = self._every.unflatten(1, (self.adapters, -1))
        found = torch.stack([every[row, adapter] for row, adapter in enumerate(own)])
        found = torch.cat([found, self._shared], dim=1)
        found[torch.tensor(own) < 0] = float("nan")
        return found

    def own(self, shift: int) -> torch.Tensor | None:
        """What the kernel is told of who has which adapter; shifted, those without one get the first."""
        if self.way == IN_ORDER:
            return None
        own = self._of_requests
        if shift:
            own = torch.where(own < 0, 0, (own + shift) % self.adapters)
        return self.setting.put(own)

    def stack(self, weight: torch.Tensor, shift: int) -> torch.Tensor:
        """Weights [T, ...] on the device; in order, a shift moves the weights and not the names."""
        return self.setting.put(weight.roll(shift if self.way == IN_ORDER else 0, 0))

    def h(self, shift: int) -> torch.Tensor:
        """The ranks as the form takes them."""
        if self.way == PRODUCT:
            columns, shared = torch.cat([self._every, self._shared], dim=1), self._shared.shape[1]
            return low_rank.FROM_PRODUCT[self.setting.form](self.setting.put(columns), self.adapters, shared)
        own = self.own(shift)
        of_rows = self.of_rows if own is None else own.cpu().repeat_interleave(self.beams).tolist()
        mine = self.ranks(of_rows)
        if self.setting.form == "eager":
            return self.setting.put(mine.unflatten(0, (self.adapters, -1)))
        part = torch.full(mine.shape, 0.25)
        return self.setting.put(torch.stack([mine.float() - part, part]))

    def expansion(
        self, parts: reference.Parts, shift: int, bias: tuple[torch.Tensor, int] | None = None
    ) -> low_rank.Expansion:
        """`parts` and a bias, with its first column, as the form takes them."""
        return low_rank.Expansion(
            tuple((rank, column, self.stack(b, shift)) for rank, column, b in parts),
            own=self.own(shift),
            shared=self._shared.shape[1],
            bias=None if bias is None else (bias[1], self.stack(bias[0], shift)),
        )

    def scale(self, minus_one: torch.Tensor, first: int, shift: int) -> row_scale.Scale:
        """A scale as the form takes it."""
        return row_scale.Scale(self.stack(minus_one, shift), first, self.own(shift))

    def rotation(self, turned: Turned, shift: int) -> rotation.Rotation | None:
        """A rotation as the form takes it."""
        if turned is None:
            return None
        sine, half, first = turned
        return rotation.Rotation(self.stack(sine, shift), half, first, self.own(shift))


def _in_a_wider_row(setting: Setting, y: torch.Tensor) -> torch.Tensor:
    """y on the device, as the first columns of a product that has more of them, full of NaN."""
    wide = torch.full((len(y), y.shape[1] + 5), float("nan"), dtype=y.dtype, device=setting.device)
    wide[:, : y.shape[1]] = y.to(setting.device)
    return wide[:, : y.shape[1]]


def _product_of(setting: Setting, way: str, y: torch.Tensor) -> torch.Tensor:
    return setting.put(y) if way == IN_ORDER else _in_a_wider_row(setting, y)


def _low_rank(groups: int, rows: int, rank: int, d_in: int, d_out: int, setting: Setting) -> Problem:
    make = setting.normal(31)
    y, x = make(groups, rows, d_out), make(groups, rows, d_in)
    a, b = (make(groups, rank, d_in) / math.sqrt(d_in)).to(setting.dtype), make(groups, rank, d_out)
    own = torch.arange(groups).repeat_interleave(rows).tolist()
    expected = reference.low_rank(y.flatten(0, 1), x.flatten(0, 1), a, b, own).view(groups, rows, d_out)

    def run(shift: int) -> torch.Tensor:
        out = setting.put(y)
        pair = (setting.put(weight.roll(shift, 0)) for weight in (a, b))
        low_rank.FORMS[setting.form](out, setting.put(x), *pair)
        return out.cpu()

    return Problem(run, expected, ONE, groups > 1)


def _row_scale(groups: int, rows: int, columns: int, setting: Setting) -> Problem:
    make = setting.normal(33)
    y, minus_one = make(groups, rows, columns), make(groups, columns)
    own = torch.arange(groups).repeat_interleave(rows).tolist()
    expected = reference.row_scale(y.flatten(0, 1), minus_one, own).view(groups, rows, columns)

    def run(shift: int) -> torch.Tensor:
        out = setting.put(y)
        row_scale.FORMS[setting.form](out, setting.put(minus_one.roll(shift, 0)))
        return out.cpu()

    return Problem(run, expected, ONE, groups > 1)


def _scaled_rows(way: str, groups: int, rows: int, columns: int, setting: Setting) -> Problem:
    """Out of place, each request naming its adapter."""
    make, batch = setting.normal(35), Batch(setting, way, rows, 1, groups, 36)
    x, minus_one = make(rows, columns), make(batch.adapters, columns)
    expected = reference.row_scale(x, minus_one, batch.of_rows)

    def run(shift: int) -> torch.Tensor:
        form, own = row_scale.SCALED_ROWS[setting.form], batch.own(shift)
        read = setting.put(x)
        found = form(read, batch.stack(minus_one, shift), own)
        if not torch.equal(read.cpu(), x):
            raise ValueError("what was read was written")
        return found.cpu()

    return Problem(run, expected, ONE, batch.adapters > 1)


def _grouped_sum(rows: int, d_in: int, rank: int, setting: Setting) -> Problem:
    x = setting.normal(38)(rows, d_in)

    def run(_shift: int) -> torch.Tensor:
        found = grouped_sum.FORMS[setting.form](setting.put(x), rank, rows)
        return found.view(rows, rank).cpu()

    return Problem(run, reference.grouped_sum(x, rank), ONE, shifts=False)


def _rotation(groups: int, rows: int, columns: int, half: int, scaled: bool, setting: Setting) -> Problem:
    make = setting.normal(37)
    y, minus_one, sine = make(groups, rows, columns), make(groups, columns), make(groups, columns)
    own = torch.arange(groups).repeat_interleave(rows).tolist()
    scale = (minus_one, 0) if scaled else None
    flat = y.flatten(0, 1)
    expected = reference.adapted(flat, flat.new_zeros(len(flat), 0), (), scale, own, (sine, half, 0))

    def run(shift: int) -> torch.Tensor:
        scales = setting.put(minus_one.roll(shift, 0)) if scaled else None
        found = rotation.FORMS[setting.form](setting.put(y), scales, setting.put(sine.roll(shift, 0)), half)
        return found.cpu()

    return Problem(run, expected.view(groups, rows, columns), ONE, groups > 1)


def _vector_generator(
    way: str, groups: int, prompts: int, hidden: int, rank: int, columns: int, setting: Setting
) -> Problem:
    make, batch = setting.normal(34), Batch(setting, way, prompts, 1, groups, 34)
    h, bias = make(prompts, hidden), make(batch.adapters, columns)
    w_down = (make(batch.adapters, hidden, rank) / math.sqrt(hidden)).to(setting.dtype)
    w_up = make(batch.adapters, rank, columns)
    served = torch.tensor(batch.of_rows) >= 0
    expected = reference.vectors(h, w_down, w_up, bias, batch.of_rows)[served]

    def run(shift: int) -> torch.Tensor:
        down, up, last = (batch.stack(weight, shift) for weight in (w_down, w_up, bias))
        found = vector_generator.FORMS[setting.form](setting.put(h), down, up, last, batch.own(shift)).cpu()
        _zeros_unless(shift, found[~served])
        return found[served]

    return Problem(run, expected, ONE, batch.adapters > 1)


def _zeros_unless(shift: int, rows: torch.Tensor) -> None:
    if not shift and bool((rows != 0).any()):  # NaN is not 0 either
        raise ValueError("expected zeros for requests without an adapter")


def _shrink(rank: int, d_in: int, setting: Setting) -> Problem:
    batch = Batch(setting, PLANES, 2 * len(OWN), 1, 1, 44)
    make = setting.normal(44)
    x, a = make(2 * len(OWN), d_in), make(ADAPTERS, rank, d_in)
    served = torch.tensor(batch.of_rows) >= 0

    def run(shift: int) -> torch.Tensor:
        found = low_rank.SHRINKS[setting.form](setting.put(x), setting.put(a), batch.own(shift)).sum(dim=0).cpu()
        _zeros_unless(shift, found[~served])
        return found[served]

    return Problem(run, reference.shrink(x, a, batch.of_rows)[served], ONE)


def _alike(groups: int, rows: int, setting: Setting) -> Problem:
    """Modules of one size that fill the product: plain torch takes all of them at once where each group has one row."""
    modules, rank, columns = 3, 2, 17
    make, batch = setting.normal(20), Batch(setting, IN_ORDER, groups * rows, modules * rank, groups, 21)
    y, stacked = make(groups * rows, modules * columns), make(groups, modules, rank, columns)

    def parts(weights: torch.Tensor) -> reference.Parts:
        return [(i * rank, i * columns, weight) for i, weight in enumerate(weights.unbind(1))]

    def run(shift: int) -> torch.Tensor:
        out, weights = setting.put(y), batch.stack(stacked, shift)
        low_rank.expand(out, batch.h(shift), low_rank.Expansion(tuple(parts(weights)), weights))
        return out.cpu()

    ranks = batch.ranks(batch.of_rows)
    return Problem(run, reference.adapted(y, ranks, parts(stacked), None, batch.of_rows), FUSED, groups > 1)


def _expand(ranks: tuple[int, int], setting: Setting) -> Problem:
    """Of many rows, as in prefill, onto some columns of a wider row; a bias on some, which it gets in all rows but the
    first of each request."""
    batch, make = Batch(setting, PLANES, 2 * len(OWN), sum(ranks), 1, 48), setting.normal(49)
    y = make(2 * len(OWN), 50)
    parts = [(0, 0, make(ADAPTERS, ranks[0], 20)), (ranks[0], 31, make(ADAPTERS, ranks[1], 19))]
    bias = make(ADAPTERS, 25), 11
    acts = torch.tensor([False, True] * len(OWN)).unsqueeze(1)

    def run(shift: int) -> torch.Tensor:
        out = _in_a_wider_row(setting, y)
        expansion = batch.expansion(parts, shift, bias)
        low_rank.EXPANDS[setting.form](out, batch.h(shift), expansion, setting.put(acts))
        return out.cpu()

    without, everywhere = (
        reference.adapted(y, batch.ranks(batch.of_rows), parts, None, batch.of_rows, bias=one) for one in (None, bias)
    )
    return Problem(run, torch.where(acts, everywhere, without), FUSED)


def _qkv(
    way: str, groups: int, rows: int, kv_heads: int, ranks: tuple[int, int], half: int, setting: Setting
) -> Problem:
    """Pairs on Q and V and none on K, a scale on K and V, and on all of them a rotation in groups of 2 x half, 0 none;
    with names, one step of several in the cache is written."""
    heads, dim = 2, 6
    batch, make = Batch(setting, way, rows, sum(ranks), groups, 41), setting.normal(42)
    q_columns, kv_columns = heads * dim, kv_heads * dim
    qkv = make(rows, q_columns + 2 * kv_columns)
    of_q, of_v = make(batch.adapters, ranks[0], q_columns), make(batch.adapters, ranks[1], kv_columns)
    parts = [(0, 0, of_q), (ranks[0], q_columns + kv_columns, of_v)]
    minus_one = make(batch.adapters, 2 * kv_columns)
    angles = torch.randn(rows, dim // 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sign = torch.cat([-torch.ones(dim // 2), torch.ones(dim // 2)])
    cos, sin = angles.repeat(1, 2).cos().to(setting.dtype), (angles.repeat(1, 2).sin() * sign).to(setting.dtype)
    turned = (make(batch.adapters, q_columns + 2 * kv_columns), half, 0) if half else None
    products = reference.adapted(qkv, batch.ranks(batch.of_rows), parts, (minus_one, q_columns), batch.of_rows, turned)

    def run(shift: int) -> torch.Tensor:
        steps = () if way == IN_ORDER else (3,)
        entry = torch.full((*steps, rows, 2, kv_heads, dim), float("nan"), dtype=setting.dtype, device=setting.device)
        q = qkv_epilogue.FORMS[setting.form](
            _product_of(setting, way, qkv), batch.h(shift), batch.expansion(parts, shift),
            batch.scale(minus_one, q_columns, shift), setting.put(cos), setting.put(sin), entry,
            setting.put(torch.tensor([1])) if steps else None, batch.rotation(turned, shift),
        )  # fmt: skip
        if steps:
            if not bool(entry[[0, 2]].isnan().all()):
                raise ValueError("another step of the cache was written")
            entry = entry[1]
        return torch.cat([q.reshape(rows, -1), entry.reshape(rows, -1)], dim=1).cpu()

    return Problem(run, reference.rope(products, angles, kv_heads), FUSED, batch.adapters > 1)


def _between_vectors(way: str, groups: int, rows: int, hidden: int, rank: int, setting: Setting) -> Problem:
    """A shared pair beside a low-rank pair of each adapter, both on the residual stream."""
    eps, own_rank = 1e-5, 2
    batch, make = Batch(setting, way, rows, own_rank + rank, groups, 46, rank), setting.normal(26)
    residual, y, b = make(rows, hidden), make(rows, hidden), make(batch.adapters, own_rank, hidden)
    shared, weight = (make(rank, hidden) / math.sqrt(rank)).to(setting.dtype), make(hidden)
    of_ranks, of_columns = make(batch.adapters, rank), make(batch.adapters, hidden)
    ranks = batch.ranks(batch.of_rows)
    product = reference.adapted(y, ranks, [(0, 0, b)], None, batch.of_rows)
    product = reference.between_vectors(product, ranks[:, own_rank:], shared, of_ranks, of_columns, batch.of_rows)
    stream = residual.double() + product
    expected = torch.cat([stream, reference.rms_norm(stream, weight, eps)], dim=1)

    def run(shift: int) -> torch.Tensor:
        in_place, expansion = setting.put(residual), batch.expansion([(0, 0, b)], shift)
        vectors = batch.stack(of_ranks, shift), batch.stack(of_columns, shift)
        part = low_rank.VectorPart(own_rank, 0, setting.put(shared), *vectors)
        found = residual_rmsnorm.FORMS[setting.form](
            in_place, _product_of(setting, way, y), batch.h(shift), expansion._replace(vectors=(part,)),
            setting.put(weight), eps,
        )  # fmt: skip
        return torch.cat([in_place, found], dim=1).cpu()

    return Problem(run, expected, FUSED, batch.adapters > 1)


def _biased(way: str, groups: int, rows: int, inner: int, rank: int, setting: Setting) -> Problem:
    """A pair and a bias on up, behind them its scale, and none on gate."""
    batch, make = Batch(setting, way, rows, rank, groups, 50), setting.normal(51)
    gate_up, b = make(rows, 2 * inner), make(batch.adapters, rank, inner)
    bias, minus_one = (make(batch.adapters, inner), inner), make(batch.adapters, inner)
    parts, scale = [(0, inner, b)], (minus_one, inner)
    both = reference.adapted(gate_up, batch.ranks(batch.of_rows), parts, scale, batch.of_rows, bias=bias)

    def run(shift: int) -> torch.Tensor:
        found = swiglu_epilogue.FORMS[setting.form](
            _product_of(setting, way, gate_up), batch.h(shift), batch.expansion(parts, shift, bias),
            batch.scale(minus_one, inner, shift), "silu", None,
        )  # fmt: skip
        return found.cpu()

    return Problem(run, reference.gated(both, "silu"), FUSED, batch.adapters > 1)


def _swiglu(
    way: str,
    groups: int,
    rows: int,
    inner: int,
    ranks: tuple[int, int],
    activation: str,
    half: int,
    shared: int,
    setting: Setting,
) -> Problem:
    """A scale on up, and a rotation of gate and up in groups of 2 x half, 0 none; so many ranks shared by all."""
    batch, make = Batch(setting, way, rows, sum(ranks), groups, 43, shared), setting.normal(22)
    gate_up, minus_one = make(rows, 2 * inner), make(batch.adapters, inner)
    parts = [(0, 0, make(batch.adapters, ranks[0], inner)), (ranks[0], inner, make(batch.adapters, ranks[1], inner))]
    turned = (make(batch.adapters, 2 * inner), half, 0) if half else None
    both = reference.adapted(gate_up, batch.ranks(batch.of_rows), parts, (minus_one, inner), batch.of_rows, turned)

    def run(shift: int) -> torch.Tensor:
        found = swiglu_epilogue.FORMS[setting.form](
            _product_of(setting, way, gate_up), batch.h(shift), batch.expansion(parts, shift),
            batch.scale(minus_one, inner, shift), activation, batch.rotation(turned, shift),
        )  # fmt: skip
        return found.cpu()

    return Problem(run, reference.gated(both, activation), FUSED, batch.adapters > 1)


def _residual(
    way: str,
    groups: int,
    rows: int,
    hidden: int,
    rank: int,
    fp32_weight: bool,
    scaled: bool,
    half: int,
    setting: Setting,
) -> Problem:
    """The stream, written in place, and its norm; with a scale or none, a rotation in groups of 2 x half, 0 none."""
    eps = 1e-5
    batch, make = Batch(setting, way, rows, rank, groups, 45), setting.normal(23)
    residual, y, b = make(rows, hidden), make(rows, hidden), make(batch.adapters, rank, hidden)
    weight = make(hidden).float() if fp32_weight else make(hidden)
    minus_one = make(batch.adapters, hidden)
    turned = (make(batch.adapters, hidden), half, 0) if half else None
    scale = (minus_one, 0) if scaled else None
    product = reference.adapted(y, batch.ranks(batch.of_rows), [(0, 0, b)], scale, batch.of_rows, turned)
    stream = residual.double() + product
    expected = torch.cat([stream, reference.rms_norm(stream, weight, eps)], dim=1)

    def run(shift: int) -> torch.Tensor:
        in_place = setting.put(residual)
        found = residual_rmsnorm.FORMS[setting.form](
            in_place, _product_of(setting, way, y), batch.h(shift), batch.expansion([(0, 0, b)], shift),
            setting.put(weight), eps, batch.scale(minus_one, 0, shift) if scaled else None,
            batch.rotation(turned, shift),
        )  # fmt: skip
        if found.dtype != setting.dtype:
            raise ValueError(f"expected a norm in {setting.dtype}, got {found.dtype}")
        return torch.cat([in_place, found], dim=1).cpu()

    return Problem(run, expected, FUSED, batch.adapters > 1)


def _attention(beams: int, padded: bool, kv_heads: int, length: int, on_device: bool, setting: Setting) -> Problem:
    """The fault: every row reads what the next one's ancestors generated, or every request the next one's prompt; with
    the length on the device, one token too many is seen."""
    requests, heads, dim, seen, spare = 2 + (not on_device), 4, 6, 11, 2
    rows, make = requests * beams, setting.normal(24)
    places = seen + spare if on_device else seen
    tokens = length + places if beams == 1 and on_device else length
    q, prompt = make(rows, heads, dim), make(requests, 2, kv_heads, tokens, dim)
    generated = make(places, rows, 2, kv_heads, dim) if beams > 1 else None
    ancestors = torch.randint(0, rows, (rows, places), generator=torch.Generator().manual_seed(5))
    where = None if generated is None else ancestors + torch.arange(places) * rows
    pads = ((4, 0, 2) if padded else (0, 0, 0))[:requests]
    padding = torch.ones(requests, 1, 1, length + places, dtype=torch.bool)
    for request, pad in enumerate(pads):
        padding[request, ..., :pad] = False
        prompt[request, :, :, :pad] = 100.0  # whoever looks there is far off
    if on_device:  # and so is whoever sees what is not there yet
        if generated is None:
            prompt[:, 1, :, length + seen] = 100.0
            prompt[:, 0, :, length + seen] = 0.0
        else:
            generated[seen, :, 1], generated[seen, :, 0] = 100.0, 0.0
    visible = length + seen if beams == 1 and on_device else length
    expected = reference.attention(q, prompt, generated, ancestors[:, :seen], pads, visible)

    def run(shift: int) -> torch.Tensor:
        filled, mask = None, setting.put(padding[..., :length]) if padded else None
        whose, sources = prompt, where
        if on_device:
            count = setting.put(torch.tensor([seen + shift]))
            mask = setting.put(padding) if padded else None
            mask = decode_attention.MASKS[setting.form](mask, count, length, places)
            filled = count + length if beams == 1 else count
        elif where is None:
            whose = prompt.roll(shift, 0)
        else:
            sources = where.roll(shift, 0)
        own, at = (None if tensor is None else setting.put(tensor) for tensor in (generated, sources))
        return decode_attention.FORMS[setting.form](setting.put(q), setting.put(whose), own, at, mask, filled).cpu()

    return Problem(run, expected, FUSED)


def _few_rows(rows: int, d_in: int, d_out: int, bias: bool, setting: Setting) -> Problem:
    """With tiles that are smaller than the product in both directions."""
    make = setting.normal(25)
    x, weight, b = make(rows, d_in), make(d_out, d_in), make(d_out) if bias else None
    expected = x.double() @ weight.double().T + (0 if b is None else b.double())
    gpu = settings.gpu_name(None) if setting.device == "cuda" else ""
    tiles = {"BLOCK_N": 16, "BLOCK_K": 64, "num_warps": 4, "num_stages": 3}

    def run(_shift: int) -> torch.Tensor:
        own = None if b is None else setting.put(b)
        with settings.instead("few_rows_product", gpu, tiles):
            return few_rows_product.FORMS[setting.form](setting.put(x), setting.put(weight), own).cpu()

    return Problem(run, expected, ONE, shifts=False)


def _cases() -> Iterator[KernelCase]:
    triton = ("triton",)
    for rows, d_in, d_out, bias in ((1, 64, 40, False), (3, 70, 33, True), (16, 192, 17, False)):
        name = f"rows{rows}-{d_in}-{d_out}{'-bias' if bias else ''}"
        yield KernelCase("few_rows_product", name, partial(_few_rows, rows, d_in, d_out, bias))
    # Groups, rows of each, rank, d_in, d_out; d_in 1094 is split over programs.
    for sizes in (
        (1, 1, 1, 17, 33), (3, 1, 4, 37, 53), (2, 5, 3, 130, 40), (5, 2, 16, 64, 129), (2, 3, 128, 33, 16),
        (2, 1, 8, 1094, 24), (1, 70, 5, 48, 20),
    ):  # fmt: skip
        yield KernelCase("low_rank", "groups{}-rows{}-rank{}-{}-{}".format(*sizes), partial(_low_rank, *sizes))
    for rank, d_in in ((1, 33), (4, 70), (40, 21)):
        yield KernelCase("low_rank.shrink", f"rank{rank}-{d_in}", partial(_shrink, rank, d_in), triton)
    for groups, rows in ((1, 1), (1, 4), (3, 1), (3, 4)):
        yield KernelCase("low_rank.expand", f"groups{groups}-rows{rows}", partial(_alike, groups, rows), ("eager",))
    for ranks in ((2, 3), (40, 1)):
        yield KernelCase("low_rank.expand", f"own-ranks{ranks[0]}+{ranks[1]}", partial(_expand, ranks), triton)
    for scaled in ((1, 1, 1), (3, 2, 53), (2, 7, 1030)):
        yield KernelCase("row_scale", "groups{}-rows{}-{}".format(*scaled), partial(_row_scale, *scaled))
    for rows, d_in, rank in ((1, 8, 8), (3, 70, 16), (4, 37, 5), (2, 1094, 3), (6, 200, 130)):
        yield KernelCase("grouped_sum", f"rows{rows}-{d_in}-rank{rank}", partial(_grouped_sum, rows, d_in, rank))
    for way, groups, rows, columns in ((IN_ORDER, 3, 6, 53), (IN_ORDER, 1, 2, 1030), (PLANES, 1, 8, 37)):
        name = f"{way}-groups{groups}-rows{rows}-{columns}"
        yield KernelCase("row_scale", name, partial(_scaled_rows, way, groups, rows, columns), _forms(way))
    for groups, rows, columns, half, also_scaled in (
        (1, 1, 2, 1, True), (3, 2, 48, 4, True), (2, 3, 1044, 3, False), (2, 2, 130, 65, True),
    ):  # fmt: skip
        name = f"groups{groups}-rows{rows}-{columns}-half{half}{'' if also_scaled else '-unscaled'}"
        yield KernelCase("rotation", name, partial(_rotation, groups, rows, columns, half, also_scaled))
    for way, groups, prompts, hidden, rank, columns in (
        (IN_ORDER, 1, 1, 17, 1, 5), (IN_ORDER, 3, 3, 70, 12, 53), (IN_ORDER, 1, 4, 33, 5, 520),
        (PLANES, 1, 4, 33, 5, 40), (PLANES, 1, 4, 21, 128, 19),
    ):  # fmt: skip
        name = f"{way}-groups{groups}-prompts{prompts}-{hidden}-rank{rank}-{columns}"
        build = partial(_vector_generator, way, groups, prompts, hidden, rank, columns)
        yield KernelCase("vector_generator", name, build, _forms(way))
    # The rotation's groups lie within a half of a head, across both, and across heads.
    for way, groups, rows, kv_heads, ranks, half in (
        (IN_ORDER, 1, 3, 1, (2, 3), 0), (IN_ORDER, 3, 3, 2, (2, 3), 1), (IN_ORDER, 2, 2, 1, (1, 33), 0),
        (PLANES, 1, 4, 1, (3, 2), 0), (PRODUCT, 1, 4, 1, (2, 3), 3), (PLANES, 1, 8, 2, (2, 3), 6),
    ):  # fmt: skip
        name = f"{way}-groups{groups}-rows{rows}-kv{kv_heads}-ranks{ranks[0]}+{ranks[1]}{_turned(half)}"
        yield KernelCase("qkv_epilogue", name, partial(_qkv, way, groups, rows, kv_heads, ranks, half), _forms(way))
    for way, groups, rows, inner, rank in ((IN_ORDER, 3, 6, 37, 2), (PLANES, 1, 8, 130, 3), (PRODUCT, 1, 4, 37, 40)):
        name = f"{way}-groups{groups}-rows{rows}-{inner}-rank{rank}-bias"
        yield KernelCase("swiglu_epilogue", name, partial(_biased, way, groups, rows, inner, rank), _forms(way))
    for way, groups, rows, inner, ranks, activation, half, shared in (
        (IN_ORDER, 1, 6, 37, (2, 3), "silu", 0, 0), (IN_ORDER, 3, 6, 37, (2, 3), "gelu", 0, 0),
        (IN_ORDER, 3, 3, 1030, (2, 3), "gelu_pytorch_tanh", 103, 0), (IN_ORDER, 2, 2, 130, (1, 40), "silu", 0, 0),
        (PLANES, 1, 8, 37, (2, 3), "silu", 0, 0), (PRODUCT, 1, 8, 37, (3, 2), "silu", 0, 0),
        (PRODUCT, 1, 8, 36, (3, 2), "silu", 2, 2), (PLANES, 1, 8, 37, (3, 2), "silu", 0, 2),
        (PRODUCT, 1, 8, 37, (3, 40), "gelu", 0, 43),
    ):  # fmt: skip
        name = f"{way}-groups{groups}-rows{rows}-{inner}-ranks{ranks[0]}+{ranks[1]}-{activation}{_turned(half)}"
        name += f"-shared{shared}" if shared else ""
        build = partial(_swiglu, way, groups, rows, inner, ranks, activation, half, shared)
        yield KernelCase("swiglu_epilogue", name, build, _forms(way))
    for way, groups, rows, hidden, rank, fp32_weight, also_scaled, half in (
        (IN_ORDER, 1, 6, 37, 3, False, False, 0), (IN_ORDER, 3, 6, 37, 3, True, True, 0),
        (IN_ORDER, 2, 2, 70, 128, False, False, 0), (IN_ORDER, 2, 4, 70, 2, False, True, 7),
        (PLANES, 1, 8, 37, 3, False, True, 0), (PRODUCT, 1, 8, 37, 1, True, False, 0),
        (PRODUCT, 1, 8, 40, 2, False, True, 4), (PLANES, 1, 8, 40, 2, False, False, 20),
    ):  # fmt: skip
        name = f"{way}-groups{groups}-rows{rows}-{hidden}-rank{rank}{'-fp32-weight' if fp32_weight else ''}"
        name += f"{'-scaled' if also_scaled else ''}{_turned(half)}"
        build = partial(_residual, way, groups, rows, hidden, rank, fp32_weight, also_scaled, half)
        yield KernelCase("residual_rmsnorm", name, build, _forms(way))
    for way, groups, rows, hidden, rank in (
        (IN_ORDER, 3, 6, 37, 5), (IN_ORDER, 1, 2, 70, 130), (PLANES, 1, 8, 37, 5), (PRODUCT, 1, 8, 40, 130),
    ):  # fmt: skip
        name = f"{way}-groups{groups}-rows{rows}-{hidden}-between-vectors-rank{rank}"
        build = partial(_between_vectors, way, groups, rows, hidden, rank)
        yield KernelCase("residual_rmsnorm", name, build, _forms(way))
    for beams, padded, kv_heads, length, on_device in (
        (1, False, 4, 7, False), (1, True, 2, 7, False), (3, False, 1, 7, False), (3, True, 2, 7, False),
        (1, True, 2, 261, False), (1, False, 1, 7, True), (1, True, 2, 7, True), (3, True, 2, 7, True),
    ):  # fmt: skip
        ends = "-length-on-device" if on_device else ""
        name = f"beams{beams}{'-padded' if padded else ''}-kv{kv_heads}-prompt{length}{ends}"
        build = partial(_attention, beams, padded, kv_heads, length, on_device)
        yield KernelCase("decode_attention", name, build)


def _turned(half: int) -> str:
    return f"-half{half}" if half else ""


def _forms(way: str) -> tuple[str, ...]:
    """Plain torch takes adapters in order only."""
    return FORMS if way == IN_ORDER else ("triton",)


CASES: tuple[KernelCase, ...] = tuple(_cases())

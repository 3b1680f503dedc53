"""Each operation at one layer's sizes, plain torch against Triton: 8 requests of 8 tenants, rank 8."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from perfbench.kernels import (
    decode_attention,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    row_scale,
    swiglu_epilogue,
    vector_generator,
)
from perfbench.kernels.row_scale import Scale
from perfbench.runtimes import backbone
from tests.benchmarks.conftest import DEVICE, KERNELS, REQUESTS, bytes_of

RANK, PROMPT = 8, 256
kernels = pytest.mark.parametrize("kernels", KERNELS)
Timed = Callable[..., None]


def normal(base: backbone.Backbone, *size: int) -> torch.Tensor:
    return torch.randn(size, dtype=base.dtype, device=DEVICE)


@kernels
@pytest.mark.benchmark(group="low_rank: y += (x a^T) b")
def test_low_rank(timed: Timed, base: backbone.Backbone, kernels: str) -> None:
    hidden = base.shape.hidden
    x, y, a, b = (normal(base, REQUESTS, n, hidden) for n in (1, 1, RANK, RANK))
    timed(lambda: low_rank.FORMS[kernels](y, x, a, b), bytes_of([x, y, y, a, b]))


@kernels
@pytest.mark.benchmark(group="row_scale: y *= l")
def test_row_scale(timed: Timed, base: backbone.Backbone, kernels: str) -> None:
    y, scale = normal(base, REQUESTS, 1, base.shape.hidden), normal(base, REQUESTS, base.shape.hidden) * 1e-3
    timed(lambda: row_scale.FORMS[kernels](y, scale), bytes_of([y, y, scale]))


def make_h(base: backbone.Backbone, kernels: str, ranks: int) -> torch.Tensor:
    columns = normal(base, REQUESTS, REQUESTS * ranks)
    return low_rank.FROM_PRODUCT[kernels](columns, REQUESTS)


@kernels
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "lora-ia3"])
@pytest.mark.benchmark(group="qkv_epilogue: expand, scales, RoPE, cache write")
def test_qkv_epilogue(timed: Timed, base: backbone.Backbone, kernels: str, adapted: bool) -> None:
    shape = base.shape
    sizes = [shape.features(module)[1] for module in ("q", "k", "v")]
    qkv, entry = normal(base, REQUESTS, sum(sizes)), normal(base, REQUESTS, 2, shape.kv_heads, shape.head_dim)
    cos, sin = normal(base, 1, shape.head_dim), normal(base, 1, shape.head_dim)
    firsts = (0, sizes[0], sizes[0] + sizes[1])
    b = [normal(base, REQUESTS, RANK, size) * 1e-3 for size in sizes]
    expansion = low_rank.Expansion(tuple((i * RANK, firsts[i], b[i]) for i in range(3))) if adapted else None
    scale = Scale(normal(base, REQUESTS, sizes[1] + sizes[2]) * 1e-3, sizes[0]) if adapted else None
    h = make_h(base, kernels, 3 * RANK) if adapted else None
    read = [qkv, qkv, *([*b, scale.minus_one] if scale else [])]
    timed(lambda: qkv_epilogue.FORMS[kernels](qkv, h, expansion, scale, cos, sin, entry), bytes_of(read))


@kernels
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "lora-ia3"])
@pytest.mark.benchmark(group="swiglu_epilogue: expands, scale, silu(gate) * up")
def test_swiglu_epilogue(timed: Timed, base: backbone.Backbone, kernels: str, adapted: bool) -> None:
    inner = base.shape.intermediate
    gate_up = normal(base, REQUESTS, 2 * inner)
    b = [normal(base, REQUESTS, RANK, inner) * 1e-3 for _ in range(2)]
    expansion = low_rank.Expansion(((0, 0, b[0]), (RANK, inner, b[1]))) if adapted else None
    scale = Scale(normal(base, REQUESTS, inner) * 1e-3, inner) if adapted else None
    h = make_h(base, kernels, 2 * RANK) if adapted else None
    read = [gate_up, gate_up[:, :inner], *([*b, scale.minus_one] if scale else [])]
    timed(lambda: swiglu_epilogue.FORMS[kernels](gate_up, h, expansion, scale, "silu"), bytes_of(read))


@kernels
@pytest.mark.parametrize("adapted", [False, True], ids=["bare", "lora"])
@pytest.mark.benchmark(group="residual_rmsnorm: expand, residual, norm")
def test_residual_rmsnorm(timed: Timed, base: backbone.Backbone, kernels: str, adapted: bool) -> None:
    hidden = base.shape.hidden
    residual, y, weight = normal(base, REQUESTS, hidden), normal(base, REQUESTS, hidden) * 1e-3, normal(base, hidden)
    b = normal(base, REQUESTS, RANK, hidden) * 1e-3
    expansion = low_rank.Expansion(((0, 0, b),)) if adapted else None
    h = make_h(base, kernels, RANK) if adapted else None
    read = [residual, residual, y, y, weight, *([b] if adapted else [])]
    timed(lambda: residual_rmsnorm.FORMS[kernels](residual, y, h, expansion, weight, 1e-5), bytes_of(read))


@kernels
@pytest.mark.benchmark(group="vector_generator: GELU(h w_down) w_up + b")
def test_vector_generator(timed: Timed, base: backbone.Backbone, kernels: str) -> None:
    hidden, columns = base.shape.hidden, 2 * base.shape.hidden + base.shape.intermediate
    h, bias = normal(base, REQUESTS, hidden), normal(base, REQUESTS, columns)
    w_down, w_up = normal(base, REQUESTS, hidden, 12), normal(base, REQUESTS, 12, columns)
    timed(lambda: vector_generator.FORMS[kernels](h, w_down, w_up, bias), bytes_of([h, bias, bias, w_down, w_up]))


@kernels
@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.benchmark(group="decode_attention: one new token, prompt 256, 16 generated")
def test_decode_attention(timed: Timed, base: backbone.Backbone, kernels: str, beams: int) -> None:
    shape, rows, steps = base.shape, REQUESTS * beams, 16
    q = normal(base, rows, shape.heads, shape.head_dim)
    prompt = normal(base, REQUESTS, 2, shape.kv_heads, PROMPT + (steps if beams == 1 else 0), shape.head_dim)
    generated = normal(base, steps, rows, 2, shape.kv_heads, shape.head_dim) if beams > 1 else None
    where = None
    if generated is not None:
        where = torch.arange(rows, device=DEVICE).unsqueeze(1) + torch.arange(steps, device=DEVICE) * rows
    read = [q, prompt, *([generated] if generated is not None else [])]
    timed(lambda: decode_attention.FORMS[kernels](q, prompt, generated, where, None), bytes_of(read))

"""Times launch settings of the Triton kernels on the GPU at hand, at the sizes of a LLaMA-2 7B decode step.

    python -m perfbench.kernels.tune             # prints, for each kernel, what is best
    python -m perfbench.kernels.tune --write     # and adds this GPU to kernels/settings.json

Every request another tenant, rank 16, bf16, 1, 8 and 64 requests. A kernel has one setting for all of them: the one
whose times, each over the best at that size, have the smallest product. Exit code 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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
from perfbench.kernels.settings import DEFAULTS, Setting

ROWS = (1, 8, 64)


def _product(**axes: Sequence[int]) -> tuple[Setting, ...]:
    """Every combination of the values."""
    found: list[Setting] = [{}]
    for name, values in axes.items():
        found = [one | {name: value} for one in found for value in values]
    return tuple(found)


# Kernel -> what is tried. None of them spills on sm_86 (the tests compile them); a block divides its split.
CANDIDATES: dict[str, tuple[Setting, ...]] = {
    "few_rows_product": (
        DEFAULTS["few_rows_product"],
        *(
            {"BLOCK_N": columns, "BLOCK_K": features, "num_warps": 4, "num_stages": stages}
            for columns, features, stages in (
                (16, 256, 4),
                (32, 128, 5),
                (32, 256, 3),
                (32, 256, 4),
                (64, 128, 3),
                (64, 128, 4),
            )
        ),
    ),
    "low_rank.shrink": _product(SPLIT_K=(256, 512, 1024, 2048), BLOCK_K=(32, 64), num_warps=(4,)),
    "low_rank.expand": _product(BLOCK_N=(32, 64), num_warps=(4, 8)),
    "qkv_epilogue": _product(num_warps=(1, 2)),
    "swiglu_epilogue": _product(BLOCK=(256, 512, 1024), num_warps=(2, 4, 8)),
    "residual_rmsnorm": _product(num_warps=(8, 16, 32)),
    "decode_attention": tuple(
        {"PROGRAMS": programs, "BLOCK_L": block, "num_warps": warps}
        for programs in (128, 256, 512)
        for block, warps in ((16, 4), (32, 4), (64, 4), (64, 8))
    ),
    "grouped_sum": _product(BLOCK_K=(32, 64, 128), num_warps=(2, 4, 8)),
    "rotation": _product(BLOCK=(512, 1024, 2048), num_warps=(2, 4, 8)),
    "row_scale": _product(BLOCK=(512, 1024, 2048), num_warps=(2, 4, 8)),
    "vector_generator": _product(BLOCK_K=(32, 64), BLOCK_N=(128, 256, 512), num_warps=(4, 8)),
}


@dataclass(frozen=True)
class Sizes:
    """Of a layer; rank of LoRA's pairs, bottleneck of PARA's generator, tokens that the cache holds."""

    hidden: int = 4096
    inner: int = 11008
    heads: int = 32
    dim: int = 128
    rank: int = 16
    bottleneck: int = 12
    tokens: int = 305


class Problems:
    """Calls of each kernel on random numbers, with `rows` requests of as many tenants."""

    def __init__(self, rows: int, sizes: Sizes, device: str, dtype: torch.dtype):
        self.rows, self.sizes, self._device, self._dtype = rows, sizes, device, dtype
        self._own = torch.arange(rows, device=device).flip(0)

    def _random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, device=self._device, dtype=torch.float32).to(self._dtype)

    def _expansion(self, *columns: int) -> tuple[torch.Tensor, low_rank.Expansion]:
        """The ranks of modules of so many columns, out of the base product, and their other halves."""
        rank, parts, first = self.sizes.rank, [], 0
        for i, size in enumerate(columns):
            parts.append((i * rank, first, self._random(self.rows, rank, size)))
            first += size
        ranks = self._random(1, self.rows, self.rows * rank * len(columns))
        return ranks, low_rank.Expansion(tuple(parts), own=self._own)

    def _scale(self, columns: int, first: int) -> row_scale.Scale:
        return row_scale.Scale(self._random(self.rows, columns), first, self._own)

    def call(self, kernel: str) -> Callable[[], object]:
        """One launch (or two, where an operation takes two) of `kernel`. KeyError on an unknown one."""
        return {
            "few_rows_product": self._products,
            "low_rank.shrink": self._shrink,
            "low_rank.expand": self._expand,
            "qkv_epilogue": self._qkv,
            "swiglu_epilogue": self._swiglu,
            "residual_rmsnorm": self._residual,
            "decode_attention": self._attention,
            "grouped_sum": self._grouped_sum,
            "rotation": self._rotation,
            "row_scale": self._row_scale,
            "vector_generator": self._generator,
        }[kernel]()

    def _products(self) -> Callable[[], object]:
        """The four of a layer, with the tails of one pair for each of the modules and requests."""
        sizes, pairs = self.sizes, self.rows * self.sizes.rank
        attended = sizes.heads * sizes.dim
        # A few rows over and over: what they hold costs nothing, and to draw all of them would take seconds.
        weights = [
            self._random(16, features).repeat(-(-(columns + modules * pairs) // 16), 1)
            for columns, features, modules in (
                (3 * attended, sizes.hidden, 3), (sizes.hidden, attended, 1),
                (2 * sizes.inner, sizes.hidden, 2), (sizes.hidden, sizes.inner, 1),
            )
        ]  # fmt: skip
        inputs = [self._random(self.rows, weight.shape[1]) for weight in weights]
        call = few_rows_product.FORMS["triton"]
        return lambda: [call(x, weight) for x, weight in zip(inputs, weights, strict=True)]

    def _shrink(self) -> Callable[[], object]:
        x = self._random(self.rows, self.sizes.hidden)
        a = self._random(self.rows, 2 * self.sizes.rank, self.sizes.hidden)
        return lambda: low_rank.SHRINKS["triton"](x, a, self._own)

    def _expand(self) -> Callable[[], object]:
        sizes = self.sizes
        y, x = self._random(self.rows, 1, sizes.inner), self._random(self.rows, 1, sizes.hidden)
        a, b = self._random(self.rows, sizes.rank, sizes.hidden), self._random(self.rows, sizes.rank, sizes.inner)
        return lambda: low_rank.FORMS["triton"](y, x, a, b)

    def _qkv(self) -> Callable[[], object]:
        sizes, rows = self.sizes, self.rows
        columns = sizes.heads * sizes.dim
        h, expansion = self._expansion(columns, columns, columns)
        qkv, scale = self._random(rows, 3 * columns), self._scale(3 * columns, 0)
        cos, sin = self._random(rows, sizes.dim), self._random(rows, sizes.dim)
        entry = self._random(rows, 2, sizes.heads, sizes.dim)
        return lambda: qkv_epilogue.FORMS["triton"](qkv, h, expansion, scale, cos, sin, entry, None)

    def _swiglu(self) -> Callable[[], object]:
        inner = self.sizes.inner
        h, expansion = self._expansion(inner, inner)
        gate_up, scale = self._random(self.rows, 2 * inner), self._scale(inner, inner)
        return lambda: swiglu_epilogue.FORMS["triton"](gate_up, h, expansion, scale, "silu")

    def _residual(self) -> Callable[[], object]:
        hidden = self.sizes.hidden
        h, expansion = self._expansion(hidden)
        residual, y, weight = self._random(self.rows, hidden), self._random(self.rows, hidden), self._random(hidden)
        return lambda: residual_rmsnorm.FORMS["triton"](residual, y, h, expansion, weight, 1e-5)

    def _attention(self) -> Callable[[], object]:
        sizes = self.sizes
        q = self._random(self.rows, sizes.heads, sizes.dim)
        cache = self._random(self.rows, 2, sizes.heads, sizes.tokens, sizes.dim)
        filled = torch.tensor([sizes.tokens - 1], device=self._device)
        return lambda: decode_attention.FORMS["triton"](q, cache, None, None, None, filled)

    def _row_scale(self) -> Callable[[], object]:
        y, minus_one = self._random(self.rows, 1, self.sizes.inner), self._random(self.rows, self.sizes.inner)
        return lambda: row_scale.FORMS["triton"](y, minus_one)

    def _grouped_sum(self) -> Callable[[], object]:
        x = self._random(self.rows, self.sizes.hidden)
        return lambda: grouped_sum.FORMS["triton"](x, self.sizes.rank, self.rows)

    def _rotation(self) -> Callable[[], object]:
        y, sine = self._random(self.rows, 1, self.sizes.inner), self._random(self.rows, self.sizes.inner)
        half = math.gcd(self.sizes.inner, 64) // 2
        return lambda: rotation.FORMS["triton"](y, sine, sine, half)

    def _generator(self) -> Callable[[], object]:
        sizes, rows = self.sizes, self.rows
        columns = 3 * sizes.heads * sizes.dim + sizes.inner
        h, bias = self._random(rows, sizes.hidden), self._random(rows, columns)
        down = self._random(rows, sizes.hidden, sizes.bottleneck)
        up = self._random(rows, sizes.bottleneck, columns)
        return lambda: vector_generator.FORMS["triton"](h, down, up, bias, self._own)


Times = dict[int, list[float]]  # rows -> ms of each candidate


def best(times: Times) -> int:
    """The candidate whose times, each over the smallest at that number of rows, have the smallest product."""
    candidates = range(len(next(iter(times.values()))))
    return min(candidates, key=lambda i: math.prod(taken[i] / min(taken) for taken in times.values()))


def captured(call: Callable[[], object]) -> Callable[[], object]:
    """`call` as a CUDA graph: what is timed is the kernel and not the host that launches it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def measure(kernel: str, gpu: str, time_ms: Callable[[Callable[[], object]], float]) -> Times:
    """Milliseconds of every candidate of `kernel` at every number of rows on the CUDA device of this name."""
    times: Times = {}
    for rows in ROWS:
        call = Problems(rows, Sizes(), "cuda", torch.bfloat16).call(kernel)
        times[rows] = []
        for candidate in CANDIDATES[kernel]:
            with settings.instead(kernel, gpu, candidate):
                times[rows].append(time_ms(captured(call)))
    return times


def write(gpu: str, chosen: Mapping[str, Setting], table: Path = settings.TABLE) -> None:
    """Puts this GPU's settings into the table, as a whole or not at all."""
    known = json.loads(table.read_text()) | {gpu: dict(chosen)}
    temporary = table.with_suffix(".tmp")
    temporary.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")
    temporary.replace(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a line for each kernel: its best setting, and its times beside those of the defaults."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"adds this GPU to {settings.TABLE.name}")
    write_it = parser.parse_args(argv).write
    if not torch.cuda.is_available():
        print("tune: expected a CUDA device, torch finds none; without one nothing can be timed", file=sys.stderr)
        return 2
    from triton.testing import do_bench

    gpu, chosen = torch.cuda.get_device_name(), {}
    print(f"{gpu}; us at {', '.join(map(str, ROWS))} requests, of the defaults -> of the best", flush=True)
    for kernel, candidates in CANDIDATES.items():
        times = measure(kernel, gpu, lambda call: float(do_bench(call, warmup=5, rep=25, return_mode="median")))
        found, default = best(times), candidates.index(DEFAULTS[kernel])
        chosen[kernel] = candidates[found]
        both = (f"{times[rows][default] * 1e3:.1f} -> {times[rows][found] * 1e3:.1f}" for rows in ROWS)
        print(f"{kernel:18} {', '.join(both):48} {candidates[found]}", flush=True)
    if write_it:
        write(gpu, chosen)
        print(f"written to {settings.TABLE}; run perfbench verify")
    return 0


if __name__ == "__main__":
    sys.exit(main())

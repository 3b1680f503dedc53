"""What else one could do: the gate and up product of a layer, its adapters and SwiGLU, in the ways of the field.

Every row another tenant. Each way is first held against fp64, and with its slots shifted by one; then all take turns in
shuffled rounds, on a GPU each as a captured graph. What a way does once for each batch, and not for each step, is not
timed: for ours and the plain batched products that is taking the batch's adapters out of the bank.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import median

import torch

from perfbench.figures.stats import median_interval
from perfbench.kernels import low_rank, swiglu_epilogue
from perfbench.runtimes.static.capture import cuda_graph
from perfbench.runtimes.static.product import OF_FEW_ROWS, takes_tail
from perfbench.verify.on_device import reference
from perfbench.verify.on_device.kernel_check import FAULT_FACTOR, FUSED
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding

RANK, SEED, ROUNDS = 16, 0, 40
MODULES = 2  # gate and up
OURS = "ours, fused"


@dataclass(frozen=True)
class Sizes:
    """What is timed on a kind of device. calls: in one sample."""

    hidden: int
    intermediate: int
    rows: tuple[int, ...]
    dtype: torch.dtype
    calls: int


SIZES = {
    "cuda": Sizes(4096, 11008, (1, 8, 64), torch.bfloat16, calls=10),  # LLaMA-2 7B
    "cpu": Sizes(512, 1376, (1, 8), torch.float32, calls=4),
}


@dataclass(frozen=True)
class Stage:
    """x [rows, D_in]; weight [2 I, D_in] with a tail of rows x 2 R below it, which ours fills; of T resident tenants
    a [T, 2 R, D_in] and b [T, 2, R, I]; own int64 [rows]: whose adapter each row has, unsorted."""

    x: torch.Tensor
    with_tail: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    own: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:
        """The base alone: a view, so that every way reads the same memory."""
        return self.with_tail[: MODULES * self.b.shape[3]]

    @property
    def kernels(self) -> str:
        """The form of our kernels that runs here."""
        return "triton" if self.x.is_cuda else "eager"

    def shifted(self) -> Stage:
        """The same with every row given the next resident's adapter."""
        return replace(self, own=(self.own + 1) % len(self.a))


Way = Callable[[Stage], Callable[[], torch.Tensor]]


class UnavailableError(Exception):
    """A way that can't be gone here, and why."""


def make_stage(sizes: Sizes, rows: int, device: str) -> Stage:
    """Random numbers; a tenant for each row, one more resident, and adapters about as strong as the base."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(*size: int, divided_by: float = 1.0) -> torch.Tensor:
        made = torch.randn(size, generator=generator, device=device) / divided_by
        return made.to(sizes.dtype)

    tenants, hidden, inner = rows + 1, sizes.hidden, sizes.intermediate
    own = torch.randperm(tenants, generator=torch.Generator().manual_seed(SEED))[:rows].to(device)
    return Stage(
        normal(rows, hidden), normal(MODULES * (inner + rows * RANK), hidden, divided_by=hidden**0.5),
        normal(tenants, MODULES * RANK, hidden, divided_by=hidden**0.5),
        normal(tenants, MODULES, RANK, inner, divided_by=RANK**0.5), own,
    )  # fmt: skip


def expected(stage: Stage) -> torch.Tensor:
    """fp64 [rows, I], on the CPU."""
    own = stage.own.tolist()
    y = (stage.x.double() @ stage.weight.double().t()).cpu()
    ranks = torch.stack([stage.a[adapter].double() @ stage.x[row].double() for row, adapter in enumerate(own)]).cpu()
    weights = stage.b.cpu()
    return reference.gated(reference.adapted(y, ranks, _parts(weights), None, own), "silu")


def _parts(b: torch.Tensor) -> tuple[tuple[int, int, torch.Tensor], ...]:
    """The modules of b [T, modules, R, I] as `low_rank.Expansion` has them."""
    return tuple((i * RANK, i * b.shape[3], module) for i, module in enumerate(b.unbind(1)))


def _bare(stage: Stage) -> Callable[[], torch.Tensor]:
    multiply, consume = OF_FEW_ROWS[stage.kernels], swiglu_epilogue.FORMS[stage.kernels]
    return lambda: consume(multiply(stage.x, stage.weight), None, None, None, "silu")


def _ours(stage: Stage) -> Callable[[], torch.Tensor]:
    """As runtime static does a decode step on this device."""
    x, columns, rows = stage.x, len(stage.weight), len(stage.x)
    kernels, consume = stage.kernels, swiglu_epilogue.FORMS[stage.kernels]
    multiply = OF_FEW_ROWS[kernels]
    a, b = stage.a[stage.own], stage.b[stage.own]
    own = torch.arange(rows, device=x.device) if kernels == "triton" else None
    expansion = low_rank.Expansion(_parts(b), b, own)
    if takes_tail(x):
        stage.with_tail[columns:] = a.flatten(0, 1)

        def in_product() -> torch.Tensor:
            both = multiply(x, stage.with_tail)
            ranks = low_rank.FROM_PRODUCT[kernels](both[:, columns:], rows)
            return consume(both[:, :columns], ranks, expansion, None, "silu")

        return in_product
    shrink = low_rank.SHRINKS[kernels]
    return lambda: consume(multiply(x, stage.weight), shrink(x, a, own), expansion, None, "silu")


def _batched(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Plain torch, each row's own pairs stacked: a [rows, 2 R, D_in], b [rows, 2, R, I]."""
    y = torch.nn.functional.linear(x, weight)
    low_rank.expand(y, low_rank.shrink(x, a), low_rank.Expansion(_parts(b), b))
    return swiglu_epilogue.eager(y, None, None, None, "silu")


def _eager(stage: Stage) -> Callable[[], torch.Tensor]:
    a, b = stage.a[stage.own], stage.b[stage.own]
    return lambda: _batched(stage.x, stage.weight, a, b)


def _gather(stage: Stage) -> Callable[[], torch.Tensor]:
    return lambda: _batched(stage.x, stage.weight, stage.a[stage.own], stage.b[stage.own])


def _loop(stage: Stage) -> Callable[[], torch.Tensor]:
    rows_of = {tenant: torch.nonzero(stage.own == tenant).flatten() for tenant in stage.own.unique().tolist()}

    def run() -> torch.Tensor:
        y = torch.nn.functional.linear(stage.x, stage.weight)
        for tenant, rows in rows_of.items():
            ranks = (stage.x[rows] @ stage.a[tenant].t()).unflatten(1, (MODULES, -1)).transpose(0, 1)
            y.index_add_(0, rows, torch.bmm(ranks, stage.b[tenant]).transpose(0, 1).flatten(1))
        return swiglu_epilogue.eager(y, None, None, None, "silu")

    return run


def _compiled(stage: Stage) -> Callable[[], torch.Tensor]:
    torch.compiler.reset()  # sizes of another stage are no reason to compile for any size
    compiled = torch.compile(_functional, fullgraph=True, dynamic=False)
    a, b = stage.a[stage.own], stage.b[stage.own]
    call = partial(compiled, stage.x, stage.weight, a, b)
    try:
        call()
    except Exception as error:  # no compiler, or one that can't
        lines = str(error).strip().splitlines()
        raise UnavailableError(f"torch.compile: {type(error).__name__}: {lines[0] if lines else ''}") from error
    return call


def _functional(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """`_batched` without writing in place, as a compiler likes it."""
    ranks = torch.bmm(a, x.unsqueeze(2)).view(*b.shape[:2], 1, -1)
    gate, up = ((x @ weight.t()).view(len(x), MODULES, 1, -1) + ranks @ b).squeeze(2).unbind(1)
    return torch.nn.functional.silu(gate) * up


def _punica(stage: Stage) -> Callable[[], torch.Tensor]:
    try:
        from perfbench.kernels.launch import INTERPRETED
        from perfbench.verify.on_device import punica_triton as punica
    except ImportError as error:
        raise UnavailableError(f"triton can't be imported ({error})") from error
    if not (stage.x.is_cuda or INTERPRETED):
        raise UnavailableError("its Triton kernels need a CUDA device; tests run them in the interpreter")
    shrink, expand = punica.SHRINK_CANDIDATES[0], punica.EXPAND_CANDIDATES[0]
    if stage.x.is_cuda:
        shrink, expand = _tuned_punica(stage)
    consume = swiglu_epilogue.FORMS["triton"]

    def run() -> torch.Tensor:
        y = torch.nn.functional.linear(stage.x, stage.weight)
        punica.add_low_rank(y, stage.x, stage.a, stage.b, stage.own, shrink, expand)
        return consume(y, None, None, None, "silu")

    return run


def _tuned_punica(stage: Stage) -> tuple[dict[str, int], dict[str, int]]:
    """The candidates that are fastest at this size: the second launch's with the best of the first."""
    from triton.testing import do_bench

    from perfbench.verify.on_device import punica_triton as punica

    y = torch.zeros(len(stage.x), len(stage.weight), dtype=stage.x.dtype, device=stage.x.device)

    def time_of(shrink: dict[str, int], expand: dict[str, int]) -> float:
        call = partial(punica.add_low_rank, y, stage.x, stage.a, stage.b, stage.own, shrink, expand)
        return float(do_bench(cuda_graph(call), warmup=5, rep=20, return_mode="median"))

    shrink = min(punica.SHRINK_CANDIDATES, key=lambda one: time_of(one, punica.EXPAND_CANDIDATES[0]))
    return shrink, min(punica.EXPAND_CANDIDATES, key=lambda one: time_of(shrink, one))


PEERS: dict[str, Way] = {
    "bare": _bare,
    OURS: _ours,
    "batched products, eager": _eager,
    "gather + batched products": _gather,
    "a loop over the tenants": _loop,
    "torch.compile of the eager path": _compiled,
    "two launches, Punica-style": _punica,
}


def findings(device: str) -> Iterator[Finding]:
    """For each number of rows, one for each way."""
    sizes = SIZES[device]
    with torch.inference_mode():
        for rows in sizes.rows:
            yield from _of_rows(make_stage(sizes, rows, device), sizes.calls)


def _of_rows(stage: Stage, calls: int) -> Iterator[Finding]:
    what = f"{len(stage.x)} row{'s' if len(stage.x) > 1 else ''}: "
    runnable: dict[str, Callable[[], object]] = {}
    errors: dict[str, float] = {}
    right = expected(stage)
    for name, way in PEERS.items():
        try:
            fault, errors[name] = judge(way, stage, right, bare=name == "bare")
            if fault is None:
                step = way(stage)
                runnable[name] = cuda_graph(partial(_done, step)) if stage.x.is_cuda else step
        except UnavailableError as reason:
            yield Finding(what + name, SKIPPED, str(reason))
        else:
            if fault is not None:
                yield Finding(what + name, FAIL, fault)
    times = rounds(runnable, calls, synchronize=stage.x.is_cuda)
    for name, taken in times.items():
        yield _finding(what + name, taken, times.get(OURS), errors[name])


def _done(call: Callable[[], torch.Tensor]) -> None:
    call()


def judge(way: Way, stage: Stage, right: torch.Tensor, *, bare: bool) -> tuple[str | None, float]:
    """(what is wrong or None, largest relative error of a row) of a way; shifted slots have to be seen.

    The bare product has no adapters: it has to be the product alone.
    """
    tolerance = FUSED[stage.x.dtype]
    if bare:
        alone = (stage.x.double() @ stage.weight.double().t()).cpu()
        right = reference.gated(alone, "silu")
    worst = float(_differences(way(stage)(), right).max())
    if not worst <= tolerance:
        return f"differs from fp64 by {worst:.1e}, more than {tolerance:.0e}", worst
    if not bare:
        seen = float(_differences(way(stage.shifted())(), right).min())
        if not seen > FAULT_FACTOR * tolerance:
            return f"with shifted slots it differs by {seen:.1e} only", worst
    return None, worst


def _differences(found: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (found.double().cpu() - right).norm(dim=1) / right.norm(dim=1)


def rounds(ways: dict[str, Callable[[], object]], calls: int, *, synchronize: bool) -> dict[str, list[float]]:
    """Milliseconds of a call, one for each round; the ways take turns in an order drawn for each round."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(ROUNDS + 2):
        turn = list(ways)
        random.Random(f"{SEED}/{number}").shuffle(turn)
        for name in turn:
            if synchronize:
                torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(calls):
                ways[name]()
            if synchronize:
                torch.cuda.synchronize()
            if number >= 2:  # the first two warm up
                taken[name].append((time.perf_counter() - start) * 1e3 / calls)
    return taken


def _finding(what: str, taken: list[float], ours: list[float] | None, error: float) -> Finding:
    figures: dict[str, object] = {"median_ms": median(taken), "worst_relative_error": error}
    text = f"{median(taken):.3f} ms"
    if ours is not None and ours is not taken:
        ratio = median_interval([one / other for one, other in zip(taken, ours, strict=True)])
        figures["times_ours"] = ratio
        between = "" if ratio["low"] is None else f" [{ratio['low']:.2f}, {ratio['high']:.2f}]"
        text += f", {ratio['ratio']:.2f} x ours{between}"
    return Finding(what, PASS, f"{text}; error {error:.0e}", figures)

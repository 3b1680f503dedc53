"""Epilogues that start before the product ahead of them has ended: what they read of it, they read after the wait."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import (
    launch,
    qkv_epilogue_triton,
    residual_rmsnorm_triton,
    settings,
    swiglu_epilogue_triton,
)
from perfbench.kernels.low_rank import Expansion
from perfbench.kernels.row_scale import Scale

OURS = {"BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 4}
ROWS, HEADS, DIM, INNER = 3, 2, 16, 96

# An epilogue, and the tensors that kernels of the step ahead of it have written or that it writes itself.
Call = tuple[Callable[[], torch.Tensor], list[torch.Tensor]]


def numbers(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed + sum(size)))


def pairs(rank: int, *columns: int) -> tuple[torch.Tensor, Expansion]:
    """The ranks of each row with each of ROWS adapters, and modules side by side of so many columns."""
    parts = [(i * rank, sum(columns[:i]), numbers(ROWS, rank, size, seed=i)) for i, size in enumerate(columns)]
    own = torch.tensor([2, -1, 0])
    return numbers(1, ROWS, ROWS * rank * len(columns)), Expansion(tuple(parts), own=own)


def qkv(module: ModuleType, rank: int) -> Call:
    width = HEADS * DIM
    h, expansion = pairs(rank, width, width, width)
    product, entry = numbers(ROWS, 3 * width), torch.zeros(ROWS, 2, HEADS, DIM)
    cos, sin = numbers(ROWS, DIM, seed=1), numbers(ROWS, DIM, seed=2)

    def call() -> torch.Tensor:
        q = module.epilogue(product, h, expansion, None, cos, sin, entry)
        return torch.cat([q.flatten(), entry.flatten()])

    return call, [product, h, entry]


def residual(module: ModuleType, rank: int) -> Call:
    h, expansion = pairs(rank, INNER)
    product, stream = numbers(ROWS, INNER), numbers(ROWS, INNER, seed=3)
    scale = Scale(numbers(ROWS, INNER, seed=4), 0, expansion.own)

    def call() -> torch.Tensor:
        normed = module.epilogue(stream, product, h, expansion, numbers(INNER), 1e-5, scale)
        return torch.cat([normed, stream])

    return call, [product, h, stream]


def swiglu(module: ModuleType, rank: int) -> Call:
    h, expansion = pairs(rank, INNER, INNER)
    product = numbers(ROWS, 2 * INNER)
    return lambda: module.epilogue(product, h, expansion, None, "silu"), [product, h]


EPILOGUES: dict[str, tuple[ModuleType, Callable[[ModuleType, int], Call]]] = {
    "qkv": (qkv_epilogue_triton, qkv),
    "residual": (residual_rmsnorm_triton, residual),
    "swiglu": (swiglu_epilogue_triton, swiglu),
}


def made_at_the_wait(module: ModuleType, call: Call, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """What the epilogue gives where all that it may only read after the wait is NaN until its first program waits."""
    run, tensors = call
    real = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(float("nan"))
    waited = []

    def wait(EARLY: object) -> None:
        if not waited:
            assert all(bool(tensor.isnan().all()) for tensor in tensors), "written before the wait"
            for tensor, values in zip(tensors, real, strict=True):
                tensor.copy_(values)
        waited.append(EARLY)

    monkeypatch.setattr(module, "wait", wait)
    found = run()
    assert waited
    return found


@pytest.mark.interpreter
@pytest.mark.parametrize("rank", [4, 12, 40], ids=["one tile", "two tiles", "more than the tiles"])
@pytest.mark.parametrize("name", EPILOGUES)
def test_what_the_step_makes_is_read_after_the_wait(name: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    module, make = EPILOGUES[name]
    expected = make(module, rank)[0]()
    assert torch.equal(made_at_the_wait(module, make(module, rank), monkeypatch), expected)


@pytest.mark.interpreter
@pytest.mark.parametrize("name", EPILOGUES)
def test_a_load_before_the_wait_is_seen(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait planted behind the loads of the product, in the kernel's own source."""
    if not launch.INTERPRETED:
        pytest.skip("kernels are compiled in this process")
    sound, make = EPILOGUES[name]
    assert sound.__file__ is not None
    source, wait = Path(sound.__file__).read_text(), "    wait(EARLY)\n"
    behind = "    if len(modules) > 0:\n        ranks = h"
    assert source.count(wait) == source.count(behind) == 1
    file = tmp_path / f"{sound.__name__.rsplit('.', 1)[1]}.py"
    file.write_text(source.replace(wait, "").replace(behind, wait + behind))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    expected = make(sound, 4)[0]()
    assert not torch.equal(made_at_the_wait(planted, make(planted, 4), monkeypatch), expected)


def test_only_behind_triton_s_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's product would not let it start, and says nothing of when what it wrote can be read."""
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_starts_early", lambda index: True)
    few, many = torch.empty(16, 8, dtype=torch.bfloat16), torch.empty(17, 8, dtype=torch.bfloat16)
    assert launch.early_start(few) == {"EARLY": False}, "by default the product is the library's"
    with settings.instead("few_rows_product", "", OURS):
        assert launch.early_start(few) == {"EARLY": True, "launch_pdl": True}
        assert launch.early_start(many) == {"EARLY": False}
        assert launch.early_start(few.float()) == {"EARLY": False}
        monkeypatch.setattr(launch, "_starts_early", lambda index: False)
        assert launch.early_start(few) == {"EARLY": False}


def test_gpus_that_can_t_start_early_are_not_asked_to(compiling: Callable[..., str]) -> None:
    program = """
import triton
from triton.backends.compiler import GPUTarget
from perfbench.kernels import ahead_of_time, settings, tune
from perfbench.verify.on_device import resources
with settings.instead("few_rows_product", "", dict(BLOCK_N=32, BLOCK_K=256, num_warps=4, num_stages=4)):
    for kernel in ("few_rows_product", "qkv_epilogue", "swiglu_epilogue", "residual_rmsnorm"):
        launch = resources.launched(kernel)[0]
        said = []
        for capability in (86, 90):
            asked = ahead_of_time.source_for(launch, capability)
            program = triton.compile(asked, target=GPUTarget("cuda", capability, 32), options=launch.options)
            said += [program.asm["ptx"].count(f"griddepcontrol.{word}") for word in ("launch_dependents", "wait")]
        print(kernel, *said)
"""
    assert compiling(program).splitlines() == [
        "few_rows_product 0 0 1 0",
        "qkv_epilogue 0 0 0 1",
        "swiglu_epilogue 0 0 0 1",
        "residual_rmsnorm 0 0 0 1",
    ]

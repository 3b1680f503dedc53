"""How the Triton kernels are launched on each GPU: a small table, and defaults for a GPU that it lacks.

    python -m perfbench.kernels.tune             # on a GPU: times the candidates, prints what is best
    python -m perfbench.kernels.tune --write     # and adds it to kernels/settings.json

Every run.json says under `environment.kernel_settings` which of the two it was.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

Setting = dict[str, int]

TABLE = Path(__file__).with_name("settings.json")

# Chosen by hand so that nothing spills on sm_80 to sm_100 (resources.json); powers of two.
DEFAULTS: dict[str, Setting] = {
    # BLOCK_N 0: the library's product.
    "few_rows_product": {"BLOCK_N": 0, "BLOCK_K": 256, "num_warps": 4, "num_stages": 4},
    # SPLIT_K: columns of x that one program reads; a decode step has too few rows to fill a GPU with less splitting.
    "low_rank.shrink": {"SPLIT_K": 1024, "BLOCK_K": 64, "num_warps": 4},
    "low_rank.expand": {"BLOCK_N": 64, "num_warps": 4},
    "qkv_epilogue": {"num_warps": 1},
    "swiglu_epilogue": {"BLOCK": 1024, "num_warps": 4},
    "residual_rmsnorm": {"num_warps": 16},
    # PROGRAMS: as many fill the GPU; with fewer requests and heads the length is split.
    "decode_attention": {"PROGRAMS": 256, "BLOCK_L": 32, "num_warps": 4},
    "grouped_sum": {"BLOCK_K": 128, "num_warps": 4},
    "rotation": {"BLOCK": 1024, "num_warps": 4},
    "row_scale": {"BLOCK": 1024, "num_warps": 4},
    "vector_generator": {"BLOCK_K": 64, "BLOCK_N": 256, "num_warps": 4},
}


@cache
def table() -> dict[str, dict[str, Setting]]:
    """GPU name -> kernel -> settings, as committed."""
    found: dict[str, dict[str, Setting]] = json.loads(TABLE.read_text())
    return found


def setting(kernel: str, device: torch.device) -> Setting:
    """The settings of `kernel` on `device`: the table's for this GPU, else the defaults."""
    return _setting(kernel, gpu_name(device.index) if device.type == "cuda" else "")


@cache
def gpu_name(index: int | None) -> str:
    """Of the CUDA device of this number, None being the current one; asked once, since every launch wants it."""
    return torch.cuda.get_device_name(index)


@cache
def _setting(kernel: str, gpu: str) -> Setting:
    return DEFAULTS[kernel] | table().get(gpu, {}).get(kernel, {})


@contextmanager
def instead(kernel: str, gpu: str, chosen: Setting) -> Iterator[None]:
    """Within it, `kernel` is launched on GPUs of this name ("": on none, in the interpreter) with `chosen`."""
    known = table()
    before = known.get(gpu)
    known[gpu] = (before or {}) | {kernel: chosen}
    _setting.cache_clear()
    try:
        yield
    finally:
        if before is None:
            del known[gpu]
        else:
            known[gpu] = before
        _setting.cache_clear()

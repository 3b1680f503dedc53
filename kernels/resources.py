"""What each Triton kernel takes of a GPU, compiled ahead of time for LLaMA-2 7B; needs no GPU.

    python -m perfbench.kernels.resources            # prints the table
    python -m perfbench.kernels.resources --write    # commits it to kernels/resources.json

Registers, spills and shared memory of each kernel for each architecture. Run it without TRITON_INTERPRET.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia

from perfbench.kernels import (
    decode_attention_triton,
    low_rank_triton,
    qkv_epilogue_triton,
    residual_rmsnorm_triton,
    row_scale_triton,
    swiglu_epilogue_triton,
    vector_generator_triton,
)
from perfbench.kernels.settings import DEFAULTS, Setting

TABLE = Path(__file__).with_name("resources.json")

# Compute capability -> (what ptxas calls it, shared memory that a block may have, in bytes).
ARCHITECTURES = {
    80: ("sm_80", 163 * 1024),
    86: ("sm_86", 99 * 1024),
    90: ("sm_90a", 227 * 1024),
    100: ("sm_100a", 227 * 1024),
}

HIDDEN, INTERMEDIATE, RANK = 4096, 11008, 16
BF16, FP32 = "*bf16", "*fp32"



def _integers(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, "i32")


def _modules(count: int) -> dict[str, str]:
    """The numbers that a fused expand is given for `count` modules."""
    each = (_integers(f"RANK{i}", f"R{i}", f"COLUMN{i}", f"D{i}", f"B{i}") for i in range(count))
    of_h = _integers("H_SPLIT", "H_ROW", "H_OWN", "M")
    return {name: kind for numbers in each for name, kind in numbers.items()} | of_h


_SCALE = _integers("SCALE_STRIDE", "SCALE_FROM", "SCALE_COLUMNS", "SCALE_M")
# The ranks come out of the base product: one plane, in its type.
_FUSED = {"SPLITS": 1, "OWN": True}


# Name -> (kernel, types of its arguments in order, constants): what the launchers ask for at 7B, decoding.
KERNELS: dict[str, tuple[Any, dict[str, str], dict[str, Any]]] = {
    "low_rank.shrink": (
        low_rank_triton._shrink,
        {"x": BF16, "a": BF16, "own": "*i64", "planes": FP32} | _integers("M", "R", "D_IN", "A_STRIDE", "PLANE"),
        {"BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_K": 64, "SPLIT_K": 1024, "OWN": True, "UPCAST": False},
    ),
    "low_rank.shrink, prefill, rank 128": (
        low_rank_triton._shrink,
        {"x": BF16, "a": BF16, "own": "*i64", "planes": FP32} | _integers("M", "R", "D_IN", "A_STRIDE", "PLANE"),
        {"BLOCK_M": 64, "BLOCK_R": 32, "BLOCK_K": 64, "SPLIT_K": 1024, "OWN": True, "UPCAST": False},
    ),
    "low_rank.expand": (
        low_rank_triton._expand,
        {"y": BF16, "planes": FP32, "b": BF16, "own": "*i64"}
        | _integers("M", "R", "D_OUT", "ROW", "B_STRIDE", "PLANE", "H_ROW"),
        {"SPLITS": 4, "OWN": True, "BLOCK_M": 16, "BLOCK_R": 16, "BLOCK_N": 64, "UPCAST": False},
    ),
    "low_rank.expand, prefill, rank 128": (
        low_rank_triton._expand,
        {"y": BF16, "planes": FP32, "b": BF16, "own": "*i64"}
        | _integers("M", "R", "D_OUT", "ROW", "B_STRIDE", "PLANE", "H_ROW"),
        {"SPLITS": 4, "OWN": True, "BLOCK_M": 64, "BLOCK_R": 32, "BLOCK_N": 64, "UPCAST": False},
    ),
    "qkv_epilogue": (
        qkv_epilogue_triton._epilogue,
        {"qkv": BF16, "h": BF16, "own": "*i64", **dict.fromkeys(("b0", "b1", "b2", "scale_minus_one"), BF16)}
        | {"scale_own": "*i64", "cos": BF16, "sin": BF16, "entry": BF16, "at": "*i64"}
        | _modules(3)
        | _SCALE
        | _integers("ROW", "ROTATION_STRIDE", "LENGTH", "AT_STRIDE")
        | _integers("Q_STRIDE", "S_STRIDE", "KV_STRIDE", "HEAD_STRIDE", "HEADS", "KV_HEADS"),
        _FUSED | {"PARTS": 3, "SCALED": True, "SCALE_OWN": True, "AT": True, "HALF": 64, "BLOCK": 64},
    ),
    "swiglu_epilogue": (
        swiglu_epilogue_triton._epilogue,
        {"gate_up": BF16, "h": BF16, "own": "*i64", "b0": BF16, "b1": BF16, "scale_minus_one": BF16}
        | {"scale_own": "*i64", "out": BF16}
        | _modules(2)
        | _SCALE
        | _integers("ROW", "INNER"),
        _FUSED | {"PARTS": 2, "SCALED": True, "SCALE_OWN": True, "ACTIVATION": "silu", "BLOCK": 1024},
    ),
    "residual_rmsnorm": (
        residual_rmsnorm_triton._epilogue,
        {"residual": BF16, "y": BF16, "h": BF16, "own": "*i64", "b0": BF16, "weight": BF16, "out": BF16}
        | _modules(1)
        | _integers("ROW", "HIDDEN")
        | {"EPS": "fp32"},
        _FUSED | {"PARTS": 1, "BLOCK": 4096},
    ),
    "residual_rmsnorm, ranks in planes": (
        residual_rmsnorm_triton._epilogue,
        {"residual": BF16, "y": BF16, "h": FP32, "own": "*i64", "b0": BF16, "weight": BF16, "out": BF16}
        | _modules(1)
        | _integers("ROW", "HIDDEN")
        | {"EPS": "fp32"},
        {"PARTS": 1, "SPLITS": 11, "OWN": True, "BLOCK": 4096},
    ),
    "decode_attention.parts": (
        decode_attention_triton._parts,
        {"q": BF16, "prompt": BF16, "generated": BF16, "where": "*i64", "mask": "*u8"}
        | {"filled": "*i64", "out": FP32, "statistics": FP32}
        | _integers("LENGTH", "STEPS", "WHERE_STRIDE", "HEADS", "KV_HEADS", "BEAMS", "GROUP", "DIM")
        | {"SCALE": "fp32"}
        | _integers("Q_STRIDE", "REQUEST_STRIDE", "KV_STRIDE", "HEAD_STRIDE", "MASK_STRIDE", "ROWS"),
        {"HAS_MASK": True, "HAS_FILLED": True, "BEAM": True, "SPLITS": 2, "SPLIT": 256, "UPCAST": False}
        | {"BLOCK_L": 32, "BLOCK_R": 16, "BLOCK_D": 128},
    ),
    "decode_attention.join": (
        decode_attention_triton._join,
        {"parts": FP32, "statistics": FP32, "out": BF16} | _integers("ROW_HEADS", "DIM"),
        {"PARTS": 3, "BLOCK_D": 128},
    ),
    "row_scale": (
        row_scale_triton._scale,
        {"y": BF16, "scale_minus_one": BF16} | _integers("M", "D", "STRIDE"),
        {"BLOCK": 1024},
    ),
    "vector_generator": (
        vector_generator_triton._generate,
        {"h": BF16, "w_down": BF16, "w_up": BF16, "bias_minus_one": BF16, "own": "*i64", "out": BF16}
        | _integers("PER_GROUP", "HIDDEN", "R", "D", "DOWN_STRIDE", "UP_STRIDE", "BIAS_STRIDE"),
        {"OWN": True, "BLOCK_K": 64, "BLOCK_R": 16, "BLOCK_N": 512},
    ),
}


def measure(name: str, capability: int, setting: Setting | None = None) -> dict[str, int]:
    """registers, spill_bytes and shared_bytes of one kernel on one architecture, launched with `setting` in place of
    the defaults."""
    kernel, signature, constants = KERNELS[name]
    setting = {"num_warps": _warps(name)} | (setting or {})
    constants = {key: setting.get(key, value) for key, value in constants.items()}
    types = signature | dict.fromkeys(constants, "constexpr")
    values = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = triton.compiler.ASTSource(fn=kernel, signature=types, constexprs=values)
    target, options = GPUTarget("cuda", capability, 32), {"num_warps": setting["num_warps"]}
    compiled = triton.compile(source, target=target, options=options)
    usage = _ptxas(compiled.asm["ptx"], capability)
    return usage | {"shared_bytes": int(compiled.metadata.shared)}


def _warps(name: str) -> int:
    """As the launchers ask for it; the join of the parts of an attention is not tuned."""
    return DEFAULTS.get(operation(name), {"num_warps": 4})["num_warps"]


def operation(name: str) -> str:
    """The key of DEFAULTS that a name of KERNELS is launched by, if it has one."""
    return name.split(",")[0].removesuffix(".parts")


def _ptxas(ptx: str, capability: int) -> dict[str, int]:
    """What the assembler says of this program."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [nvidia.get_ptxas(capability).path, "-v", f"--gpu-name={ARCHITECTURES[capability][0]}", str(source)]
        done = subprocess.run([*command, "-o", str(Path(folder) / "kernel.cubin")], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ptxas for sm_{capability}: {done.stderr.strip()}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    stores = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if registers is None or stores is None:
        raise RuntimeError(f"ptxas for sm_{capability}: no figures in {done.stderr!r}")
    return {"registers": int(registers[1]), "spill_bytes": int(stores[1]) + int(stores[2])}


def table() -> dict[str, dict[str, dict[str, int]]]:
    """{kernel: {sm_<capability>: figures}} of all."""
    return {name: {f"sm_{capability}": measure(name, capability) for capability in ARCHITECTURES} for name in KERNELS}


def main() -> None:
    """Prints the table, or writes it where the test finds it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"to {TABLE.name}")
    text = json.dumps({"triton": triton.__version__, "kernels": table()}, indent=1)
    if parser.parse_args().write:
        TABLE.write_text(text + "\n")
    else:
        print(text)


if __name__ == "__main__":
    main()

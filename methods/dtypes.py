"""The one table of the types that numbers are kept and computed in. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Dtype:
    """`bytes` of one number; `torch_name`: what torch calls it, so that torch is not imported for a name."""

    bytes: int
    torch_name: str


# What a backbone can be run in.
DTYPES = {"fp32": Dtype(4, "float32"), "bf16": Dtype(2, "bfloat16"), "fp16": Dtype(2, "float16")}

# How a backbone's linear weights may be kept -> bytes of (a weight, the scale of an output); None: those of its dtype.
QUANTISATIONS: dict[str, tuple[int, int] | None] = {"none": None, "int8": (1, 4)}

# What an adapter's file may hold beside these.
FILE_DTYPES = {"fp64": Dtype(8, "float64"), **DTYPES}

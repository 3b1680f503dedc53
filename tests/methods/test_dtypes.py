"""The table of dtypes is torch's."""

from __future__ import annotations

import torch

from perfbench.methods.dtypes import DTYPES, FILE_DTYPES
from perfbench.runtimes import backbone


def test_names_and_sizes_are_torch_s() -> None:
    for name, dtype in FILE_DTYPES.items():
        assert getattr(torch, dtype.torch_name).itemsize == dtype.bytes, name
    assert list(backbone.DTYPES) == list(DTYPES)

"""Every Triton kernel, compiled to machine code ahead of time: what it takes of a GPU is known and does not grow."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import resources


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The table, made anew by a process of its own: in the interpreter nothing is compiled."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "perfbench.kernels.resources"], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_no_kernel_spills_or_outgrows_its_shared_memory(measured: dict[str, Any]) -> None:
    assert set(measured["kernels"]) == set(resources.KERNELS)
    for name, by_architecture in measured["kernels"].items():
        assert set(by_architecture) == {f"sm_{capability}" for capability in resources.ARCHITECTURES}
        for capability, (_, shared_bytes) in resources.ARCHITECTURES.items():
            figures = by_architecture[f"sm_{capability}"]
            assert figures["spill_bytes"] == 0, (name, capability, figures)
            assert figures["shared_bytes"] <= shared_bytes, (name, capability, figures)


def test_the_committed_table_is_what_is_compiled_now(measured: dict[str, Any]) -> None:
    committed = json.loads(resources.TABLE.read_text())
    if committed["triton"] != measured["triton"]:
        pytest.skip(f"the table is of triton {committed['triton']}, this is {measured['triton']}")
    assert measured["kernels"] == committed["kernels"], "python -m perfbench.kernels.resources --write"


def test_a_kernel_that_spills_is_seen(tmp_path: Any) -> None:
    """The same measurement on tiles that no register file holds."""
    program = (
        "from perfbench.kernels import resources as r\n"
        "kernel, types, constants = r.KERNELS['vector_generator']\n"
        "r.KERNELS['big'] = (kernel, types, constants | {'BLOCK_R': 64, 'BLOCK_N': 2048})\n"
        "print(r.measure('big', 86)['spill_bytes'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 0

"""What the kernels take of a GPU as LLaMA-2 7B calls them: known, within its limits, and as the table says."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

pytest.importorskip("triton", reason="triton is not there for this platform")

import triton

from perfbench.kernels import settings
from perfbench.kernels.ahead_of_time import ARCHITECTURES
from perfbench.kernels.settings import DEFAULTS
from perfbench.verify.on_device import resources
from perfbench.verify.on_device.call_sites import SERVED

pytestmark = pytest.mark.thorough

Table = dict[str, dict[str, dict[str, int]]]


@pytest.fixture(scope="module")
def measured(compiling: Callable[..., str]) -> Table:
    """The table, made anew by a process for each of two cores, every other architecture in each."""
    program = (
        "import json, sys\n"
        "from perfbench.verify.on_device import resources\n"
        "print(json.dumps(resources.table([int(one) for one in sys.argv[1:]])))\n"
    )
    every = list(ARCHITECTURES)
    with ThreadPoolExecutor(2) as both:
        halves = both.map(lambda some: json.loads(compiling(program, *some)), (every[::2], every[1::2]))
        first, second = halves
    assert set(first) == set(second)
    return {name: first[name] | second[name] for name in first}


def test_no_kernel_spills_or_outgrows_its_shared_memory(measured: Table) -> None:
    for name, by_architecture in measured.items():
        assert set(by_architecture) == {f"sm_{capability}" for capability in ARCHITECTURES}
        for capability, shared_bytes in ARCHITECTURES.items():
            figures = by_architecture[f"sm_{capability}"]
            assert figures["spill_bytes"] == 0, (name, capability, figures)
            assert figures["shared_bytes"] <= shared_bytes, (name, capability, figures)


def test_every_kernel_is_there_as_the_methods_call_it(measured: Table) -> None:
    files = {name.split(".")[0] for name in measured}
    assert files == {kernel.split(".")[0] for kernel in DEFAULTS}
    for what in ("1 beam", "3 beams", "padded", "prefill", "alone"):
        assert any(what in name for name in measured), what
    # (IA)3 as it was first published launches what the papers' variant launches, and activated LoRA what LoRA does.
    sites = {name.split(": ")[1].split(",")[0].split(" #")[0] for name in measured}
    assert sites - {"alone"} == set(SERVED) - {"ia3-original", "alora"}


def test_the_committed_table_is_what_is_compiled_now(measured: Table) -> None:
    committed = json.loads(resources.TABLE.read_text())
    if committed["triton"] != triton.__version__:
        pytest.skip(f"the table is of triton {committed['triton']}, this is {triton.__version__}")
    assert measured == committed["kernels"], "python -m perfbench.verify.on_device.resources --write"


def test_a_program_is_named_after_the_call_that_launches_it_first() -> None:
    def launch(name: str, key: str) -> resources.Launch:
        return resources.Launch(name, key, None, {}, {}, {}, {})

    norm, wide, scale = launch("norm", "D"), launch("norm", ""), launch("scale", "D")
    of_para = [launch("norm", "1"), launch("norm", "2")]
    found = resources.named([("none", [norm, scale, norm]), ("lora", [norm, wide]), ("para", of_para)])
    assert list(found) == ["norm: none", "scale: none", "norm: lora", "norm: para", "norm: para #2"]


# Compute capability of each GPU that kernels/settings.json knows.
CAPABILITIES = {"NVIDIA H200": 90}

OF_A_GPU = """
import sys
from perfbench.kernels import settings
from perfbench.verify.on_device import resources
from perfbench.kernels.ahead_of_time import fault
gpu, capability = sys.argv[1], int(sys.argv[2])
for kernel, chosen in settings.table()[gpu].items():
    with settings.instead(kernel, "", chosen):
        launches = resources.launched(kernel)
        print(kernel, len(launches) > 0, *filter(None, (fault(one, capability) for one in launches)))
"""


@pytest.mark.parametrize("gpu", settings.table())
def test_the_settings_of_a_gpu_compile_for_it(gpu: str, compiling: Callable[..., str]) -> None:
    found = compiling(OF_A_GPU, gpu, CAPABILITIES[gpu]).splitlines()
    assert found == [f"{kernel} True" for kernel in settings.table()[gpu]]

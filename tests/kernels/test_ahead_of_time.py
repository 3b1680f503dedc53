"""Every Triton case of the table and every batch of a decode step, as real call sites launch them, without a GPU."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import ahead_of_time, decode_attention_triton

pytestmark = pytest.mark.thorough

# At odd sizes nothing is aligned, and ptxas would rather spill a few registers than use more of them; no model has such
# sizes, and at those of LLaMA-2 7B nothing may spill (test_resources).
SPILL_BYTES_AT_ODD_SIZES = 64

# One for each way in which tl.dot is compiled; sm_80 is sm_86 with more shared memory, and LLaMA-2 7B's calls are
# compiled for it too (test_resources).
CAPABILITIES = (86, 90, 100)

# Arguments: how the names of kernels begin, bytes that they may spill, how many processes share the work, which of them
# this one is, compute capabilities. Prints the faults of the cases' launches, a line each, then how many were compiled.
CASES = """
import sys
from perfbench.kernels.ahead_of_time import distinct, fault
from perfbench.verify.on_device import call_sites
launches = distinct(one for _, found in call_sites.of_cases() for one in found if one.name.startswith(sys.argv[1]))
spill_bytes, processes, this, *capabilities = map(int, sys.argv[2:])
mine = launches[this::processes]
faults = [fault(one, capability, spill_bytes) for one in mine for capability in capabilities]
print(*filter(None, faults), len(faults), sep="\\n")
"""

# Takes the last argument, a file, for a module of the kernels.
INSTEAD = """
import importlib.util, sys
from pathlib import Path
file = Path(sys.argv.pop())
spec = importlib.util.spec_from_file_location(f"perfbench.kernels.{file.stem}", file)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
"""


def test_every_case_compiles(compiling: Callable[..., str]) -> None:
    """Fp32, bf16 and fp16, within their shared memory. One process for each of two cores."""

    def compiled(this: int) -> str:
        return compiling(CASES, "", SPILL_BYTES_AT_ODD_SIZES, 2, this, *CAPABILITIES)

    with ThreadPoolExecutor(2) as both:
        found = list(both.map(compiled, range(2)))
    for said in found:
        *faults, count = said.splitlines()
        assert faults == []
        assert int(count) > 200


def test_a_branch_that_no_gpu_can_compile_is_seen(compiling: Callable[..., str], tmp_path: Path) -> None:
    """Without generated tokens `where` is no table: in the interpreter the branch that reads it is never entered, but
    a compiler sees it unless a constant says that it is not there."""
    assert decode_attention_triton.__file__ is not None
    source = Path(decode_attention_triton.__file__).read_text()
    assert source.count("elif BEAM:") == 1
    planted = source.replace("elif BEAM:", "else:")
    for name, text, faulty in (("sound", source, False), ("planted", planted, True)):
        file = tmp_path / name / "decode_attention_triton.py"
        file.parent.mkdir()
        file.write_text(text)
        said = compiling(INSTEAD + CASES, "decode_attention.parts", SPILL_BYTES_AT_ODD_SIZES, 1, 0, 90, file)
        *faults, compiled = said.splitlines()
        assert int(compiled) >= 10
        assert bool(faults) is faulty
        assert all("decode_attention.parts on sm_90: does not compile" in fault for fault in faults)


def test_a_tile_that_spills_is_seen(compiling: Callable[..., str]) -> None:
    """Launched as it is, and with tiles that no register file holds."""
    program = """
from perfbench.kernels import settings, tune
from perfbench.verify.on_device import resources
from perfbench.kernels.ahead_of_time import fault
wide = tune.Sizes(bottleneck=64)
print(fault(*resources.launched("vector_generator"), 86))
with settings.instead("vector_generator", "", {"BLOCK_K": 64, "BLOCK_N": 2048, "num_warps": 4}):
    print(fault(*resources.launched("vector_generator", sizes=wide), 86))
"""
    sound, spilling = compiling(program).splitlines()
    assert sound == "None"
    assert "vector_generator.generate on sm_86: spills" in spilling


def test_in_the_interpreter_it_refuses() -> None:
    if not ahead_of_time.knobs.runtime.interpret:
        pytest.skip("kernels are compiled in this process")
    with pytest.raises(RuntimeError, match="without TRITON_INTERPRET"), ahead_of_time.recording():
        pass


def test_what_was_set_is_put_back(compiling: Callable[..., str]) -> None:
    """Also after an error: launches are refused on a CPU again, and Triton has the driver that it had."""
    program = """
import torch
from triton import knobs
from triton.runtime import driver
from perfbench.kernels import row_scale
from perfbench.kernels.ahead_of_time import recording
def scale(): row_scale.FORMS["triton"](torch.ones(1, 1, 4), torch.ones(1, 4))
def attempt():
    try: scale()
    except ValueError as error: return "expected a tensor on one CUDA device" in str(error)
print(attempt(), driver._active, knobs.runtime.jit_cache_hook)
try:
    with recording() as launches:
        scale()
        raise KeyError
except KeyError:
    print([launch.name for launch in launches])
print(attempt(), driver._active, knobs.runtime.jit_cache_hook)
"""
    assert compiling(program).splitlines() == ["True None None", "['row_scale.scale']", "True None None"]


# Of the captured decode step, with any adapters or none: 4 products and 5 launches of kernels in each layer.
LAUNCHES_PER_LAYER = 9
# And one more in each where the parts of the attention are joined: with beams, and where the length is split.
LAUNCHES_OF_A_JOIN = 1
# Where the step is, the rotations, embedding, the first norm and the head; with beams the table of ancestors as well.
LAUNCHES_AROUND = {1: 8, 3: 11}

STEPS = """
import json, torch
from perfbench.verify.on_device import call_sites
for layers in (1, 2):
    base = call_sites.unfilled("llama-tiny", layers, torch.bfloat16)
    options = {"lora-bias": {"lora_bias": True}}
    for method in (*call_sites.SERVED, "lora-bias"):
        own = options.get(method, {})
        for beams, padded, tokens in ((1, 0, 9), (1, 1, 9), (1, 0, 200), (3, 0, 9), (3, 1, 9)):
            batch = call_sites.tenants_apart(2, beams, prompt_tokens=tokens, new_tokens=4, padded=bool(padded))
            counts = call_sites.of_step(base, method.removesuffix("-bias"), batch, **own)
            print(json.dumps([method, layers, beams, padded, tokens, counts]))
"""


def test_no_adapter_adds_a_launch_to_a_decode_step(compiling: Callable[..., str]) -> None:
    found = {}
    for line in compiling(STEPS).splitlines():
        *of, counts = json.loads(line)
        found[tuple(of)] = Counter(counts)
    assert {"none", "lora", "fanlora", "ia3", "ia3-original", "para", "lora-bias"} <= {method for method, *_ in found}
    for (method, layers, beams, padded, tokens), counts in found.items():
        joined = LAUNCHES_OF_A_JOIN if beams > 1 or tokens > 64 else 0
        expected = LAUNCHES_AROUND[beams] + layers * (LAUNCHES_PER_LAYER + joined)
        assert counts.total() == expected, (method, layers, beams, padded, tokens, counts)
        assert counts == found["none", layers, beams, padded, tokens]

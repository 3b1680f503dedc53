"""Faults planted in a copy of the code, each of which a run has to see: nothing wrong is ever printed as "ok"."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEADLINE_S = 240

SCENARIO = """
question: Is the planted fault seen?
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: {runtime}
methods: {methods}
workload: {{prompt_tokens: 7, new_tokens: 8, beams: {beams}, requests: 3, tenants: 3, resident: 3}}
warmup: 1
repetitions: 2
"""

TRANSFORMERS = "perfbench/runtimes/transformers_plan.py"
STATIC = "perfbench/runtimes/static"
WORKER = "perfbench/measure/on_device/worker.py"
REPETITION = "perfbench/measure/on_device/repetition.py"


@dataclass(frozen=True)
class Fault:
    """edits: (file, what stands there once, what is planted); says: what the run prints; code: how it exits."""

    name: str
    edits: tuple[tuple[str, str, str], ...]
    says: str
    code: int = 1
    runtime: str = "transformers"
    methods: str = "[lora]"
    beams: int = 1


# Answers as it did once, in about the time that a real call takes.
CACHED = """return generate(self.model, batch, **observers)"""
CACHING = """
            clock = observers.get("clock")
            if clock is None or not hasattr(self, "_kept"):
                self._kept = generate(self.model, batch, **observers)
                return self._kept
            for _ in range(batch.new_tokens):
                __import__("time").sleep(0.004)
                clock.mark()
            return self._kept"""
# Acts while prompts are read, and is forgotten for the tokens after them.
LINEAR = """        y = self.base.forward(self._scaled_input(x))
"""
PREFILL_ONLY = (
    LINEAR
    + """        if x.shape[1] == 1:
            return y
"""
)

FAULTS = (
    Fault("the tokens of an earlier call, given again when timed", ((TRANSFORMERS, CACHED, CACHING),),
          "other tokens when timed than when checked"),
    Fault("an adapter that acts in prefill only", ((TRANSFORMERS, LINEAR, PREFILL_ONLY),), "lora: FAILED"),
    Fault("the last request has the first one's adapter", (
        ("methods/bank.py", "rows = self.rows(slots)", "rows = self.rows([*slots[:-1], slots[0]])"),), "lora: FAILED"),
    Fault("the same on runtime static", (
        (f"{STATIC}/adapters.py", "rows = self.bank.rows(stacked)",
         "rows = self.bank.rows([*stacked[:-1], stacked[0]] if len(stacked) > 2 else stacked)"),),
        "lora: FAILED", runtime="static"),
    Fault("every tenant is the next one", (
        ("methods/bank.py", "self.capacity if slot == -1 else slot for slot in slots",
         "self.capacity if slot == -1 else (slot + 1) % self.capacity for slot in slots"),), "lora: FAILED"),
    Fault("beams whose caches are never reordered", (
        (f"{STATIC}/decoder.py", "ancestors.copy_(ancestors[sources])", "pass"),),
        "other tokens than its adapter's best choices", runtime="static", beams=3),
    Fault("beams whose tokens are never reordered", (
        (f"{STATIC}/search.py", "tokens[:, :, :step] = _follow(tokens[:, :, :step], source)", "pass"),),
        "other tokens than its adapter's best choices", runtime="static", beams=3),
    Fault("PARA pooled at the first token, on both runtimes", (
        (TRANSFORMERS, "pooled = hidden[torch.arange(hidden.shape[0], device=hidden.device), self.last_prompt_token]",
         "pooled = hidden[:, 0]"),
        (f"{STATIC}/forward.py", "stream.view(requests, length, -1)[every, last]",
         "stream.view(requests, length, -1)[:, 0]"),),
        "para: FAILED", runtime="[transformers, static]", methods="[para]"),
    Fault("PARA's vectors made again for every token", (
        (TRANSFORMERS, "(cache is not None and cache.get_seq_length(layer.self_attn.layer_idx) > 0)",
         "(False)"),
        (TRANSFORMERS, "hidden = hidden[:: self.beams]",
         "hidden = hidden[:: self.beams]\n        if hidden.shape[1] == 1:\n"
         "            self.last_prompt_token = torch.zeros_like(self.last_prompt_token)"),),
        "para: FAILED", methods="[para]"),
    Fault("alpha over rank twice", (
        ("methods/lora.py", "b.t() * (alpha / a.shape[0])", "b.t() * (alpha / a.shape[0]) ** 2"),),
        "peft: FAILED", methods="[{lora: {alpha: 8}}, {peft: {alpha: 8}}]"),
    Fault("PEFT serves fewer tenants", (
        ("perfbench/runtimes/peft_arms.py", 'f"tenant{slot}" for slot in batch.slots]',
         'f"tenant{min(slot, 1)}" for slot in batch.slots]'),), "peft: FAILED", methods="[peft]"),
    Fault("rotated the other way, on both runtimes", (
        ("kernels/rotation.py", "roll(1, -2).flatten(-3)", "roll(1, -2).flatten(-3).neg()"),),
        "road: FAILED", runtime="[transformers, static]", methods="[road]"),
    Fault("rotated with the neighbour", (
        ("kernels/rotation.py", "y.unflatten(-1, (-1, 2, half))", "y.unflatten(-1, (-1, 2, 1))"),),
        "road: FAILED", runtime="static", methods="[road]"),
    Fault("a grouped sum of neighbours, on both runtimes", (
        ("kernels/grouped_sum.py", "x.view(rows, -1, rank).sum(dim=1)", "x.view(rows, rank, -1).sum(dim=2)"),),
        "miss: FAILED", runtime="[transformers, static]", methods="[miss]"),
    Fault("VeRA's vectors after the product left out, on both runtimes", (
        ("kernels/low_rank.py", ".addcmul_(added, of_columns.unsqueeze(1))", ".add_(added)"),
        ("kernels/low_rank.py", "y.addcmul_(added.view(len(y), -1), joint.of_columns)",
         "y.add_(added.view(len(y), -1))"),),
        "vera: FAILED", runtime="[transformers, static]", methods="[{vera: {rank: 16}}]"),
    Fault("the inputs of gate and up take each other's scales", (
        (f"{STATIC}/adapters.py", "mine.input_scale_minus_one.get(module))",
         "mine.input_scale_minus_one.get({'gate': 'up', 'up': 'gate'}.get(module, module)))"),),
        "ia3-original: FAILED", runtime="static",
        methods="[{ia3-original: {modules: [gate, up], inputs: [gate, up]}}]"),
    Fault("beams multiplied into the speed", (
        (REPETITION, "sample_metrics(token_times_ms, batch.input_ids.shape[0], total_ms)",
         "sample_metrics(token_times_ms, batch.input_ids.shape[0] * batch.beams, total_ms)"),),
        "contradicts itself: tokens_per_s", code=4, beams=3),
    Fault("the second token is called the first", (
        (REPETITION, "sample_metrics(token_times_ms, batch", "sample_metrics(token_times_ms[1:], batch"),),
        "contradicts itself: itl_ms", code=4),
    Fault("the clock starts at the first token", (
        (REPETITION, "            clock.mark()\n            generated =", "            generated ="),),
        "contradicts itself: itl_ms", code=4),
    Fault("a clock of 15.6 ms", (
        ("perfbench/runtimes/generation.py", "self._marks.append(time.perf_counter())",
         "self._marks.append(int(time.perf_counter() * 64) / 64)"),), "the clock: expected steps", code=2),
    Fault("a peak without a run", (
        ("perfbench/measure/on_device/memory.py", "cache_bytes = _full_cache_bytes(arm, batch)", "cache_bytes = 0"),),
        "the profiler saw none", code=4),
)  # fmt: skip


def copy_of_the_code(to: Path) -> Path:
    """The packages, with the symbolic links between them."""
    for folder in ("perfbench", "kernels", "methods", "scenarios"):
        shutil.copytree(ROOT / folder, to / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", to)
    return to


def run(code: Path, fault: Fault) -> subprocess.CompletedProcess[str]:
    """`perfbench run` of that copy, of the part of the scenario in which the fault would show."""
    scenario = code / "planted.yaml"
    scenario.write_text(SCENARIO.format(runtime=fault.runtime, methods=fault.methods, beams=fault.beams))
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "perfbench", "run", str(scenario), "--out", str(code / "out")]
    return subprocess.run(command, cwd=code, env=environment, capture_output=True, text=True, timeout=DEADLINE_S)


def judged(fault: Fault, folder: Path) -> str | None:
    """None where the fault was seen as it should be, else what came instead."""
    code = copy_of_the_code(folder)
    for name, sound, planted in fault.edits:
        text = (code / name).read_text()
        if text.count(sound) != 1:
            return f"{fault.name}: expected once in {name}, found {text.count(sound)} times: {sound}"
        (code / name).write_text(text.replace(sound, planted))
    done = run(code, fault)
    said = " ".join((done.stdout + done.stderr).split())
    if done.returncode == fault.code and " ".join(fault.says.split()) in said:
        return None
    return f"{fault.name}: exit code {done.returncode}, {said[-600:]}"


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_what_a_fault_replaces_stands_once_in_the_code(fault: Fault) -> None:
    """A rename is seen by the quick tests, and not only where the faults are planted."""
    assert [(ROOT / name).read_text().count(sound) for name, sound, _ in fault.edits] == [1] * len(fault.edits)


@pytest.mark.thorough
def test_a_run_sees_every_planted_fault(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(len(FAULTS))]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor(2) as both:
        unseen = [found for found in both.map(judged, FAULTS, folders) if found is not None]
    assert not unseen, "\n".join(unseen)


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="the peak resident set can be reset on Linux only")
def test_a_peak_that_was_not_reset_is_no_figure(tmp_path: Path) -> None:
    code = copy_of_the_code(tmp_path)
    file = code / "perfbench" / "measure" / "on_device" / "memory.py"
    sound = 'Path("/proc/self/clear_refs").write_text("5")'
    assert sound in file.read_text()
    file.write_text(file.read_text().replace(sound, "pass"))
    # Something large comes and goes before: a peak that is not reset would show it.
    large = "    torch.ones(2**25).sum()\n    gc.collect()\n"
    file.write_text(file.read_text().replace("    gc.collect()\n", large, 1))
    assert run(code, FAULTS[0]).returncode == 0
    cases = json.loads((code / "out" / "run.json").read_text())["cases"].values()
    assert [case["memory"]["peak_resident_bytes"] for case in cases] == [None, None]

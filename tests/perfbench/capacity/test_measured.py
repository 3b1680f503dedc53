"""What runs say of step times: the committed ones of an H200 and of live traffic."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfbench.capacity.measured import CPU, Source, times_of
from perfbench.errors import RunDirectoryError
from perfbench.methods.registry import METHODS
from perfbench.spec.arms import Arm

RESULTS = Path(__file__).parents[3] / "results"
H200 = [RESULTS / "h200" / name for name in ("verify-7b-q1", "verify-7b-q8")]


def arm(method: str, **options: int) -> Arm:
    return Arm(method, method, METHODS[method].options(**options))


def median(folder: Path, method: str, name: str) -> float:
    (found,) = (
        case["summary"][name]["median"]
        for case in json.loads((folder / "run.json").read_text(encoding="utf-8"))["cases"].values()
        if case["arm"] == method and case["summary"]
    )
    return float(found) / 1e3


def test_runs_give_the_steps_of_their_rows_and_a_line_through_their_first_tokens() -> None:
    found = times_of([Source.read(folder, "h200") for folder in H200], "llama2-7b", "bf16", arm("lora"), 64_000, 64e6)
    assert found is not None
    one, eight = (median(folder, "lora", "itl_ms") for folder in H200)
    assert found.steps == {1: one, 8: eight}
    assert found.read_s(274, 0, True) == pytest.approx(median(H200[0], "lora", "ttft_ms"))
    assert found.read_s(8 * 274, 0, True) == pytest.approx(median(H200[1], "lora", "ttft_ms")), "read side by side"
    assert found.load_s() == 0.001
    assert "runtime static, 1, 8 rows, prompts 274, new 32" in found.source


def test_an_arm_is_known_by_its_options_and_not_by_its_label() -> None:
    sources = [Source.read(H200[1], "h200")]
    other = times_of(sources, "llama2-7b", "bf16", arm("lora", rank=16), 64_000, 64e6)
    assert other is not None
    assert other.steps == {8: median(H200[1], "lora-16", "itl_ms")}
    assert times_of(sources, "llama2-7b", "bf16", arm("lora", rank=64), 64_000, 64e6) is None
    assert times_of(sources, "llama2-13b", "bf16", arm("lora"), 64_000, 64e6) is None
    assert times_of(sources, "llama2-7b", "fp16", arm("lora"), 64_000, 64e6) is None


def test_steps_over_weights_of_8_bits_are_not_those_of_full_ones() -> None:
    folder = RESULTS / "cpu-quantised"
    found = times_of([Source.read(folder, CPU)], "llama-110m", "fp32", arm("lora"), 600_000, None)
    cases = json.loads((folder / "run.json").read_text(encoding="utf-8"))["cases"]
    assert found is not None
    assert found.steps == {
        rows: cases[f"llama-110m-fp32-cpu/static/p32-n16-b1-q{rows}-t{rows}-r{rows}-distinct/lora-eager"]["summary"][
            "itl_ms"
        ]["median"]
        / 1e3
        for rows in (1, 4, 8)
    }


def test_live_traffic_goes_before_batches_and_knows_the_loads() -> None:
    traffic, batches = (Source.read(RESULTS / name, CPU) for name in ("cpu-traffic", "cpu-multitenant"))
    found = times_of([batches, traffic], "llama-256x8", "fp32", arm("lora"), 600_000, None)
    assert found is not None
    assert sorted(found.steps) == list(range(1, 9))
    assert 0 < found.load_s() < 0.001


def test_on_runtime_continuous_prompts_are_read_one_after_the_other() -> None:
    """Planted: 2 ms and 50 us a token for each prompt, 1 ms and 0.5 ms a row for each step."""
    workloads = [(rows, tokens) for rows in (1, 4, 8) for tokens in (16, 64)]
    comparisons = [
        {
            "backbone": "b", "dtype": "fp32", "runtime": "continuous", "case_ids": [str(place)],
            "workload": {"requests": rows, "tenants": rows, "prompt_tokens": tokens, "new_tokens": 9, "beams": 1},
            "roof": {"bytes_per_s": 1e9},
        }
        for place, (rows, tokens) in enumerate(workloads)
    ]  # fmt: skip
    cases = {
        str(place): {
            "status": "ok", "method": "none", "options": {},
            "summary": {"itl_ms": {"median": 1 + rows / 2}, "ttft_ms": {"median": rows * (2 + 0.05 * tokens)}},
        }
        for place, (rows, tokens) in enumerate(workloads)
    }  # fmt: skip
    source = Source(Path("run"), {"comparisons": comparisons, "cases": cases}, traffic=False)
    found = times_of([source], "b", "fp32", arm("none"), 0, None)
    assert found is not None
    assert [found.step_s(rows, 0, 0) for rows in (1, 2, 8)] == pytest.approx([1.5e-3, 2e-3, 5e-3])
    assert found.read_s(40, 0, False) == pytest.approx(4e-3)


def test_on_a_cpu_an_adapter_comes_at_the_speed_of_its_memory() -> None:
    source = Source.read(RESULTS / "cpu-multitenant", CPU)
    found = times_of([source], "llama-256x8", "fp32", arm("lora"), 600_000, None)
    assert found is not None
    assert sorted(found.steps) == [4]
    assert found.load_s() == 600_000 / source.manifest["comparisons"][0]["roof"]["bytes_per_s"]


def test_a_run_of_another_device_is_refused() -> None:
    with pytest.raises(RunDirectoryError, match=r"^--run .*q8: expected a run on h100, got one on h200$"):
        Source.read(H200[1], "h100")
    with pytest.raises(RunDirectoryError, match=r"expected a run on h100, got one on cpu$"):
        Source.read(RESULTS / "cpu-traffic", "h100")
    with pytest.raises(RunDirectoryError, match=r"was measured over HTTP, where nobody sees the turns of the server$"):
        Source.read(RESULTS / "cpu-vllm" / "vllm-fp32-1", CPU)

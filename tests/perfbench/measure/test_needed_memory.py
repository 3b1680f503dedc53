"""A run that can't fit into the machine's memory is refused before anything is loaded, unless a flag lifts it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.measure import needed_memory
from perfbench.run_folder.run_directory import RunDirectory
from perfbench.spec import backbone_config, cases, scenario

ROOT = Path(__file__).parents[3]
SCENARIO = """\
backbone: {backbone}
dtype: {dtype}
device: cpu
methods: [ia3, lora]
workload: {{prompt_tokens: 6, new_tokens: 3, beams: {beams}, requests: {requests}, tenants: 1, resident: {resident}}}
warmup: 1
repetitions: 1
"""


def written(folder: Path, **fields: Any) -> str:
    usual = {"backbone": "llama-tiny", "dtype": "fp32", "beams": 2, "requests": 2, "resident": 3}
    (folder / "x.yaml").write_text(SCENARIO.format(**(usual | fields)))
    return str(folder / "x.yaml")


def needed(file: str, *sets: str) -> needed_memory.Needed:
    (comparison,) = cases.expand(scenario.resolve(scenario.load(file, sets), "cpu"))
    return needed_memory.of_comparison(comparison, backbone_config.find_config(comparison.backbone))


def test_the_three_figures_are_those_counted_by_hand(tmp_path: Path) -> None:
    found = needed(written(tmp_path))
    q, kv, up, down = 64 + 64, 64 + 32, 64 + 172, 172 + 64
    of_a_tenant = 3 * 4 * (2 * q + 2 * kv + 2 * up + down)  # three layers, rank 4, seven modules
    assert found.arm == "lora"
    assert found.adapters == 4 * of_a_tenant * (3 + 1)
    assert found.cache == 4 * 3 * 2 * 2 * 16 * 2 * (6 + 2 * 2)  # layers, k and v, heads of 16, requests, tokens
    assert found.weights == 4 * backbone_config.parameter_count(backbone_config.NAMED_CONFIGS["llama-tiny"])
    assert found.bytes == found.adapters + found.cache + found.weights
    assert needed(written(tmp_path, dtype="bf16")).bytes * 2 == found.bytes


def test_weights_of_8_bits_count_as_such(tmp_path: Path) -> None:
    file = written(tmp_path)
    in_8_bits = needed(file, "quantisation=int8")
    linears = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 172) + 256 * 64
    outputs = 3 * (2 * 64 + 2 * 32 + 2 * 172 + 64) + 256
    assert needed(file).weights - in_8_bits.weights == 3 * linears - 4 * outputs
    assert in_8_bits.cache == needed(file).cache


def test_it_is_below_what_a_real_run_held_and_not_far() -> None:
    manifest = RunDirectory.open(ROOT / "results" / "cpu-multitenant").manifest
    for entry in manifest["comparisons"]:
        arms = {case["arm"]: case for case in manifest["cases"].values() if case["comparison"] == entry["id"]}
        config = backbone_config.find_config(entry["backbone"])
        assert 0 <= entry["backbone_bytes"] - backbone_config.parameter_count(config) * 4 < 1000  # of RoPE
        load = cases.Workload(**{k: v for k, v in entry["workload"].items() if k in cases.Workload.__annotations__})
        from perfbench.methods.registry import METHODS

        lora = cases.Case("x/lora", "lora", "lora", METHODS["lora"].options(), entry["runtime"], "eager")
        one = cases.Comparison("x", entry["backbone"], entry["dtype"], "cpu", entry["runtime"], load, (lora,))
        held = needed_memory.of_comparison(one, config)
        assert held.adapters == arms["lora"]["memory"]["adapter_bytes"]
        assert held.cache <= arms["lora"]["memory"]["kv_cache_bytes"] < 2 * held.cache


@pytest.mark.parametrize(
    ("fields", "most"),
    [({"backbone": "llama2-7b", "resident": 2}, "weights"), ({"resident": 400_000}, "adapters"),
     ({"requests": 3_000_000}, "keys and values")],
)  # fmt: skip
def test_a_run_that_can_t_fit_is_refused_in_a_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fields: dict[str, Any],
    most: str,
) -> None:
    monkeypatch.setattr(needed_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=8 * 2**30))
    file, out = written(tmp_path, **fields), tmp_path / "out"
    assert main(["validate", file]) == 0
    assert main(["run", file, "--dry-run"]) == 0
    assert main(["run", file, "--out", str(out)]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "x.yaml:1: llama" in last
    assert "expected at most the 8,192.0 MiB of memory of this machine, got " in last
    assert all(what in last for what in ("weights ", "adapters of ", "(lora)", "keys and values of "))
    assert last.endswith("or say --large")
    assert not out.exists()
    found = needed(file)
    assert max(vars(found), key=lambda part: -1 if part == "arm" else getattr(found, part)) in most.replace(
        "keys and values", "cache"
    )


def test_the_flag_lifts_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed_memory, "there_is", lambda kind: 1000)
    file, out = written(tmp_path), tmp_path / "out"
    assert main(["run", file, "--out", str(out)]) == 2
    assert main(["run", file, "--out", str(out), "--large"]) == 0


def test_what_may_be_used_counts_and_nothing_is_said_where_nothing_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needed_memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=100))
    for limit, found in ((None, 100), (40, 40), (400, 100)):
        monkeypatch.setattr(needed_memory.environment, "limits", lambda limit=limit: {"memory_bytes": limit})
        assert needed_memory.there_is("cpu") == found
    gpus = [SimpleNamespace(device_total_bytes=lambda size=size: size) for size in (24, None, 80)]
    monkeypatch.setattr(needed_memory.Nvml, "devices", lambda: gpus)
    assert needed_memory.there_is("cuda") == 80
    monkeypatch.setattr(needed_memory.Nvml, "devices", lambda: [])
    assert needed_memory.there_is("cuda") is None


def test_it_loads_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from perfbench.spec import cases, scenario; from perfbench.measure import needed_memory\n"
        f"s = scenario.resolve(scenario.load({written(tmp_path)!r}), 'cpu'); needed_memory.check(s, cases.expand(s))\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0

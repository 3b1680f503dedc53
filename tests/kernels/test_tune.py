"""The tuning command: what it tries is legal, its choice is the best, and without a GPU it says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="triton is not there for this platform")

from perfbench.kernels import settings, tune
from perfbench.kernels.decode_attention_triton import LEAST_SPLIT

SMALL = tune.Sizes(hidden=24, inner=20, heads=2, dim=6, rank=2, bottleneck=3, tokens=9)


def test_every_kernel_has_candidates_and_its_default_is_one() -> None:
    assert set(tune.CANDIDATES) == set(settings.DEFAULTS)
    for kernel, candidates in tune.CANDIDATES.items():
        assert settings.DEFAULTS[kernel] in candidates
        assert all(set(candidate) == set(settings.DEFAULTS[kernel]) for candidate in candidates)
        assert len(candidates) == len({tuple(candidate.items()) for candidate in candidates})
    # A block that reached past its split would count some tokens, or columns, twice.
    assert all(one["SPLIT_K"] % one["BLOCK_K"] == 0 for one in tune.CANDIDATES["low_rank.shrink"])
    assert all(LEAST_SPLIT % one["BLOCK_L"] == 0 for one in tune.CANDIDATES["decode_attention"])


def test_candidates_do_not_spill(compiling: Callable[..., str]) -> None:
    """All of them, launched as they are timed and compiled for the smallest of the GPUs."""
    program = (
        "from perfbench.kernels import settings, tune\nfrom perfbench.verify.on_device import resources\n"
        "from perfbench.kernels.ahead_of_time import fault\n"
        "for kernel, tried in tune.CANDIDATES.items():\n"
        "    for candidate in tried:\n"
        "        with settings.instead(kernel, '', candidate):\n"
        "            found = [fault(launch, 86) for launch in resources.launched(kernel)]\n"
        "        print(kernel, candidate, *filter(None, found), sep='|')\n"
    )
    lines = compiling(program).splitlines()
    assert len(lines) == sum(map(len, tune.CANDIDATES.values()))
    assert [line for line in lines if line.count("|") > 1] == []


@pytest.mark.interpreter
@pytest.mark.parametrize("kernel", tune.CANDIDATES)
def test_what_is_timed_runs_with_a_candidate_in_place_of_the_default(kernel: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = torch.cuda.get_device_name() if device == "cuda" else ""
    call = tune.Problems(2, SMALL, device, torch.float32).call(kernel)
    before = settings.setting(kernel, torch.device(device))
    with settings.instead(kernel, gpu, tune.CANDIDATES[kernel][-1]):
        assert settings.setting(kernel, torch.device(device)) == tune.CANDIDATES[kernel][-1]
        call()
    assert settings.setting(kernel, torch.device(device)) == before


def test_the_best_is_good_at_every_number_of_rows() -> None:
    # The second is never the fastest, and never far behind.
    assert tune.best({1: [1.0, 1.1, 3.0], 8: [5.0, 2.2, 2.0], 64: [9.0, 9.0, 9.0]}) == 1


def test_write_adds_a_gpu_and_keeps_the_others(tmp_path: Path) -> None:
    table = tmp_path / "settings.json"
    table.write_text('{"Other": {"row_scale": {"BLOCK": 512, "num_warps": 2}}}')
    tune.write("Mine", {"row_scale": {"BLOCK": 1024, "num_warps": 4}}, table)
    assert json.loads(table.read_text()) == {
        "Mine": {"row_scale": {"BLOCK": 1024, "num_warps": 4}},
        "Other": {"row_scale": {"BLOCK": 512, "num_warps": 2}},
    }
    assert list(tmp_path.iterdir()) == [table]


def test_the_whole_command_with_a_clock_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The timing alone is played; every table and line is the command's own."""
    table = tmp_path / "settings.json"
    table.write_text("{}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "A Card")

    def measure(kernel: str, gpu: str, time_ms: object) -> tune.Times:
        assert gpu == "A Card"
        count = len(tune.CANDIDATES[kernel])
        return {rows: [1.0] * (count - 1) + [0.5] for rows in tune.ROWS}

    monkeypatch.setattr(tune, "measure", measure)
    monkeypatch.setattr(tune.write, "__defaults__", (table,))
    assert tune.main(["--write"]) == 0
    said = capsys.readouterr().out
    assert all(kernel in said for kernel in tune.CANDIDATES)
    assert json.loads(table.read_text()) == {"A Card": {k: tried[-1] for k, tried in tune.CANDIDATES.items()}}


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = settings.TABLE.read_text()
    assert tune.main(["--write"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("tune: expected a CUDA device")
    assert said.err.count("\n") == 1
    assert settings.TABLE.read_text() == before


@pytest.mark.interpreter
def test_every_candidate_is_timed_at_every_number_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """On small sizes in the interpreter, without the graph that a GPU would replay."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here: the command itself times it")
    problems, kernel = tune.Problems, "row_scale"
    monkeypatch.setattr(tune, "Problems", lambda rows, *_: problems(rows, SMALL, "cpu", torch.float32))
    monkeypatch.setattr(tune, "captured", lambda call: call)
    monkeypatch.setattr(tune, "ROWS", (1, 2))
    seen = []

    def time_ms(call: Callable[[], object]) -> float:
        call()
        seen.append(settings.setting(kernel, torch.device("cpu")))
        return float(len(seen))

    times = tune.measure(kernel, "", time_ms)
    count = len(tune.CANDIDATES[kernel])
    assert seen == [*tune.CANDIDATES[kernel]] * 2
    assert times == {1: [float(i + 1) for i in range(count)], 2: [float(i + 1) for i in range(count, 2 * count)]}

"""`perfbench verify`: a planted fault fails it, what is skipped is named, and its two files say the same."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from perfbench.cli import main
from perfbench.errors import RunDirectoryError
from perfbench.kernels import residual_rmsnorm, row_scale
from perfbench.runtimes import backbone
from perfbench.runtimes.static.adapters import Adapters
from perfbench.runtimes.static.arm import StaticArm
from perfbench.verify import grid, verification, verify_report, worker
from perfbench.verify.on_device import kernels, peers, runtimes
from perfbench.verify.on_device.kernel_cases import CASES
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding

ROOT = Path(__file__).resolve().parents[3]
QUIET = Console(file=io.StringIO())
FAST = ("row_scale", "residual_rmsnorm")


class InThisProcess:
    """In place of `sections.Sections`."""

    def __init__(self, device: str, *, ahead: int):
        self.device = device

    def findings(self, section: str, seconds: float, late: Finding) -> Iterator[Finding]:
        return worker.findings(section, self.device)

    def close(self) -> None:
        pass

    close_all = close


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sections run in this process, and of them two kernels in plain torch, and no speeds."""
    monkeypatch.setattr(verification, "USUAL", ("kernels", "grid"))
    monkeypatch.setattr(verification, "Sections", InThisProcess)
    monkeypatch.setattr(kernels, "FORMS", ("eager",))
    monkeypatch.setattr(kernels, "CASES", tuple(case for case in CASES if case.kernel in FAST))
    monkeypatch.setattr(grid, "QUICK", ())
    monkeypatch.setattr(grid, "FULL", ())
    monkeypatch.setattr("perfbench.machine.device.device_kind", lambda wanted: ("cpu", "of a test"))


def read(out: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / verify_report.JSON).read_text())
    return found


def ignores_a_row(form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The adapter of the last row does nothing."""

    def run(residual: torch.Tensor, y: torch.Tensor, h: torch.Tensor, *rest: Any) -> torch.Tensor:
        h = h.clone()
        h[-1, -1] = 0
        return form(residual, y, h, *rest)

    return run


def shifts_slots(form: Callable[..., None]) -> Callable[..., None]:
    return lambda y, minus_one: form(y, minus_one.roll(1, 0))


def test_kernels_that_are_right_pass(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("PASSED on the CPU: 2 passed; nothing skipped")
    assert [finding["what"] for finding in read(tmp_path / "out")["sections"]["kernels"]["findings"]] == [
        "row_scale, eager", "residual_rmsnorm, eager",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("module", "plant", "name"),
    [(residual_rmsnorm, ignores_a_row, "residual_rmsnorm"), (row_scale, shifts_slots, "row_scale")],
)
def test_a_wrong_kernel_fails_it(
    here: None, module: Any, plant: Any, name: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setitem(module.FORMS, "eager", plant(module.FORMS["eager"]))
    assert main(["verify", "--out", str(tmp_path)]) == 1
    said = capsys.readouterr().out
    assert said.startswith("FAILED on the CPU: 1 passed; failed: kernels:")
    (failed,) = (one for one in read(tmp_path)["sections"]["kernels"]["findings"] if one["status"] == FAIL)
    assert failed["what"] == f"{name}, eager"
    assert "differs from fp64" in failed["finding"]


def test_a_kernel_that_can_not_be_run_fails_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no such image\nand more")

    monkeypatch.setitem(row_scale.FORMS, "eager", broken)
    cases = [case for case in CASES if case.kernel == "row_scale" and "eager" in case.forms]
    found = kernels.of_kernel("row_scale", "eager", "cpu", cases)
    assert found.status == FAIL
    assert "RuntimeError: no such image and 8 more" in found.finding


def test_without_triton_its_kernels_are_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_triton(name: str) -> Any:
        raise ImportError("planted")

    monkeypatch.setattr(kernels.importlib, "import_module", no_triton)
    monkeypatch.setattr(kernels, "FORMS", ("triton",))
    found = list(kernels.findings("cpu"))
    assert {one.status for one in found} == {SKIPPED}
    assert {one.finding for one in found} == {"triton can't be imported (planted); install triton"}


def test_what_is_skipped_is_named_and_nothing_done_is_no_success() -> None:
    findings = [vars(Finding("CUDA graph, eager", SKIPPED, "no CUDA graph on a CPU"))]
    found = report_of({"replay": findings})
    assert verify_report.exit_code(found) == 1
    assert verify_report.verdict(found).startswith("NOTHING VERIFIED")
    found = report_of({"replay": [*findings, vars(Finding("a step", PASS, "equal"))]})
    assert verify_report.exit_code(found) == 0
    assert verify_report.verdict(found) == "PASSED on a card: 1 passed; 1 skipped: replay: CUDA graph, eager"


def report_of(sections: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "schema_version": verify_report.SCHEMA_VERSION,
        "device": {"kind": "cuda", "name": "a card"},
        "full": False,
        "budget_s": 480.0,
        "environment": {
            "versions": {"perfbench": "0", "torch": "1", "triton": None},
            "kernel_settings": {"a card": "defaults"},
            "checkout": None,
        },
        "sections": {
            name: {"status": verify_report.status_of(findings), "seconds": 1.0, "findings": findings}
            for name, findings in sections.items()
        },
    }


def test_the_json_and_the_markdown_agree(tmp_path: Path) -> None:
    nasty = Finding("a | b", FAIL, "<script>x</script> | and\na line")
    findings = [vars(nasty), vars(Finding("c", PASS, "fine")), vars(Finding("d", SKIPPED, "no GPU"))]
    found = report_of({"kernels": findings, "peers": [vars(Finding("e", PASS, "1 ms"))]})
    verify_report.write(found, tmp_path)
    assert verify_report.read(tmp_path) == found
    text = (tmp_path / verify_report.MARKDOWN).read_text()
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == ["kernels", "kernels", "kernels", "peers"]
    assert [row[2] for row in rows] == [FAIL, PASS, SKIPPED, PASS]
    assert "<script>" not in text
    assert "defaults (a card)" in text
    assert text.startswith("**FAILED on a card: 2 passed; failed: kernels: a \\| b; 1 skipped: kernels: d**")


@pytest.mark.parametrize("wrong", [None, "x", 3, [], {"findings": [{}]}, {"findings": "x", "seconds": 1}], ids=repr)
def test_a_report_of_other_types_is_one_line(tmp_path: Path, wrong: Any) -> None:
    found = report_of({"kernels": [vars(Finding("c", PASS, "fine"))]})
    verify_report.write(found, tmp_path)
    file = tmp_path / verify_report.JSON
    for damaged in (found | {"sections": {"kernels": wrong}}, found | {"device": wrong}, found | {"sections": [wrong]}):
        file.write_text(json.dumps(damaged))
        with pytest.raises(RunDirectoryError) as refused:
            verify_report.read(tmp_path)
        assert "\n" not in str(refused.value)


def test_a_second_run_goes_on_where_the_first_one_failed(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    with monkeypatch.context() as planted:
        planted.setitem(row_scale.FORMS, "eager", shifts_slots(row_scale.FORMS["eager"]))
        assert main(["verify", "--out", out]) == 1
    assert main(["verify", "--out", out, "--resume"]) == 0
    monkeypatch.setitem(row_scale.FORMS, "eager", shifts_slots(row_scale.FORMS["eager"]))
    assert main(["verify", "--out", out, "--resume"]) == 0, "what has passed is not done again"
    for arguments, why in (
        (["--out", out], "expected a new or empty folder"),
        (["--out", out, "--resume", "--full"], "was begun with another --full"),
        (["--out", str(tmp_path / "none"), "--resume"], "has no verify.json"),
        (["--resume"], "say with --out"),
    ):
        capsys.readouterr()
        assert main(["verify", *arguments]) == 2
        said = capsys.readouterr().err
        assert why in said
        assert said.count("\n") == 1
    whole = json.loads((tmp_path / "out" / verify_report.JSON).read_text())
    section = {"seconds": 1, "findings": []}
    bad = (
        ("{", "can't be read"), ("[]", "expected schema_version"), ('{"schema_version": 1}', "is missing"),
        (json.dumps(whole | {"budget_s": "x"}), "budget_s: expected a number or null"),
        (json.dumps(whole | {"sections": {"kernels": section}}), "sections.kernels.status: is missing"),
        (json.dumps(whole | {"environment": {}}), "environment."),
    )  # fmt: skip
    for torn, why in bad:
        (tmp_path / "out" / verify_report.JSON).write_text(torn)
        assert main(["verify", "--out", out, "--resume"]) == 2
        assert why in capsys.readouterr().err


def test_what_was_cut_short_is_done_again() -> None:
    whole = {"status": PASS, "findings": [vars(Finding("a", PASS, ""))]}
    cut = {"status": PASS, "findings": [*whole["findings"], vars(Finding(verification.THE_REST, SKIPPED, ""))]}
    assert [verification.is_done(one) for one in (None, whole, cut, {**whole, "status": FAIL})] == [
        False, True, False, False,
    ]  # fmt: skip


def test_how_long_it_may_take(here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = (([], 120), (["--minutes", "3"], 180), (["--full"], None), (["--full", "--minutes", "9"], 540))
    for arguments, seconds in asked:
        out = tmp_path / "".join(arguments)
        assert main(["verify", "--out", str(out / "x"), *arguments]) == 0
        assert read(out / "x")["budget_s"] == seconds
        assert ("of at most" in capsys.readouterr().out) == (seconds is not None)


def test_the_interpreter_is_refused_on_a_gpu(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("perfbench.machine.device.device_kind", lambda wanted: ("cuda", "a card"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["verify", "--out", str(tmp_path / "out")]) == 2
    assert "unset it" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


# Runtimes.


@pytest.fixture
def two_methods(monkeypatch: pytest.MonkeyPatch) -> backbone.Backbone:
    monkeypatch.setattr(runtimes, "SERVED", ("none", "lora"))
    return backbone.load(runtimes.SHAPE, "fp32", "cpu", 0)


def statuses(findings: Iterator[Finding]) -> dict[str, str]:
    return {finding.what: finding.status for finding in findings}


def test_runtimes_pass_and_say_what_a_cpu_can_not(two_methods: backbone.Backbone) -> None:
    assert statuses(runtimes.replay("cpu")) == {
        "step of one size, no graph, eager, beams 1": PASS,
        "CUDA graph, eager, beams 1": SKIPPED,
        "step of one size, no graph, eager, beams 3": PASS,
        "CUDA graph, eager, beams 3": SKIPPED,
    }
    assert statuses(runtimes.against_generate("cpu")) == {
        "static eager, greedy": PASS,
        "static eager, beam 3": PASS,
    }
    assert len(statuses(runtimes.isolation("cpu"))) == 4
    assert set(statuses(runtimes.isolation("cpu")).values()) == {PASS}


def test_a_runtime_that_mixes_tenants_up_fails(two_methods: backbone.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    take = Adapters.take
    monkeypatch.setattr(Adapters, "take", lambda self, slots: take(self, [*slots[1:], slots[0]]))
    found = runtimes._isolated(two_methods, "static", StaticArm, "eager", 1)
    assert found.status == FAIL
    assert found.finding.startswith("lora: ")
    found = next(runtimes.against_generate("cpu"))
    assert found.status == FAIL
    assert "none: " not in found.finding


def test_a_replay_that_keeps_its_first_tenants_fails(
    two_methods: backbone.Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    def once(self: Adapters, slots: Any, take: Any = Adapters.take) -> None:
        if not getattr(self, "taken", False) or self.taken[0] is None:
            self.taken = (None,)  # type: ignore[attr-defined]
            take(self, (2, 0, -1, 2))

    monkeypatch.setattr(Adapters, "take", once)
    _, fault = runtimes._compare_replay(two_methods, "eager", 1, runtimes._run_again, "lora")
    assert "with other tenants the replayed step differs by" in (fault or "")


def test_an_arm_that_raises_is_a_finding(two_methods: backbone.Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any, **named: Any) -> Any:
        raise ValueError("x: expected another size\nmore")

    monkeypatch.setattr(StaticArm, "generate", refuse)
    found = runtimes._isolated(two_methods, "static", StaticArm, "eager", 1)
    assert found.status == FAIL
    assert "lora: ValueError: x: expected another size" in found.finding
    assert "more" not in found.finding


# Peers.

SMALL = peers.Sizes(64, 48, (3,), torch.float32, calls=1)


@pytest.fixture
def stage() -> peers.Stage:
    return peers.make_stage(SMALL, 3, "cpu")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.interpreter if "Punica" in name else ())
        for name in peers.PEERS
        if not name.startswith("torch.compile")
    ],
)
def test_every_peer_is_right_and_sees_shifted_slots(name: str, stage: peers.Stage) -> None:
    if "Punica" in name:
        pytest.importorskip("triton", reason="triton is not there for this platform")
    fault, _ = peers.judge(peers.PEERS[name], stage, peers.expected(stage), bare=name == "bare")
    assert fault is None


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_two_launches_in_sixteen_bits_with_a_row_without_adapter(dtype: torch.dtype) -> None:
    pytest.importorskip("triton", reason="triton is not there for this platform")
    from perfbench.verify.on_device import punica_triton

    stage = peers.make_stage(replace(SMALL, dtype=dtype), 3, "cpu")
    own = torch.tensor([3, -1, 3])
    y = torch.nn.functional.linear(stage.x, stage.weight)
    untouched = y[1].clone()
    expected = y.double()
    for row in (0, 2):
        ranks = (stage.a[3].double() @ stage.x[row].double()).view(peers.MODULES, 1, -1)
        expected[row] += (ranks @ stage.b[3].double()).flatten()
    punica_triton.add_low_rank(y, stage.x, stage.a, stage.b, own, {"SPLIT_K": 32, "BLOCK_K": 16}, {"BLOCK_N": 32})
    assert torch.equal(y[1], untouched)
    assert float(((y.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 1e-2


AHEAD_OF_TIME = """
import torch
from perfbench.kernels.ahead_of_time import fault, recording
from perfbench.verify.on_device import peers, punica_triton
stage = peers.make_stage(peers.SIZES["cuda"], 8, "cpu")
y = torch.empty(8, peers.MODULES * stage.b.shape[-1], dtype=stage.x.dtype)
for end in (0, -1):
    tried = punica_triton.SHRINK_CANDIDATES[end], punica_triton.EXPAND_CANDIDATES[end]
    with recording() as launches:
        punica_triton.add_low_rank(y, stage.x, stage.a, stage.b, stage.own, *tried)
    print(*(fault(launch, 86) for launch in launches))
"""


def test_the_baseline_s_kernels_do_not_spill(compiling: Callable[..., str]) -> None:
    """A sample of its candidates, compiled for the smallest of the GPUs: the baseline gets the care that ours get."""
    pytest.importorskip("triton", reason="triton is not there for this platform")
    assert compiling(AHEAD_OF_TIME).split() == ["None"] * 4


def test_peers_take_turns_and_the_ones_that_are_wrong_are_not_timed(
    stage: peers.Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(stage: peers.Stage) -> Callable[[], torch.Tensor]:
        return peers._bare(stage)  # without adapters

    def blind(stage: peers.Stage) -> Callable[[], torch.Tensor]:
        own = peers.make_stage(SMALL, 3, "cpu").own  # whatever it is told
        return peers._gather(replace(stage, own=own))

    def missing(stage: peers.Stage) -> Callable[[], torch.Tensor]:
        raise peers.UnavailableError("no compiler")

    ways = {
        "bare": peers._bare, peers.OURS: peers._ours, "wrong": wrong, "blind": blind, "missing": missing,
        "gather": peers._gather,
    }  # fmt: skip
    monkeypatch.setattr(peers, "PEERS", ways)
    monkeypatch.setattr(peers, "ROUNDS", 3)
    found = {finding.what.removeprefix("3 rows: "): finding for finding in peers._of_rows(stage, 1)}
    assert {name: finding.status for name, finding in found.items()} == {
        "bare": PASS, peers.OURS: PASS, "wrong": FAIL, "blind": FAIL, "missing": SKIPPED, "gather": PASS,
    }  # fmt: skip
    assert "differs from fp64" in found["wrong"].finding
    assert "with shifted slots it differs by" in found["blind"].finding
    assert found["missing"].finding == "no compiler"
    assert found["gather"].figures["times_ours"]["rounds"] == 3


def test_without_a_compiler_the_compiled_peer_is_skipped(stage: peers.Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_compiler(function: Any, **options: Any) -> Any:
        def call(*arguments: Any) -> None:
            raise RuntimeError("No working C++ compiler found\nand more")

        return call

    monkeypatch.setattr(torch, "compile", no_compiler)
    with pytest.raises(peers.UnavailableError, match=r"No working C\+\+ compiler found$"):
        peers._compiled(stage)


def test_what_is_compiled_is_right(stage: peers.Stage) -> None:
    """The function, as it is before it is compiled."""
    found = peers._functional(stage.x, stage.weight, stage.a[stage.own], stage.b[stage.own])
    expected = peers.expected(stage)
    assert float(((found.double() - expected).norm(dim=1) / expected.norm(dim=1)).max()) < 3e-6


# The grid.


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The cases of a committed run."""
    manifest = json.loads((ROOT / "results" / "cpu-multitenant" / "run.json").read_text())
    cases: dict[str, Any] = manifest["cases"]
    return cases


def test_a_measured_case_has_its_speed_and_what_it_kept(measured: dict[str, Any]) -> None:
    case = next(case for case in measured.values() if case["method"] == "lora" and "/static/" in case["id"])
    found = grid.of_case("a_scenario", case)
    assert found.status == PASS
    assert f"{case['summary']['decode_tokens_per_s']['median']:,.0f} tokens/s" in found.finding
    assert f"kept {case['kept']['decode_tokens_per_s']['ratio'] * 100:.1f}%" in found.finding


@pytest.mark.parametrize(
    ("status", "expected"),
    [
        ("pending", SKIPPED),
        ("out_of_memory", SKIPPED),
        ("check_failed", FAIL),
        ("check_void", FAIL),
        ("crashed", FAIL),
    ],
)
def test_a_case_without_a_speed_says_why(status: str, expected: str, measured: dict[str, Any]) -> None:
    case = {**next(iter(measured.values())), "status": status, "reason": "of a test", "summary": None}
    assert grid.of_case("a_scenario", case).status == expected


def test_the_speeds_end_with_the_time_and_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(grid.findings(("verify_7b",), "cpu", tmp_path, 1.0))[-1].status == SKIPPED
    assert not list(tmp_path.iterdir()), "too little time to begin"
    monkeypatch.setattr(grid, "LEAST_S", 0.0)
    cut = list(grid.findings(("verify_7b",), "cpu", tmp_path, 0.3))
    assert {finding.status for finding in cut} == {SKIPPED}
    assert len(cut) == 1 + 6
    whole = list(grid.findings(("verify_7b",), "cpu", tmp_path, None))
    assert [finding.status for finding in whole] == [SKIPPED] + [PASS] * 6
    assert "a small shape stands in" in whole[0].finding


def test_the_limit_of_time_is_lifted_afterwards() -> None:
    with pytest.raises(grid.OutOfTimeError), grid.time_limit(0.02):
        time.sleep(1)
    with grid.time_limit(0.05):
        pass
    time.sleep(0.1)


def test_the_scenarios_are_what_the_proof_asks_for() -> None:
    from perfbench.spec import cases, scenario

    def ids(name: str) -> list[str]:
        resolved = scenario.resolve(scenario.load(grid.SCENARIOS / f"{name}.yaml"), "cuda")
        return [case.id for comparison in cases.expand(resolved) for case in comparison.cases]

    quick = ids("verify_7b")
    assert len(quick) == 3 * 6
    assert all("llama2-7b-bf16-cuda/static/p274-n32-b1-q" in one and one.endswith("-triton") for one in quick)
    assert set(quick) <= set(ids("verify_full"))
    assert set(ids("verify_corners")) <= set(ids("verify_full"))

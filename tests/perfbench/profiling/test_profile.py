"""`perfbench profile`: which case it takes, what it writes, and what it refuses."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from perfbench.cli import main
from perfbench.errors import PerfbenchError, ScenarioError
from perfbench.profiling import profile
from perfbench.spec import cases, scenario
from perfbench.spec.cases import Comparison

ROOT = Path(__file__).resolve().parents[3]
SMOKE = ROOT / "scenarios" / "smoke.yaml"


@pytest.fixture(scope="module")
def comparisons() -> tuple[Comparison, ...]:
    return cases.expand(scenario.resolve(scenario.load(SMOKE, ["device=cpu"]), "cpu", "asked for"))


def test_an_id_or_a_pattern_that_fits_one_takes_the_case_and_its_bare_backbone(
    comparisons: tuple[Comparison, ...],
) -> None:
    wanted = comparisons[1].cases[2]
    for name in (wanted.id, "*b3*/fanlora-*"):
        chosen = profile.choose(comparisons, name)
        assert [case.arm for case in chosen.cases] == ["none", "fanlora"]
        assert chosen.cases[1] == wanted
    assert [case.arm for case in profile.choose(comparisons, "*b3*/none-*").cases] == ["none"]


def test_a_case_that_is_not_there_is_answered_with_the_nearest(comparisons: tuple[Comparison, ...]) -> None:
    wanted = comparisons[0].cases[1].id
    with pytest.raises(ScenarioError, match=f"did you mean '{wanted}'"):
        profile.choose(comparisons, wanted.replace("lora", "lroa"))
    with pytest.raises(ScenarioError, match="expected one case, this fits 16"):
        profile.choose(comparisons, "*")


def test_no_more_steps_than_the_case_has(comparisons: tuple[Comparison, ...]) -> None:
    assert profile.decode_steps(comparisons[0], 2) == 2
    assert profile.decode_steps(comparisons[0], 50) == 3
    with pytest.raises(ScenarioError, match="at most 64"):
        profile.decode_steps(comparisons[0], 65)


def test_what_a_profile_writes(profiled: tuple[Path, str]) -> None:
    out, _ = profiled
    found = json.loads((out / "profile.json").read_text())
    assert found["case"].endswith("/lora-eager")
    assert found["decode_steps"] == 2
    assert list(found["arms"]) == ["none-eager", "lora-eager"]
    assert not out.with_name("lora.unfinished").exists()
    for label, arm in found["arms"].items():
        assert arm["check"]["status"] == "ok"
        packed = (out / arm["trace"]).read_bytes()
        log = out / "tensorboard" / "plugins" / "profile" / label / "perfbench.pt.trace.json.gz"
        assert log.read_bytes() == packed
        events = json.loads(gzip.decompress(packed))["traceEvents"]
        marked = {event["name"] for event in events if event.get("cat") == "user_annotation"}
        arm_name = label.removesuffix("-eager")
        assert {f"{arm_name} / prefill", f"{arm_name} / decode step 2", "layer 0", "layer 0 / q"} <= marked
        timeline = json.loads((out / arm["memory"]).read_text())
        assert max(map(sum, zip(*timeline["bytes"].values(), strict=True))) == arm["peak_bytes"]
        assert (out / arm["memory_picture"]).read_text().startswith("<svg")


def test_the_difference_of_operations_is_that_of_the_exact_figures(profiled: tuple[Path, str]) -> None:
    """Three layers of seven linears take five operations each: two views, a transposition and two products."""
    found = json.loads((profiled[0] / "profile.json").read_text())["arms"]
    bare, lora = (found[label]["breakdown"]["decode step"] for label in ("none-eager", "lora-eager"))
    added = {kind: lora[kind]["operations"] - bare[kind]["operations"] for kind in bare if kind != "total"}
    assert {kind for kind, count in added.items() if count} == {"q", "k", "v", "o", "gate", "up", "down"}
    assert len(set(added.values())) == 2
    assert lora["total"]["operations"] - bare["total"]["operations"] == sum(added.values()) > 0


def test_the_answer_is_printed(profiled: tuple[Path, str]) -> None:
    _, said = profiled
    for expected in ("prefill, on the host", "decode step, on the host", "none ms", "lora ms", "total",
                     "A decode step takes", "no device: the host computes", "Peak memory"):  # fmt: skip
        assert expected in said


def test_a_folder_that_is_there_is_left_alone(profiled: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    out, _ = profiled
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    arguments = ["profile", str(SMOKE), "--set", "device=cpu", "--case", "*b1*/lora-eager", "--out", str(out)]
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("first", ["cat > /dev/null", "true"], ids=["reads its job", "dies at once"])
def test_a_child_that_dies_is_told_in_one_line_and_leaves_its_log(
    first: str, comparisons: tuple[Comparison, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in = tmp_path / "python"
    event = json.dumps({"event": "phase", "case": None, "text": "loading"})
    stand_in.write_text(f"#!/bin/sh\n{first}\necho '{event}'\necho 'no more memory' >&2\nkill -SEGV $$\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(profile.sys, "executable", str(stand_in))
    resolved = scenario.resolve(scenario.load(SMOKE, ["device=cpu"]), "cpu", "asked for")
    told: list[str] = []
    with pytest.raises(PerfbenchError, match=r"lora-eager: .*SIGSEGV; see .*out\.log") as error:
        profile.execute(resolved, profile.choose(comparisons, "*b1*/lora-eager"), 2, tmp_path / "out", told.append)
    assert "\n" not in str(error.value)
    assert told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.log", "python"]
    assert (tmp_path / "out.log").read_text() == "no more memory\n"


def test_a_case_that_fails_its_check_is_profiled_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tenants with one and the same adapter: shifted slots change nothing, so that the check is void."""
    from perfbench.methods import lora, parameters
    from perfbench.methods.lora import LoraOptions
    from perfbench.methods.shape import BackboneShape
    from perfbench.spec.backbone_config import find_config

    shape = BackboneShape.of_config(find_config("llama-tiny"))
    for tenant in ("a", "b"):
        values = parameters.make("lora", shape, LoraOptions(), seed=1)
        lora.save(values, shape, LoraOptions(), tmp_path / "adapters" / tenant, "llama-tiny")
    changes = ["device=cpu", "workload.beams=1", "workload.without_adapter=0", "workload.resident=2",
               f"methods=[{{lora: {{adapters: {tmp_path / 'adapters'}}}}}]"]  # fmt: skip
    monkeypatch.setattr(profile.environment, "threads", lambda: 1)
    sets = [part for change in changes for part in ("--set", change)]
    out = tmp_path / "out"
    code = main(["profile", str(SMOKE), *sets, "--case", "*/lora-eager", "--steps", "1", "--out", str(out)])
    said = capsys.readouterr()
    assert code == 1, said.err
    assert "WARNING: lora-eager did not pass its check" in said.out
    assert json.loads((out / "profile.json").read_text())["arms"]["lora-eager"]["check"]["status"] == "check_void"

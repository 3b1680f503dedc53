"""The commands: what each prints, where, and what it costs to ask."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from perfbench import exit_codes
from perfbench.cli import main

ROOT = Path(__file__).resolve().parents[2]
SCENARIOS = sorted((ROOT / "scenarios").glob("*.yaml"))


def ids(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    """The case ids that a dry run prints."""
    assert main(["run", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out.splitlines()


SMOKE = str(ROOT / "scenarios" / "smoke.yaml")


def test_a_dry_run_prints_the_ids_and_creates_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = ids(capsys, SMOKE, "--set", "device=cpu")
    assert len(found) == len(set(found)) == 2 * 8
    assert not list(tmp_path.iterdir())
    ids(capsys, SMOKE, "--set", "device=cpu", "--out", str(tmp_path / "out"))
    assert not list(tmp_path.iterdir())


def test_case_keeps_the_bare_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    found = ids(capsys, SMOKE, "--set", "device=cpu", "--case", "*b3*/para-*")
    assert [name.rsplit("/", 1)[1] for name in found] == ["none-eager", "para-eager"]
    assert all("-b3-" in name for name in found)


def test_set_is_told_aloud(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", SMOKE, "--set", "device=cpu", "--set", "workload.beams=1", "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "workload.beams" in said.err
    assert "[1, 3]" in said.err
    assert "-b3-" not in said.out


def test_every_shipped_scenario_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    assert SCENARIOS
    assert main(["validate", *map(str, SCENARIOS)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(": ok")[0] for line in lines] == list(map(str, SCENARIOS))


def test_validate_goes_on_after_a_bad_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(Path(SMOKE).read_text().replace("peft-single", "peft-singel"))
    assert main(["validate", str(bad), SMOKE]) == 2
    said = capsys.readouterr()
    assert "peft-single" in said.err
    assert f"{SMOKE}: ok" in said.out


def test_validate_without_a_file_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate"]) == 2
    assert "--schema" in capsys.readouterr().err


def test_the_schema_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out)["required"]


def test_list_names_every_method_and_scenario(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from perfbench.finetune.trained_table import trainable
    from perfbench.methods.registry import METHODS

    monkeypatch.setenv("COLUMNS", "120")
    assert main(["list"]) == 0
    said = capsys.readouterr().out
    assert all(name in said for name in METHODS)
    assert all(f" {name} " in said for name in trainable())
    files = [path.relative_to(ROOT / "scenarios") for path in (ROOT / "scenarios").rglob("*.yaml")]
    assert all(f" {path.with_suffix('').as_posix()} " in said for path in files)


def test_what_resumes_a_run_is_said_as_a_shell_takes_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from perfbench.finetune import recipe

    def interrupted(*args: object, **kwargs: object) -> None:
        (tmp_path / "my run" / "run.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "finetune", interrupted)
    file = ROOT / "scenarios" / "finetune" / "skills_para.yaml"
    words = ["finetune", str(file), "--set", "method={para: {rank: 2}}", "--out", str(tmp_path / "my run")]
    assert main(words) == 130
    said = capsys.readouterr().err.removeprefix("interrupted; go on with: ")
    assert shlex.split(said) == ["perfbench", *words, "--resume"]


def test_where_nothing_is_left_it_says_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from perfbench.finetune import recipe

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "finetune", interrupted)
    out = tmp_path / "gone"
    assert main(["finetune", str(ROOT / "scenarios" / "finetune" / "skills_para.yaml"), "--out", str(out)]) == 130
    assert capsys.readouterr().err == f"interrupted; {out} is not there, so there is nothing to go on with\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["--version"],
        ["run", "--help"],
        ["validate", *map(str, SCENARIOS)],
        ["list"],
        ["params"],
        ["run", SMOKE, "--set", "device=cpu", "--dry-run"],
        ["show", str(ROOT / "results" / "cpu-multitenant-1")],
        ["report", str(ROOT / "results" / "cpu-multitenant-1"), "--format", "csv"],
    ],
    ids=["help", "version", "run-help", "validate", "list", "params", "dry-run", "show", "report"],
)
def test_asking_does_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\n"
        "from perfbench.cli import main\n"
        "try:\n"
        "    code = main(sys.argv[1:])\n"
        "except SystemExit as leave:\n"
        "    code = leave.code\n"
        "sys.exit(code or ('torch' in sys.modules) * 99)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert process.returncode == 0, process.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "COMMAND"),
        (["rnu"], "unknown command 'rnu'; did you mean 'run'?"),
        (["fanlora", "serach"], "unknown command 'serach'; did you mean 'search'?"),
        (["show", "RUN", "--format", "jsno"], "--format: unknown value 'jsno'; did you mean 'json'?"),
        (["roof", "--dtype", "bf61"], "--dtype: unknown value 'bf61'; did you mean 'bf16'?"),
        (["list", "--plugn", "x.py"], "unknown option '--plugn'; did you mean '--plugin'?"),
        (["run", "a.yaml", "--resmue"], "unknown option '--resmue'; did you mean '--resume'?"),
        (["list", "a", "b"], "unexpected argument 'b'"),
        (["show", "RUN", "--format", "\x1b[31mx"], "unknown value '\\x1b[31mx'; known: csv"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_word_is_one_line_with_the_nearest(
    capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    with pytest.raises(SystemExit) as leave:
        main(arguments)
    assert leave.value.code == exit_codes.BAD_INPUT
    said = capsys.readouterr().err
    assert told in said
    assert said.startswith("perfbench")
    assert said.count("\n") == 1


def test_list_filters_by_a_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "FANLORA"]) == 0
    said = capsys.readouterr().out
    assert " fanlora " in said
    assert "squad" not in said.replace("squad_fanlora", "")
    assert main(["list", "no-such-word"]) == exit_codes.BAD_INPUT
    assert "nothing contains 'no-such-word'" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "code"), [("csv", 141), ("table", 1)], ids=["ours", "rich's"])
def test_a_reader_that_leaves_is_no_pass(form: str, code: int) -> None:
    """`perfbench show RUN | head` must not end with the 0 that a gate would take for a pass, nor with a traceback."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "perfbench", "show", "results/cpu-multitenant-1", "--format", form]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, timeout=60, cwd=ROOT)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, b"")


def test_show_of_no_run_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["show", str(tmp_path)]) == 2
    assert "not a run directory" in capsys.readouterr().err


def test_the_main_job_on_a_real_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, test_data: Path, stories260k: Path
) -> None:
    prompts = test_data / "mt_bench" / "question.jsonl"
    if not prompts.is_file():
        pytest.skip(f"needs real prompts: no {prompts}")
    changes = {
        "device": "cpu",
        "dtype": "fp32",
        "backbone": stories260k,
        "workload.prompts": prompts,
        "workload.prompt_tokens": 64,
        "repetitions": 2,
        "warmup": 1,
    }
    sets = [part for key, value in changes.items() for part in ("--set", f"{key}={value}")]
    out = tmp_path / "run"
    code = main(["run", str(ROOT / "scenarios" / "multitenant.yaml"), *sets, "--out", str(out)])
    said = capsys.readouterr()
    assert code == 0, said.err
    cases = json.loads((out / "run.json").read_text())["cases"].values()
    assert {case["method"] for case in cases} == {"none", "lora", "fanlora", "ia3", "para", "peft", "peft-single"}
    assert {case_id.split("/")[1] for case_id in (case["id"] for case in cases)} == {"transformers", "static"}
    assert all(case["check"]["passed"] and case["status"] == "ok" for case in cases)
    assert all(case["arm"] in said.out for case in cases)

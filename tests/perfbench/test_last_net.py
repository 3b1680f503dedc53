"""Whatever goes wrong is one line with an exit code that means no regression: user mistakes 2, our own faults 4."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.commands import params
from perfbench.errors import PerfbenchError
from perfbench.files.paths import expanded

SCENARIO = """\
question: {question}
backbone: {backbone}
dtype: fp32
device: cpu
runtime: static
methods: [{method}]
workload: {{prompts: {prompts}, prompt_tokens: 4, new_tokens: 2, requests: 2, tenants: 1}}
"""


def written(folder: Path, **fields: str) -> str:
    file = folder / "x.yaml"
    given = {"question": "x", "backbone": "llama-tiny", "method": "lora", "prompts": "null"} | fields
    text = SCENARIO.format(**given)
    file.write_text(text.replace("prompts: null, ", ""), encoding="utf-8")
    return str(file)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    """What stands on standard error, which has to be one clean line."""
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    assert text.rstrip("\n").isprintable()
    assert "Traceback" not in text
    return text


@pytest.mark.parametrize(
    "fault",
    [KeyError("type"), RecursionError("x"), MemoryError(), OSError(errno.EIO, "I/O"), ValueError("a\nb\x1b[31m")],
)
def test_a_fault_of_our_own_is_one_line_and_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fault: Exception
) -> None:
    def planted(*_: Any) -> None:
        raise fault

    monkeypatch.setattr(params, "table", planted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert main(["params"]) == 4
    line = said(capsys)
    assert line.startswith(f"perfbench: {type(fault).__name__}")
    file = re.search(r"the traceback is in (\S+)$", line)
    assert file is not None
    assert Path(file[1]).parent == tmp_path
    assert "in planted" in Path(file[1]).read_text()


def test_a_fault_whose_traceback_can_not_be_kept_is_told_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def planted(*_: Any) -> None:
        raise KeyError("type")

    monkeypatch.setattr(params, "table", planted)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "not there"))
    assert main(["params"]) == 4
    assert "traceback can't be kept (No such file or directory)" in said(capsys)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.ENAMETOOLONG])
def test_what_the_system_refuses_is_the_users_to_mend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    def planted(*_: Any) -> None:
        raise OSError(number, "No", "some/\x1bfile")

    monkeypatch.setattr(params, "table", planted)
    assert main(["params"]) == 2
    assert "some/\N{REPLACEMENT CHARACTER}file: No" in said(capsys)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"backbone": "~nosuchuser/x"}, "backbone ~nosuchuser/x: no user of that name"),
        ({"backbone": "x" * 300 + "/y"}, "longer than this system allows"),
        ({"prompts": "x" * 300 + ".txt"}, "x.yaml:7: workload.prompts: expected a file, got xxx"),
        ({"prompts": "~nosuchuser/x.txt"}, "x.yaml:7: workload.prompts: expected a file, got ~nosuchuser/x.txt: no"),
        ({"prompts": '"a\\0.txt"'}, "characters that none can have"),
        ({"method": "{lora: {adapters: ~nosuchuser}}"}, "x.yaml:6: methods.0.lora.adapters: expected a folder, got"),
        ({"method": f"{{fanlora: {{setting: {'x' * 300}}}}}"}, "x.yaml:6: methods.0.fanlora.setting: expected a file"),
        ({"method": f"{{lora: {{alpha: 1{'0' * 400}}}}}"}, "x.yaml:6: malformed YAML: expected a number of at most 64"),
        ({"method": '{lora: {label: "lo\\n"}}'}, "x.yaml:6: methods.0.lora.label: expected a name of at most 40"),
        ({"question": '"\\ud800"'}, "x.yaml:1: malformed YAML: half of a surrogate pair"),
        ({"question": '{"\\udfff": 1}'}, "x.yaml:1: malformed YAML: half of a surrogate pair"),
        ({"question": "[" * 40 + "]" * 40}, "at most 32 levels of nesting"),
        ({"question": "[" * 5000 + "]" * 5000}, "nest"),
    ],
)
def test_mistakes_in_a_scenario_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, str], words: str
) -> None:
    assert main(["validate", written(tmp_path, **fields)]) == 2
    assert words in said(capsys)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ({"rope_parameters": "x"}, "config.json: rope_parameters: expected an object or null, got 'x'"),
        ({"rope_scaling": [1]}, "config.json: rope_scaling: expected an object or null, got [1]"),
        ("[" * 100_000, "nested too deeply"),
        ('{"hidden_size": 1' + "0" * 5000 + "}", "a number that can't be read"),
    ],
)
def test_mistakes_in_a_backbones_config_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: Any, words: str
) -> None:
    from perfbench.spec.backbone_config import NAMED_CONFIGS

    config = json.dumps(NAMED_CONFIGS["llama-tiny"] | text) if isinstance(text, dict) else text
    (tmp_path / "config.json").write_text(config)
    (tmp_path / "model.safetensors").touch()
    assert main(["validate", written(tmp_path, backbone=str(tmp_path))]) == 2
    assert words in said(capsys)


def test_an_accuracy_file_without_a_backbone_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "accuracy.yaml"
    file.write_text("methods: [lora]\ntasks: [{name: skills}]\nmargin: 0.05\n")
    assert main(["accuracy", str(file)]) == 2
    assert "accuracy.yaml:1: backbone: is missing; expected a string" in said(capsys)


def test_thousands_of_unknown_keys_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "many.yaml"
    file.write_text("".join(f"key{number}: 1\n" for number in range(20_000)))
    assert main(["validate", str(file)]) == 2
    assert "many.yaml:1: key0: unknown key 'key0'" in said(capsys)


@pytest.mark.parametrize("command", [["validate"], ["run", "--dry-run"]])
def test_what_a_terminal_obeys_is_not_printed_of_a_scenario(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    from perfbench.spec.backbone_config import NAMED_CONFIGS

    backbone = tmp_path / "x\x1b[31m\u202e"
    backbone.mkdir()
    (backbone / "config.json").write_text(json.dumps(NAMED_CONFIGS["llama-tiny"]))
    (backbone / "model.safetensors").touch()
    for name in (str(backbone), "\u202e"):
        code = main([*command, written(tmp_path, backbone=json.dumps(name))])
        assert code == 0 or name == "\u202e"
        both = "".join(capsys.readouterr())
        assert all(line.isprintable() for line in both.splitlines())


def test_an_error_quotes_whatever_came_in_one_short_line() -> None:
    assert str(PerfbenchError("a\n\x1b[31m\u202e\ud800b")) == "a \ufffd[31m\ufffd\ufffdb"
    assert str(PerfbenchError("x.yaml:1: écrit\u00a0ici")) == "x.yaml:1: écrit ici"
    long = str(PerfbenchError(f"x.yaml:1: {'y' * 200_000}; did you mean 'z'?"))
    assert len(long) < 1600
    assert long.startswith("x.yaml:1: y")
    assert long.endswith("y; did you mean 'z'?")


def test_paths_that_can_be_are_left_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expanded("~/a") == tmp_path / "a"
    assert expanded("a/b") == Path("a/b")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(PerfbenchError, match="lead in a circle"):
        expanded(str(tmp_path / "loop"))

"""`show` and `report` of an accuracy run from its folder alone: packed or not, without the adapters."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main

STORED = Path(__file__).parents[4] / "results" / "cpu-accuracy"


@pytest.fixture(params=["packed", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The stored run, which has no adapters."""
    path = tmp_path / "run"
    shutil.copytree(STORED, path)
    assert not list(path.rglob("*.safetensors"))
    if request.param == "plain":
        (path / "items.jsonl").write_bytes(gzip.decompress((path / "items.jsonl.gz").read_bytes()))
        (path / "items.jsonl.gz").unlink()
    return path


def test_show_prints_the_verdict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = json.loads((folder / "accuracy.json").read_text())
    assert main(["show", str(folder)]) == manifest["verdict"]["exit_code"]
    said = capsys.readouterr().out
    assert manifest["question"] in said
    assert "FAIL. Worse than lora by more than 5 points: ia3 (skills, as-trained-fp32)." in said
    assert all(f"\n{row['method']} " in said for row in manifest["verdict"]["methods"])


def test_report_writes_its_page(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "page.html"
    assert main(["report", str(folder), "--out", str(out)]) == 0
    assert "Do FanLoRA, (IA)3 and PARA learn" in out.read_text(encoding="utf-8")
    for arguments, said in (
        ([str(folder), "--format", "csv"], "--format: expected html"),
        ([str(folder), str(STORED)], "is an accuracy run, whose page is its own"),
    ):
        assert main(["report", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_what_is_damaged_or_unfinished_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run"
    shutil.copytree(STORED, path)
    packed = path / "items.jsonl.gz"
    whole = packed.read_bytes()
    lines = gzip.decompress(whole).splitlines(keepends=True)
    for content, said in (
        (whole[:-100], "can't be unpacked"),
        (b"no gzip", "can't be unpacked"),
        (gzip.compress(b"".join(lines[:-5])), "expected"),
    ):
        packed.write_bytes(content)
        assert main(["show", str(path)]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    packed.write_bytes(whole)
    manifest = json.loads((path / "accuracy.json").read_text())
    del manifest["paths"]["skills"]["as-trained-fp32"]["para"]
    (path / "accuracy.json").write_text(json.dumps(manifest))
    assert main(["show", str(path)]) == 2
    assert "not finished: skills: para did not answer yet" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (
            "config.entries.0.finetune.epochs",
            "x",
            "config.entries.0.finetune.epochs: expected an integer >= 1, got 'x'",
        ),
        ("config.entries.0.finetune.task", {}, "config.entries.0.finetune.task.name: is missing"),
        ("left_out.0.reason", None, "left_out.0.reason: expected a string"),
        ("adapters.skills.lora.0.trainable_parameters", "7", "trainable_parameters: expected an integer >= 0"),
        ("adapters.skills.lora", {}, "not finished: skills: lora did not answer yet"),
    ],
)
def test_what_the_page_shows_is_checked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str, value: Any, said: str
) -> None:
    path = tmp_path / "run"
    shutil.copytree(STORED, path)
    manifest = around = json.loads((path / "accuracy.json").read_text())
    *way, last = (int(step) if step == "0" and "adapters" not in place else step for step in place.split("."))
    for step in way:
        around = around[step]
    around[last] = value
    (path / "accuracy.json").write_text(json.dumps(manifest))
    assert main(["report", str(path), "--out", str(tmp_path / "page.html")]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

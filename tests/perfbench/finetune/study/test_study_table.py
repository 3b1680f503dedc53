"""The table and the picture say what study.json says, and study.json is read strictly."""

from __future__ import annotations

import copy
import io
import json
import xml.etree.ElementTree as tree
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.cli import main
from perfbench.errors import RunDirectoryError
from perfbench.finetune.study import study_folder, study_table


@pytest.fixture
def manifest(done: Path) -> dict[str, Any]:
    found = study_folder.read(done)
    found["rows"][0]["cells"] = {
        "tuned.test": [50.0, 54.0, 52.0],
        "tuned.dev_loss": [2.5],
        "tuned.parameters": [1234.0, 1234.0],
        "kept.modules": [2.0],
        "kept.likeness": [],
    }
    return found


def test_the_table_in_markdown(manifest: dict[str, Any]) -> None:
    lines = study_table.markdown(manifest)
    assert lines[0] == (
        "|  | test % | dev loss | parameters | modules | Spearman to the search's first score | the paper |"
    )
    assert lines[2] == "| k_max 1, rank 2 | 52.0 (50.0 to 54.0) | 2.500 | 1,234 | 2 | - | - |"
    assert lines[3].endswith("| 87.9 |")
    assert "best with K_max 2" in study_table.notes(manifest)[1]


def test_the_terminal_is_not_overrun(manifest: dict[str, Any]) -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    study_table.render(manifest, console)
    table = [line for line in console.export_text().splitlines() if "k_max" in line or "──" in line]
    assert table
    assert all(len(line) <= 80 for line in table)


def test_the_picture_has_a_panel_for_each_column_and_the_paper(manifest: dict[str, Any]) -> None:
    root = tree.fromstring(study_table.picture(manifest))
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for one in manifest["columns"].values():
        assert one["title"] in texts
    assert {"the paper: accuracy, %", "k_max 1, rank 2", "k_max 2, rank 1"} <= set(texts)
    tips = [element.text for element in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "52.0 (50.0 to 54.0)" in tips
    hostile = copy.deepcopy(manifest)
    hostile["rows"][0]["label"] = "</svg><script>"
    tree.fromstring(study_table.picture(hostile))


def test_it_is_shown_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["show", str(done)]) == 0
    assert "k_max 2, rank 1" in capsys.readouterr().out
    assert main(["show", str(done), "--format", "markdown"]) == 0
    assert capsys.readouterr().out.startswith("|  | test % |")
    assert main(["show", str(done), "--format", "csv"]) == 2
    assert "expected table or markdown" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda found: found.pop("rows"), "rows: is missing"),
        (lambda found: found["rows"][0]["cells"].update({"tuned.test": ["much"]}), "expected a number, got 'much'"),
        (lambda found: found.update(kind="run"), "expected a study of schema 1"),
        (lambda found: found.update(schema_version=2), "expected a study of schema 1"),
        (lambda found: found["columns"]["tuned.test"].update(form="1000000000d"), "columns.tuned.test.form"),
    ],
)
def test_what_no_study_wrote_is_refused(done: Path, tmp_path: Path, damage: Any, said: str) -> None:
    found = study_folder.read(done)
    damage(found)
    (tmp_path / "study.json").write_text(json.dumps(found))
    with pytest.raises(RunDirectoryError) as refused:
        study_folder.read(tmp_path)
    assert said in str(refused.value)
    (tmp_path / "study.json").write_text('{"kind": NaN}')
    with pytest.raises(RunDirectoryError, match="not valid JSON"):
        study_folder.read(tmp_path)

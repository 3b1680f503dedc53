"""A format is one function and one line: `show`, `report`, `history` and `gate` take the same ones."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.report import formats
from perfbench.report.table import RunTable, render
from perfbench.report.tables import Column, grid, markdown, pieces
from perfbench.run_folder.run_directory import RunDirectory

REAL = Path(__file__).parents[3] / "results" / "cpu-multitenant-1"
COMMANDS = (
    ("show", str(REAL)),
    ("report", str(REAL)),
    ("report", str(REAL), "--samples"),
    ("history", str(REAL), "--figure", "itl_p95_ms"),
)


def commands(folder: Path) -> list[list[str]]:
    return [[*one, *(("--store", str(folder / "store")) if one[0] == "history" else ())] for one in COMMANDS]


def gated(folder: Path, name: str) -> tuple[int, Path]:
    file = folder / "gated"
    arguments = ["gate", "--baseline", str(REAL), "--candidate", str(REAL), "--exact-only", "--write", f"{name}={file}"]
    return main(arguments), file


def test_a_format_of_one_line_is_accepted_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def count(subject: formats.Subject) -> str:
        """How many rows there are, and their first field."""
        found = subject.records()
        return f"{len(found)} rows, first {next(iter(found[0]))}\n"

    monkeypatch.setitem(formats.FORMATS, "count", count)
    said = []
    for arguments in commands(tmp_path):
        assert main([*arguments, "--format", "count"]) == 0
        said.append(capsys.readouterr().out)
    assert said == [
        "12 rows, first comparison\n", "12 rows, first run\n", "1200 rows, first run\n", "12 rows, first figure\n"
    ]  # fmt: skip
    code, file = gated(tmp_path, "count")
    assert code == 0
    assert file.read_text().endswith(" rows, first kind\n")
    with pytest.raises(SystemExit):
        main(["show", "--help"])
    assert "html, count" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("name", ["table", "markdown", "csv", "json", "html"])
def test_every_command_gives_every_format(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(tmp_path):
        out = ["--out", str(tmp_path / "out")] if arguments[0] == "report" else []
        code = main([*arguments, *out, "--format", name])
        if "--samples" in arguments and name in ("table", "markdown", "html"):
            assert code == 2
            assert "this format shows figures of cases" in capsys.readouterr().err
            continue
        assert code == 0
        text = (tmp_path / "out").read_text() if out else capsys.readouterr().out
        assert_is(name, text)
    code, file = gated(tmp_path, name)
    assert code == 0
    assert_is(name, file.read_text())


def assert_is(name: str, text: str) -> None:
    """Whether `text` is what a reader of that format takes."""
    if name == "csv":
        assert len(list(csv.DictReader(io.StringIO(text)))) >= 12
    elif name == "json":
        assert json.loads(text)
    elif name == "html":
        assert text.startswith("<!doctype html>")
    elif name == "markdown":
        assert "| --- |" in text
    else:
        assert any(word in text for word in ("───", "run(s)", "PASS"))


def test_another_word_is_answered_with_the_nearest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(tmp_path):
        with pytest.raises(SystemExit, match="2"):
            main([*arguments, "--format", "markdwon"])
        assert "--format: unknown value 'markdwon'; did you mean 'markdown'" in capsys.readouterr().err
    assert gated(tmp_path, "markdwon")[0] == 2
    assert "unknown format 'markdwon'; did you mean 'markdown'" in capsys.readouterr().err
    assert main(["show", str(REAL), "--columns", "tials"]) == 2
    shown = capsys.readouterr()
    assert "--columns: unknown column 'tials'; did you mean 'tails'" in shown.err
    assert shown.out == "", "nothing of the table is printed before the refusal"


def test_bytes_are_not_written_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = RunTable(RunDirectory.open(REAL).manifest)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setitem(formats.FORMATS, "bytes", lambda _: b"PAR1")
    with pytest.raises(PerfbenchError, match="--format bytes: not for a terminal"):
        formats.put(subject, "bytes")
    assert "\x1b" not in formats.rendered(subject, "table"), "colours in a file"


# The tables themselves.

ROWS = ({"name": "a", "n": 1}, {"name": "b|c", "n": 22})


def of(key: str, **how: Any) -> Column:
    return Column(key, lambda row: str(row[key]), **how)


def test_one_table_serves_the_terminal_and_markdown() -> None:
    columns = [of("name", text=True), of("n")]
    assert markdown(columns, ROWS) == ["| name | n |", "| --- | ---: |", "| a | 1 |", "| b\\|c | 22 |"]
    console = Console(file=io.StringIO(), width=40)
    console.print(grid(columns, ROWS, "[b]T"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "[b]T" in text
    assert "b|c   22" in text


@pytest.mark.parametrize("width", [20, 30, 40, 80])
def test_a_narrow_terminal_gets_several_tables_each_with_names_and_verdict(width: int) -> None:
    columns = [of("name", text=True), *(Column(f"figure{n}", lambda _: "123456") for n in range(6)), of("n", text=True)]
    found = pieces(columns, ROWS, width)
    assert all(one[0] is columns[0] and one[-1] is columns[-1] for one in found)
    assert [column for one in found for column in one[1:-1]] == columns[1:-1]
    for one in found:
        console = Console(file=io.StringIO(), width=width)
        console.print(grid(one, ROWS), width=width)
        assert console.file.getvalue().count("123456") == 2 * (len(one) - 2)  # type: ignore[attr-defined]


def test_at_80_columns_every_figure_and_the_check_are_there() -> None:
    console = Console(file=io.StringIO(), width=80)
    render(RunDirectory.open(REAL).manifest, "table", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(map(len, text.splitlines())) <= 80
    heads = " ".join(line for line in text.splitlines() if line.startswith("arm "))
    assert heads.count("check") == 4
    for figure in ("3,397", "37.5 [36.8, 38.5]", "610.0 KiB"):
        assert figure in text

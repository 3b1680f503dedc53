"""Names and reasons come from files that others wrote: nothing in them moves a cursor, opens a link or asks anybody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from perfbench.cli import main
from perfbench.files.plain_text import one_line, printable, printable_tree
from perfbench.report.tables import plain
from perfbench.run_folder.run_directory import MANIFEST, SAMPLES

RESULTS = Path(__file__).parents[3] / "results"
REAL = RESULTS / "cpu-chat-turns"
HOSTILE = "\x1b[31mred\x1b]0;title\x07 \u202e [x](javascript:alert(1)) ![y](http://evil/x.png) @everyone www.evil.org"
HOSTILE += " [z]: http://evil <img src=x> `</code>` a\nb ::error::x \u2028"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two  spaces", "two  spaces"),
        ("a\nb\tc", "a b c"),
        ("\x1b[31mred", "\N{REPLACEMENT CHARACTER}[31mred"),
        ("\u202eleft \ud800", "\N{REPLACEMENT CHARACTER}left \N{REPLACEMENT CHARACTER}"),
        ("Ångström 日本語 😀", "Ångström 日本語 😀"),
    ],
)
def test_what_a_terminal_obeys_is_replaced(text: str, shown: str) -> None:
    assert printable(text) == shown
    tree = {text: [text, 1, None, {"a": text}]}
    assert json.dumps(printable_tree(tree)).replace("\\n", " ") == json.dumps({shown: [shown, 1, None, {"a": shown}]})


def test_runners_of_github_are_told_nothing() -> None:
    assert one_line("::error::x ##[error]") == ": :error::x # #[error]"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("88.5 [85.7, 90.9]", "88.5 [85.7, 90.9]"),
        ("Xeon @ 2.60GHz (tm)", "Xeon @ 2.60GHz (tm)"),
        ("[x](javascript:y)", "[x]\\(javascript:y)"),
        ("![x](y)", "![x]\\(y)"),
        ("[a][b] [b]: c", "[a]\\[b] [b]\\: c"),
        ("http://x www.y @z", "http:\u200b//x www\u200b.y @\u200bz"),
        ("`a` | <b>", "\\`a\\` \\| &lt;b>"),
        ("a\n\n[b]: c", "a [b]\\: c"),
    ],
)
def test_markdown_shows_it_literally(text: str, shown: str) -> None:
    assert plain(text) == shown


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A real run in which every free text is hostile."""
    run = tmp_path / f"run{chr(27)}[31m"
    shutil.copytree(REAL, run)
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["scenario"].update(name=HOSTILE, question=HOSTILE, notes=[HOSTILE])
    manifest["environment"]["cpu"]["model"] = manifest["environment"]["os"] = HOSTILE
    manifest["environment"]["checkout"]["commit"] = HOSTILE
    for comparison in manifest["comparisons"]:
        comparison["backbone"] = comparison["workload"]["tenant_mix"] = HOSTILE
    for case in manifest["cases"].values():
        case["reason"] = HOSTILE
        if case["method"] != "none":
            case["arm"] = HOSTILE
    text = json.dumps(manifest).replace("llama-", json.dumps(HOSTILE)[1:-1])
    (run / MANIFEST).write_text(text)
    samples = (run / SAMPLES).read_text().replace("llama-", json.dumps(HOSTILE)[1:-1])
    (run / SAMPLES).write_text(samples)
    return run


@pytest.mark.parametrize(
    "command",
    [
        ["show"],
        ["show", "--format", "markdown"],
        ["show", "--format", "csv"],
        ["show", "--format", "json"],
        ["report", "--format", "markdown"],
        ["report", "--format", "csv"],
        ["report", "--format", "csv", "--samples"],
        ["history"],
        ["history", "--format", "csv"],
        ["compare", "--exact-only"],
    ],
    ids=" ".join,
)
def test_no_command_prints_what_a_terminal_obeys(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    name, *more = command
    if name == "history":
        more += ["--store", str(tmp_path / "store.sqlite")]
    runs = [str(hostile)] * (2 if name == "compare" else 1)
    main([name, *runs, *more])
    said = capsys.readouterr()
    assert said.out
    for text in (said.out, said.err):
        assert all(line.isprintable() or "\u200b" in line for line in text.split("\n")), name
        assert not set("\x1b\x07\u202e\u2028") & set(text)
    if "markdown" in command:
        assert "](" not in said.out
        assert "://" not in said.out
        assert "]:" not in said.out
        assert "<img" not in said.out
        assert "@everyone" not in said.out


def test_a_page_of_hostile_names_is_made(hostile: Path, tmp_path: Path) -> None:
    assert main(["report", str(hostile), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    assert "<img src=x" not in page
    assert "\x1b" not in page


def test_a_fine_tunings_table_is_as_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest: Any = json.loads((RESULTS / "cpu-accuracy" / "skills" / "lora" / MANIFEST).read_text())
    manifest["config"].update(question=HOSTILE, method=HOSTILE, backbone="[bold red]x[/nope]")
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert main(["show", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said
    assert "[bold red]x[/nope]" in said

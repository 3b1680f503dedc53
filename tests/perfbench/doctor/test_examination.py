"""The doctor as it is called: on this machine, and where no package is installed at all."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from perfbench.doctor import examination
from perfbench.doctor.check import Check

ROOT = Path(__file__).parents[3]


def shown(found: list[Check]) -> str:
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        console = Console(width=400, record=True, file=nowhere)
        console.print(examination.render(found))
    return console.export_text()


def test_this_machine_can_run_the_tests() -> None:
    found = examination.checks()
    assert [check for check in found if check.status == "missing"] == []
    names = [check.name for check in found]
    assert {"python", "torch", "transformers", "peft", "cuda", "nvml", "memory", "disk", "hub"} <= set(names)
    assert len(names) == len(set(names))
    assert all(check.remedy for check in found if check.status != "ok" and "bf16" not in check.finding)
    assert "\n" not in "".join(check.finding + check.remedy for check in found)
    for text in (shown(found), examination.plain(found)):
        assert all(name in text for name in names)


@pytest.fixture(scope="module")
def bare() -> subprocess.CompletedProcess[str]:
    """`perfbench doctor` in a Python without any package: -S leaves out site-packages, -E what else is on the path."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['perfbench', 'doctor']\n"
        "from perfbench.cli import main\nsys.exit(main())"
    )
    return subprocess.run([sys.executable, "-S", "-E", "-c", code], capture_output=True, text=True, cwd="/")


def test_without_any_package_it_names_them_all(bare: subprocess.CompletedProcess[str]) -> None:
    assert bare.returncode == 1
    assert bare.stderr == ""
    for name in ("torch", "transformers", "peft", "psutil", "rich", "packaging", "jsonschema", "PyYAML", "Jinja2"):
        assert f"missing  {name} " in bare.stdout
    assert "-> pip install 'torch>=2.11,<2.14'\n" in bare.stdout
    assert "This machine can't run perfbench yet: mend torch, " in bare.stdout
    assert "All packages at once: pip install 'torch>=2.11,<2.14' 'transformers" in bare.stdout


def test_without_any_package_it_says_what_it_skips(bare: subprocess.CompletedProcess[str]) -> None:
    assert "skipped: it needs torch, which is not installed" in bare.stdout
    assert "skipped: it needs psutil, which is not installed" in bare.stdout
    # A warning in a plain checkout, nothing where an editable install has left its name beside the code.
    assert "missing  perfbench" not in bare.stdout


def test_without_rich_it_prints_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "rich.console", None)
    examination.show([Check("a", "ok", "fine"), Check("much longer", "missing", "gone", "mend it")])
    assert capsys.readouterr().out.splitlines() == [
        "ok       a            fine",
        "missing  much longer  gone",
        "                      -> mend it",
        "",
        "This machine can't run perfbench yet: mend much longer.",
    ]


def test_text_from_the_machine_is_not_markup() -> None:
    text = shown([Check("a [b]", "warn", "a GPU called [/bold] [red]x", "see [link]")])
    assert "a [b]" in text
    assert "a GPU called [/bold] [red]x" in text
    assert "see [link]" in text


def test_the_verdict_and_the_exit_code() -> None:
    states: tuple[Any, ...] = ("ok", "warn", "missing")
    ok, warn, missing = (Check(status, status, "") for status in states)
    assert examination.verdict([ok]) == "This machine can run perfbench."
    assert examination.verdict([ok, warn]) == "This machine can run perfbench; read what is said of warn."
    assert examination.verdict([ok, warn, missing]) == "This machine can't run perfbench yet: mend missing."
    assert [examination.exit_code(found) for found in ([ok], [ok, warn], [ok, missing])] == [0, 0, 1]


def test_several_packages_are_one_command() -> None:
    one, other = (Check(name, "missing", "", f"pip install '{name}>=1'") for name in ("one", "other"))
    assert examination.closing([one]) == ["This machine can't run perfbench yet: mend one."]
    assert examination.closing([one, other])[1] == "All packages at once: pip install 'one>=1' 'other>=1'"

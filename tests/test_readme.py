"""README keeps its word: its length, its two commands, and what CI runs. Its tables are in test_docs.py."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
LONGEST_WORDS = 700


def commands_of(readme: str) -> list[str]:
    """The lines of the first ```sh block, which has to stand on the first screen."""
    block = re.search(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no ```sh block"
    return block[1].splitlines()


def ci_test_command(root: Path) -> str:
    """The command that .ci/run in `root` would run."""
    done = subprocess.run([root / ".ci" / "run", "--print"], capture_output=True, text=True, check=True, cwd="/")
    return done.stdout.removesuffix("\n")


@pytest.fixture(scope="module")
def readme() -> str:
    return README.read_text(encoding="utf-8")


def test_there_are_two_commands_of_one_line_each(readme):
    run, test = commands_of(readme)
    assert run.endswith(" && .venv/bin/perfbench run scenarios/multitenant.yaml")
    assert re.search(r" && \.venv/bin/(python -m )?pytest$", test)
    for command in (run, test):
        assert command.startswith("python3 -m venv .venv && ")
        assert re.search(r"\.venv/bin/(python -m )?pip install .*-c constraints\.txt ", command)
        assert not command.endswith("\\")


def test_readme_is_short(readme):
    assert len(readme.split()) <= LONGEST_WORDS


def test_what_it_is_comes_first_then_a_picture_a_table_and_the_commands(readme):
    places = [readme.index(what) for what in ("# perfbench", "![", "<!-- short: ", "```sh", "<!-- answer: ")]
    assert places == sorted(places)
    assert readme.count("![") == 1, "one picture"


def test_what_the_commands_name_exists():
    assert (ROOT / "constraints.txt").is_file()
    assert (ROOT / "scenarios" / "multitenant.yaml").is_file()


def test_ci_runs_the_second_command(readme):
    assert ci_test_command(ROOT) == commands_of(readme)[1]


def copy_of_ci(folder: Path, readme: str) -> Path:
    (folder / ".ci").mkdir()
    shutil.copy(ROOT / ".ci" / "run", folder / ".ci" / "run")
    (folder / "README.md").write_text(readme, encoding="utf-8")
    return folder


def test_ci_reads_the_command_and_does_not_know_it(tmp_path):
    root = copy_of_ci(tmp_path, "A sentence.\n```sh\nfirst 'one'\nsecond \"$HOME\" '.[x]'\n```\n```sh\nno\nno\n```\n")
    assert ci_test_command(root) == "second \"$HOME\" '.[x]'"


def test_ci_fails_without_a_test_command(tmp_path):
    root = copy_of_ci(tmp_path, "A sentence.\n```sh\nonly one\n```\n")
    done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "README.md: expected a sh block" in done.stderr


@pytest.mark.parametrize("failing", ["command", "python", "ruff", "mypy"])
def test_ci_fails_when_any_part_fails(tmp_path, failing):
    """Stand-ins for Python and the two linters, so that only the order and the exit codes of .ci/run are tried."""
    root = copy_of_ci(tmp_path, f"```sh\nfirst\necho ran >> log; exit {int(failing == 'command')}\n```\n")
    binaries = root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for tool in ("python", "ruff", "mypy"):
        (binaries / tool).write_text(f"#!/bin/sh\necho {tool} $* >> log\nexit {int(failing == tool)}\n")
        (binaries / tool).chmod(0o755)
    done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 1
    parts = ["ran", "python -m pytest -m thorough", "ruff check .", "ruff format --check .", "mypy"]
    last = {"command": 1, "python": 2, "ruff": 3, "mypy": 5}
    assert [line.rstrip() for line in (root / "log").read_text().splitlines()] == parts[: last[failing]]


def test_ci_finds_the_test_data_beside_the_checkout(tmp_path):
    data = tmp_path / "shared" / "data"
    data.mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    root = copy_of_ci(tmp_path / "checkout", '```sh\nfirst\necho "$PERFBENCH_TEST_DATA"; exit 3\n```\n')
    bare = {key: value for key, value in os.environ.items() if key != "PERFBENCH_TEST_DATA"}
    for given, expected in ((bare, str(data)), ({**bare, "PERFBENCH_TEST_DATA": "mine"}, "mine")):
        done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True, env=given)
        assert (done.returncode, done.stdout.strip()) == (3, expected)

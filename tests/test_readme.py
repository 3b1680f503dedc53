"""README keeps its word: its two commands, what CI runs, and the table that comes from a committed run."""

from __future__ import annotations

import json
import os
import re
import shutil
import statistics
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
TABLE = re.compile(r"<!-- table: (\S+) -->\n(.*?)\n<!-- /table -->", re.DOTALL)
POWER = re.compile(r"<!-- power: (\S+) -->\n(.*?)\n<!-- /power -->", re.DOTALL)


def commands_of(readme: str) -> list[str]:
    """The lines of the first ```sh block, which has to stand on the first screen."""
    block = re.search(r"^```sh\n(.*?)^```$", readme, re.DOTALL | re.MULTILINE)
    assert block, "README.md has no ```sh block"
    return block[1].splitlines()


def tables_of(readme: str) -> list[tuple[str, str]]:
    """(path of a run.json, the Markdown table shown for it), for each marked table."""
    return [(path, table.strip()) for path, table in TABLE.findall(readme)]


def stale_tables(readme: str) -> list[str]:
    """The paths of the marked tables that are not what their run.json says."""
    from perfbench.report.table import render

    return [
        path
        for path, shown in tables_of(readme)
        if (render(json.loads((ROOT / path).read_text(encoding="utf-8")), "markdown") or "").strip() != shown
    ]


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


def test_the_commands_and_a_table_are_on_the_first_screen(readme):
    assert readme.index("```sh") < readme.index("\n## "), "the commands stand after the first section's end"
    assert readme.index("<!-- table: ") < readme.index("```sh"), "one table comes before the commands"


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


@pytest.mark.parametrize("failing", ["command", "ruff", "mypy"])
def test_ci_fails_when_any_part_fails(tmp_path, failing):
    """Stand-ins for the two linters, so that only the order and the exit codes of .ci/run are tried."""
    root = copy_of_ci(tmp_path, f"```sh\nfirst\necho ran >> log; exit {int(failing == 'command')}\n```\n")
    binaries = root / ".venv" / "bin"
    binaries.mkdir(parents=True)
    for tool in ("ruff", "mypy"):
        (binaries / tool).write_text(f"#!/bin/sh\necho {tool} $* >> log\nexit {int(failing == tool)}\n")
        (binaries / tool).chmod(0o755)
    done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True)
    assert done.returncode == 1
    expected = {"command": ["ran"], "ruff": ["ran", "ruff check ."], "mypy": ["ran", "ruff check .", "mypy"]}
    assert (root / "log").read_text().split("\n")[:-1] == expected[failing]


def test_ci_finds_the_test_data_beside_the_checkout(tmp_path):
    data = tmp_path / "shared" / "data"
    data.mkdir(parents=True)
    (tmp_path / "checkout").mkdir()
    root = copy_of_ci(tmp_path / "checkout", '```sh\nfirst\necho "$PERFBENCH_TEST_DATA"; exit 3\n```\n')
    bare = {key: value for key, value in os.environ.items() if key != "PERFBENCH_TEST_DATA"}
    for given, expected in ((bare, str(data)), ({**bare, "PERFBENCH_TEST_DATA": "mine"}, "mine")):
        done = subprocess.run([root / ".ci" / "run"], capture_output=True, text=True, env=given)
        assert (done.returncode, done.stdout.strip()) == (3, expected)


def test_the_table_is_what_the_committed_run_says(readme):
    tables = tables_of(readme)
    assert tables, "README.md has no marked table"
    assert all(path.startswith("results/") and path.endswith("/run.json") for path, _ in tables)
    tracked = subprocess.run(["git", "ls-files", "results"], capture_output=True, text=True, cwd=ROOT).stdout
    if tracked:  # a source archive has no git
        assert {path for path, _ in tables} <= set(tracked.splitlines())
    assert stale_tables(readme) == []


def test_the_gates_power_is_what_was_measured(readme):
    """The table is that of the JSON file, and the JSON file what the recorded pairs give with its seed."""
    from perfbench.gate import policy, power

    ((path, shown),) = POWER.findall(readme)
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))
    assert shown.strip() == power.render(found).strip()
    pairs = power.read_pairs((ROOT / path).with_name("pairs.jsonl"))
    assert len(pairs) >= 60
    rules = policy.load(ROOT / ".github" / "perfbench-policy.yaml")
    effects = [row["effect"] for row in found["rows"]]
    again = power.experiment(
        pairs, rules, effects=effects, sessions=found["sessions"], size=found["first_batch"], seed=found["seed"]
    )
    assert json.loads(json.dumps(again)) == found


def accuracy_table(path: str) -> str:
    """The Markdown table of an accuracy.json: each method's test score over the seeds, and against LoRA."""
    found = json.loads((ROOT / path).read_text(encoding="utf-8"))
    lines = ["| method | trained parameters | test %, median (lowest to highest seed) | points to LoRA | verdict |"]
    lines.append("| --- | ---: | ---: | ---: | --- |")
    for row in found["verdict"]["methods"]:
        trained = found["adapters"][row["task"]][row["method"]]["0"]["trainable_parameters"]
        low, median, high = (100 * of(row["test"]["seeds"]) for of in (min, statistics.median, max))
        versus = row["versus"].get("as-trained-fp32")
        points = [f"{100 * versus[key]:+.1f}" for key in ("difference", "low", "high")] if versus else []
        shown = f"{points[0]} [{points[1]}, {points[2]}]" if points else "the reference"
        test = f"{median:.1f} ({low:.1f} to {high:.1f})"
        lines.append(f"| {row['method']} | {trained:,} | {test} | {shown} | {row['verdict'] if points else '-'} |")
    return "\n".join(lines)


def test_the_table_of_accuracy_is_the_committed_runs(readme):
    ((path, shown),) = re.findall(r"<!-- accuracy: (\S+) -->\n(.*?)\n<!-- /accuracy -->", readme, re.DOTALL)
    assert shown.strip() == accuracy_table(path)


def test_a_changed_digit_in_the_table_is_found(readme):
    (path, table), *_ = tables_of(readme)
    digit = re.search(r"\d", table)
    assert digit
    changed = table[: digit.start()] + str((int(digit[0]) + 1) % 10) + table[digit.end() :]
    assert path in stale_tables(readme.replace(table, changed))

"""The workflow and the policy that a team copies: what they name exists, and every perfbench command in them parses."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfbench.cli import parser
from perfbench.gate import policy
from perfbench.gate.figures import exact
from perfbench.gate.outcome import writes_of
from tests.perfbench.gate.runs import ROOT

WORKFLOW = ROOT / ".github" / "workflows" / "perfbench.yml"
POLICY = ROOT / ".github" / "perfbench-policy.yaml"


def steps() -> list[dict[str, Any]]:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of each `perfbench` command of a shell text."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and Path(line[0]).name == "perfbench"]


def test_every_command_of_the_workflow_parses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = [command for step in steps() if "run" in step for command in commands_in(step["run"])]
    assert [command[0] for command in found] == ["ab"]
    (tmp_path / "perfbench-out").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in found:
        arguments = parser().parse_args(command)
        assert (ROOT / arguments.scenario).is_file()
        assert (ROOT / arguments.policy).is_file()
        assert len(writes_of(arguments.write)) == 4


def test_nothing_of_github_is_pasted_into_a_shell() -> None:
    """A `${{ }}` inside `run` would be code that whoever names a branch writes; it comes through `env`."""
    for step in steps():
        assert "${{" not in step.get("run", "")
        for name in re.findall(r"\$([A-Z_]+)", step.get("run", "")):
            assert name in step["env"]


def test_the_workflow_installs_as_readme_does() -> None:
    readme = (ROOT / "README.md").read_text()
    (install,) = [step["run"] for step in steps() if step.get("name") == "Install"]
    assert readme[readme.index("```sh\n") + 6 :].startswith(f"{install} && ")


def test_the_policy_is_one() -> None:
    found = policy.load(POLICY)
    # As history, which calls every difference of an exact figure a change.
    assert {found.tolerance(figure, "x")[0] for figure in exact()} == {0.0}
    assert found.skipped("a/peft-eager")

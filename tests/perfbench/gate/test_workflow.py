"""The workflow and the policy that a team copies: what they name exists, and every perfbench command in them parses."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from perfbench.cli import parser
from perfbench.gate import policy
from perfbench.gate.figures import exact
from perfbench.gate.outcome import writes_of
from tests.perfbench.gate.runs import ROOT
from tests.perfbench.gate.test_ab import PYPROJECT, SAME, SPEED, WORKER, commit, git

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
    assert [command[0] for command in found] == ["ab", "run", "history"]
    (tmp_path / "perfbench-out").mkdir()
    monkeypatch.chdir(tmp_path)
    ab, run, history = (parser().parse_args(command[: _end(command)]) for command in found)
    assert (ROOT / ab.scenario).is_file()
    assert (ROOT / ab.policy).is_file()
    assert len(writes_of(ab.write)) == 5
    assert run.scenario == ab.scenario or Path(run.scenario) == ab.scenario
    assert history.runs == [run.out]


def _end(command: list[str]) -> int:
    """Where the shell's own words begin."""
    return command.index("||") if "||" in command else len(command)


def test_a_push_and_a_pull_request_look_at_the_same_paths_and_every_path_is_there() -> None:
    workflow = yaml.safe_load(WORKFLOW.read_text())
    events = workflow[True]  # YAML 1.1 reads `on` as a truth
    assert events["push"]["paths"] == events["pull_request"]["paths"]
    for path in events["push"]["paths"]:
        assert (ROOT / path.removesuffix("/**")).exists(), path
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["jobs"]["history"]["concurrency"]["cancel-in-progress"] is False
    assert workflow["env"]["PIP_EXTRA_INDEX_URL"].endswith("/whl/cpu"), "a hosted runner takes no CUDA"


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A checkout as CI has it: a pull request that changes nothing of note, merged into a branch on which somebody
    else has made it slower since; `base` is the commit that the pull request was made from."""
    folder = tmp_path / "checkout"
    for name in ("perfbench", "scenarios", ".github", ".venv/bin"):
        (folder / name).mkdir(parents=True)
    git(folder.parent, "init", "--quiet", "--initial-branch=main", str(folder))
    shutil.copy(POLICY, folder / ".github")
    (folder / "scenarios" / "gate.yaml").write_text("{}\n")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / ".gitignore").write_text(".venv\nperfbench-out\n")
    (folder / ".venv" / "bin" / "perfbench").write_text(
        f'#!/bin/sh\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" -P -m perfbench "$@" --pairs 8 --blocks 2\n'
    )
    (folder / ".venv" / "bin" / "perfbench").chmod(0o755)
    same = SAME.replace('"c/lora"', '"c/lora-eager"')
    commit(folder, "base", __init__="", cli="", worker="", ab_worker=WORKER, speed=SPEED.format(same))
    git(folder, "checkout", "--quiet", "-b", "mine")
    commit(folder, "mine-1", ab_worker=f"{WORKER}# Other code that does the same.\n")
    git(folder, "checkout", "--quiet", "main")
    commit(folder, "others-1", speed=SPEED.format(same.replace("100.0", "120.0")))
    git(folder, "merge", "--quiet", "--no-ff", "-m", "merge", "mine")
    return folder


def compared(folder: Path, change: Callable[[str], str] = str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The step that compares, in the shell that CI gives it."""
    (step,) = [step for step in steps() if step.get("name") == "Compare with the target branch"]
    values = {name: str(value) for name, value in step["env"].items()}
    shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", change(step["run"])]
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("GITHUB_")}
    cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    return subprocess.run(
        shell, cwd=folder, env=inherited | cache | values | environment, capture_output=True, text=True
    )


def test_the_commits_of_others_do_not_count(merge: Path) -> None:
    """The first parent of the merge, and not the commit that the pull request was made from, is the baseline."""
    done = compared(merge)
    assert (done.returncode, done.stdout[:5]) == (0, "PASS:"), done
    assert json.loads((merge / "perfbench-out" / "report.json").read_text())["verdict"] == "pass"
    shutil.rmtree(merge / "perfbench-out")
    planted = compared(merge, lambda text: text.replace("HEAD^1", "base"))
    assert (planted.returncode, planted.stdout[:5]) == (1, "FAIL:"), planted


@pytest.mark.parametrize(("code", "red"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 4)])
def test_only_what_can_not_be_told_is_neutral(merge: Path, code: int, red: int) -> None:
    (merge / ".venv" / "bin" / "perfbench").write_text(f"#!/bin/sh\nexit {code}\n")
    assert compared(merge).returncode == red
    assert compared(merge, INCONCLUSIVE="3").returncode == code


# Keeps comments in a file as GitHub does, one JSON object a line; of --jq it knows what the workflow asks.
GH = """#!{python}
import json, sys
from pathlib import Path

words = sys.argv[1:]
kept = Path({kept!r})
comments = [json.loads(line) for line in kept.read_text().splitlines()] if kept.exists() else []
body = next((Path(word.removeprefix("body=@")).read_text() for word in words if word.startswith("body=@")), None)
place = next(word for word in words if word.startswith("repos/"))
if "--jq" in words:
    mark = words[words.index("--jq") + 1].split('"')[1]
    print("\\n".join(str(one["id"]) for one in comments if one["body"].startswith(mark)))
elif "PATCH" in words:
    (found,) = [one for one in comments if place.endswith("/" + str(one["id"]))]
    found["body"] = body
else:
    comments.append({{"id": 10 + len(comments), "body": body}})
kept.write_text("".join(json.dumps(one) + "\\n" for one in comments))
"""


def test_the_pull_request_has_one_comment_which_is_edited(tmp_path: Path) -> None:
    (step,) = [step for step in steps() if step.get("name", "").startswith("Say it in the pull request")]
    kept = tmp_path / "comments"
    kept.write_text(json.dumps({"id": 7, "body": "a reviewer's, who quotes <!-- perfbench -->"}) + "\n")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gh").write_text(GH.format(python=sys.executable, kept=str(kept)))
    (tmp_path / "bin" / "gh").chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "GH_TOKEN": "x",
        "COMMENTS": "repos/o/r/issues/3/comments", "COMMENT": "repos/o/r/issues/comments",
    }  # fmt: skip
    assert set(step["env"]) <= set(environment)

    def said() -> list[str]:
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        subprocess.run(shell, cwd=tmp_path, env=environment, check=True)
        return [json.loads(line)["body"] for line in kept.read_text().splitlines()][1:]

    assert said() == []  # nothing was compared
    (tmp_path / "perfbench-out").mkdir()
    for verdict in ("PASS", "FAIL"):
        (tmp_path / "perfbench-out" / "report.md").write_text(f"**{verdict}**\n")
        assert said() == [f"<!-- perfbench -->\n**{verdict}**\n"]


def test_nothing_of_github_is_pasted_into_a_shell() -> None:
    """A `${{ }}` inside `run` would be code that whoever names a branch writes; it comes through `env`."""
    for step in steps():
        assert "${{" not in step.get("run", "")
        for name in re.findall(r"\$([A-Z_]+)", step.get("run", "")):
            assert name in step["env"]


def test_the_workflow_installs_as_readme_does() -> None:
    readme = (ROOT / "README.md").read_text()
    (install,) = {step["run"] for step in steps() if step.get("name") == "Install"}
    assert readme[readme.index("```sh\n") + 6 :].startswith(f"{install} && ")


def test_the_policy_is_one() -> None:
    found = policy.load(POLICY)
    # As history, which calls every difference of an exact figure a change.
    assert {found.tolerance(figure, "x")[0] for figure in exact()} == {0.0}
    assert found.skipped("a/peft-eager")

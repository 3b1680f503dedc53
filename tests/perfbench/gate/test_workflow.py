"""The workflow that a stranger's repository calls, and this one's own: each step runs in the shell that CI gives it."""

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
from perfbench.figures.metrics import METRICS
from perfbench.gate import policy
from perfbench.gate.figures import exact
from tests.perfbench.gate import plugin_repository
from tests.perfbench.gate.runs import ROOT
from tests.perfbench.gate.test_ab import PYPROJECT, SAME, SPEED, WORKER, commit, git

WORKFLOW = ROOT / ".github" / "workflows" / "perfbench.yml"
GATE = ROOT / ".github" / "workflows" / "perfbench-gate.yml"
POLICY = ROOT / ".github" / "perfbench-policy.yaml"
TUTORIAL = ROOT / "docs" / "tutorials" / "gate.md"
# What a runner sets by itself.
SET_BY_GITHUB = {"RUNNER_TEMP"}


def steps(*workflows: Path) -> list[dict[str, Any]]:
    jobs = [job for path in workflows for job in yaml.safe_load(path.read_text())["jobs"].values()]
    return [step for job in jobs for step in job.get("steps", [])]


def step_of(name: str) -> dict[str, Any]:
    """The step of the gate whose name begins so."""
    (step,) = [step for step in steps(GATE) if step.get("name", "").startswith(name)]
    return step


def inputs() -> dict[str, dict[str, Any]]:
    """What the gate may be told."""
    found: dict[str, dict[str, Any]] = events(GATE)["workflow_call"]["inputs"]
    return found


def events(workflow: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(workflow.read_text())[True]  # YAML 1.1 reads `on` as a truth
    return found


def callers() -> list[dict[str, Any]]:
    """The jobs that call the gate: this repository's, and the one that the tutorial shows."""
    (shown,) = re.findall(r"^```yaml\n(on: .*?)^```$", TUTORIAL.read_text(), re.DOTALL | re.MULTILINE)
    jobs = [yaml.safe_load(WORKFLOW.read_text())["jobs"]["ab"], *yaml.safe_load(shown)["jobs"].values()]
    assert [job["uses"].partition("@")[0].endswith(str(GATE.relative_to(ROOT))) for job in jobs] == [True, True]
    return jobs


def commands_in(text: str) -> list[list[str]]:
    """The arguments of each `perfbench` command of a shell text."""
    lines = text.replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line and Path(line[0]).name == "perfbench"]


def test_every_command_of_the_history_parses() -> None:
    found = [command for step in steps(WORKFLOW) if "run" in step for command in commands_in(step["run"])]
    assert [command[0] for command in found] == ["run", "history"]
    run, history = (parser().parse_args(command) for command in found)
    assert run.scenario == Path(callers()[0]["with"]["scenario"]), "what is gated"
    assert history.runs == [run.out]


def test_whoever_calls_the_gate_says_what_it_asks_for() -> None:
    required = {name for name, one in inputs().items() if one.get("required")}
    for job in callers():
        assert required <= set(job["with"]) <= set(inputs())
        assert job["permissions"]["pull-requests"] == "write"
    for path in (callers()[0]["with"][name] for name in ("scenario", "policy")):
        assert (ROOT / path).is_file()
    (job,) = yaml.safe_load(GATE.read_text())["jobs"].values()
    assert "permissions" not in job, "more than the caller has would end the run before it began"
    text = GATE.read_text()
    for name in inputs():
        assert f"${{{{ inputs.{name} }}}}" in text, name
    assert set(re.findall(r"inputs\.(\w+)", text)) == set(inputs())


def test_a_push_and_a_pull_request_look_at_the_same_paths_and_every_path_is_there() -> None:
    workflow, found = yaml.safe_load(WORKFLOW.read_text()), events(WORKFLOW)
    assert found["push"]["paths"] == found["pull_request"]["paths"]
    for path in found["push"]["paths"]:
        assert (ROOT / path.removesuffix("/**")).exists(), path
    assert {str(path.relative_to(ROOT)) for path in (WORKFLOW, GATE)} <= set(found["push"]["paths"])
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["jobs"]["history"]["concurrency"]["cancel-in-progress"] is False
    for index in (workflow["jobs"]["history"]["env"]["PIP_EXTRA_INDEX_URL"], inputs()["index"]["default"]):
        assert index.endswith("/whl/cpu"), "a hosted runner takes no CUDA"


# What `pip install` of perfbench makes, for the code under test.
PERFBENCH = f'#!/bin/sh\nexport PYTHONPATH="{ROOT}"\nexec "{sys.executable}" -P -m perfbench "$@" {{}}\n'


def executable(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


@pytest.fixture
def merge(tmp_path: Path) -> Path:
    """A checkout as CI has it: a pull request that changes nothing of note, merged into a branch on which somebody
    else has made it slower since; `base` is the commit that the pull request was made from."""
    folder = tmp_path / "checkout"
    for name in ("perfbench", "scenarios", ".github"):
        (folder / name).mkdir(parents=True)
    git(folder.parent, "init", "--quiet", "--initial-branch=main", str(folder))
    shutil.copy(POLICY, folder / ".github")
    (folder / "scenarios" / "gate.yaml").write_text("{}\n")
    (folder / "pyproject.toml").write_text(PYPROJECT)
    executable(tmp_path / "temp" / "venv" / "bin" / "perfbench", PERFBENCH.format("--pairs 8 --blocks 2"))
    same = SAME.replace('"c/lora"', '"c/lora-eager"')
    commit(folder, "base", __init__="", cli="", worker="", ab_worker=WORKER, speed=SPEED.format(same))
    git(folder, "checkout", "--quiet", "-b", "mine")
    commit(folder, "mine-1", ab_worker=f"{WORKER}# Other code that does the same.\n")
    git(folder, "checkout", "--quiet", "main")
    commit(folder, "others-1", speed=SPEED.format(same.replace("100.0", "120.0")))
    git(folder, "merge", "--quiet", "--no-ff", "-m", "merge", "mine")
    return folder


def executed(
    name: str, folder: Path, given: dict[str, str], change: Callable[[str], str] = str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A step of the gate in the shell that CI gives it, which is called with `given`."""
    step = step_of(name)
    said = {key: str(one["default"]) for key, one in inputs().items() if not one.get("required")} | given

    def value(text: object) -> str:
        return re.sub(r"\$\{\{ inputs\.(\w+) \}\}", lambda found: said[found[1]], str(text))

    variables = {name: value(text) for name, text in step["env"].items()} | environment
    assert not any("${{" in text for text in variables.values())
    own = {"RUNNER_TEMP": str(folder.parent / "temp"), "XDG_CACHE_HOME": str(folder.parent / "cache")}
    inherited = {key: text for key, text in os.environ.items() if not key.startswith(("GITHUB_", "PYTHONPATH"))}
    return subprocess.run(
        ["bash", "-e", "-c", change(step["run"])],
        cwd=folder, env=inherited | own | variables, capture_output=True, text=True,
    )  # fmt: skip


def compared(folder: Path, change: Callable[[str], str] = str, **environment: str) -> subprocess.CompletedProcess[str]:
    """The step that compares, as this repository calls it."""
    return executed("Compare with the target branch", folder, callers()[0]["with"], change, **environment)


def test_the_commits_of_others_do_not_count(merge: Path) -> None:
    """The first parent of the merge, and not the commit that the pull request was made from, is the baseline."""
    done = compared(merge)
    assert (done.returncode, done.stdout[:5]) == (0, "PASS:"), done
    out = merge.parent / "temp" / "perfbench-out"
    assert json.loads((out / "report.json").read_text())["verdict"] == "pass"
    assert git(merge, "status", "--porcelain") == "", "the checkout holds nothing but its commit"
    shutil.rmtree(out)
    planted = compared(merge, lambda text: text.replace("HEAD^1", "base"))
    assert (planted.returncode, planted.stdout[:5]) == (1, "FAIL:"), planted


@pytest.mark.parametrize(("code", "red"), [(0, 0), (1, 1), (2, 2), (3, 0), (4, 4)])
def test_only_what_can_not_be_told_is_neutral(merge: Path, code: int, red: int) -> None:
    (merge.parent / "temp" / "venv" / "bin" / "perfbench").write_text(f"#!/bin/sh\nexit {code}\n")
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
    kept = tmp_path / "comments"
    kept.write_text(json.dumps({"id": 7, "body": "a reviewer's, who quotes <!-- perfbench -->"}) + "\n")
    executable(tmp_path / "bin" / "gh", GH.format(python=sys.executable, kept=str(kept)))
    (tmp_path / "checkout").mkdir()
    (tmp_path / "temp" / "perfbench-out").mkdir(parents=True)
    github = {"GH_TOKEN": "x", "COMMENTS": "repos/o/r/issues/3/comments", "COMMENT": "repos/o/r/issues/comments"}
    name = "Say it in the pull request"
    assert set(step_of(name)["env"]) == {*github, "NAME"}

    def said(path: str = f"{tmp_path / 'bin'}:{os.environ['PATH']}") -> list[str]:
        done = executed(name, tmp_path / "checkout", {}, PATH=path, **github)
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("::warning") is path.startswith(str(tmp_path / "refused"))
        return [json.loads(line)["body"] for line in kept.read_text().splitlines()][1:]

    assert said() == []  # nothing was compared
    for verdict in ("PASS", "FAIL"):
        (tmp_path / "temp" / "perfbench-out" / "report.md").write_text(f"**{verdict}**\n")
        assert said() == [f"<!-- perfbench -->\n**{verdict}**\n"]
    executable(tmp_path / "refused" / "gh", "#!/bin/sh\ncase $* in *--jq*) ;; *) exit 1 ;; esac\n")
    assert len(said(f"{tmp_path / 'refused'}:{os.environ['PATH']}")) == 1, "a caller without the permission is told"


def test_nothing_of_github_is_pasted_into_a_shell() -> None:
    """A `${{ }}` inside `run` would be code that whoever names a branch writes; it comes through `env`."""
    for step in steps(WORKFLOW, GATE):
        assert "${{" not in step.get("run", "")
        for name in re.findall(r"\$([A-Z_]+)", step.get("run", "")):
            assert name in {*step["env"], *SET_BY_GITHUB}


def test_the_workflow_installs_as_readme_does() -> None:
    readme = (ROOT / "README.md").read_text()
    (install,) = {step["run"] for step in steps(WORKFLOW) if step.get("name") == "Install"}
    assert readme[readme.index("```sh\n") + 6 :].startswith(f"{install} && ")


# Makes a folder as `python3 -m venv` does, whose pip writes down what it is asked for.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m venv" ] || exit 9
mkdir -p "$3/bin"
echo "export PATH=$3/bin:$PATH" > "$3/bin/activate"
cp "{perfbench}" "$3/bin/perfbench"
printf '#!/bin/sh\\necho "$PIP_EXTRA_INDEX_URL $*" >> "{asked}"\\n' > "$3/bin/pip"
chmod +x "$3/bin/pip"
"""


def test_a_stranger_s_pull_request_is_judged(tmp_path: Path) -> None:
    """Their method, in a repository of theirs, from the lines of the tutorial to the verdict: an operation more in each
    decode step fails by the exact figures alone."""
    checkout, temp, asked = tmp_path / "checkout", tmp_path / "temp", tmp_path / "asked"
    plugin_repository.make(checkout)
    (source,) = [step["with"] for step in steps(GATE) if "path" in step.get("with", {}) and "ref" in step["with"]]
    (checkout / source["path"]).mkdir()
    temp.mkdir()
    executable(tmp_path / "perfbench", PERFBENCH.format(""))
    executable(tmp_path / "bin" / "python3", PYTHON.format(perfbench=tmp_path / "perfbench", asked=asked))
    given = callers()[1]["with"]
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    installed = executed("Install", checkout, {**given, "install": "pip install -e '.[a b]'"}, PATH=path)
    assert installed.returncode == 0, installed.stderr
    index = inputs()["index"]["default"]
    own = f"{index} install -q -c {temp}/perfbench/constraints.txt {temp}/perfbench"
    assert asked.read_text().splitlines() == [own, f"{index} install -e .[a b]"]
    assert git(checkout, "status", "--porcelain") == ""
    done = executed("Compare with the target branch", checkout, given)
    assert (done.returncode, done.stdout[:5]) == (1, "FAIL:"), done
    report = json.loads((temp / "perfbench-out" / "report.json").read_text())
    failed = [one for one in report["findings"] if one["status"] == "fail"]
    assert {(one["case"].split("/")[-1], one["figure"]) for one in failed} >= {
        ("value-scale-eager", "aten_ops_per_decode_step")
    }
    assert not any("/none" in one["case"] for one in failed)
    assert not any("the same code" in note for note in report["notes"])


def test_the_policy_is_one() -> None:
    found = policy.load(POLICY)
    # As history, which calls every difference of an exact figure past its tolerance a change.
    assert {figure: found.tolerance(figure, "x")[0] for figure in exact()} == {
        figure: METRICS[figure].tolerance for figure in exact()
    }
    assert found.skipped("a/peft-eager")

"""That each side of `perfbench ab` runs the code of its own commit, also where this is a method in a stranger's
repository: what it loads, and what is refused."""

from __future__ import annotations

import hashlib
import sys
import types
from pathlib import Path

import pytest

from perfbench.cli import main
from perfbench.errors import ComparisonError, PerfbenchError
from perfbench.gate import same_code as same_code_module
from perfbench.gate.own_code import WORKERS, prove_own_code
from perfbench.gate.revisions import Revision, revisions
from perfbench.gate.same_code import same_code
from tests.perfbench.gate import plugin_repository
from tests.perfbench.gate.plugin_repository import git
from tests.perfbench.gate.runs import ROOT


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return plugin_repository.make(tmp_path_factory.mktemp("stranger") / "checkout").resolve()


@pytest.fixture(autouse=True)
def in_the_repository(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    for name in ("GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)


def ab(tmp_path: Path, baseline: str, candidate: str, *more: str) -> int:
    sides = ["--baseline", baseline, "--candidate", candidate]
    return main(["ab", "gate.yaml", *sides, "--out", str(tmp_path / "out"), *more])


def test_a_commit_that_changes_markdown_alone_passes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ab(tmp_path, "base", "readme", "--plugin", "value_scale.py") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith("PASS: both sides are the same, so nothing was measured")
    assert "all 4 files but Markdown (" in said
    assert "this Python with its packages, and gate.yaml (" in said
    assert list((tmp_path / "out").iterdir()) == []


def test_any_other_file_and_a_plugin_from_elsewhere_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario = Path("gate.yaml")
    with revisions(Path.cwd(), {"baseline": "base", "candidate": "more"}, tmp_path) as arms:
        assert same_code(arms, scenario, []) is None
        assert same_code(dict.fromkeys(arms, arms["baseline"]), scenario, [])
    mine = tmp_path / "mine.py"
    mine.write_text("METHODS = {}\n")
    with revisions(Path.cwd(), {"baseline": "base", "candidate": "readme"}, tmp_path, [str(mine)]) as arms:
        told = same_code(arms, scenario, [])
        assert "all 5 files" in str(told)
        assert arms["baseline"].plugins == arms["candidate"].plugins == {mine: git(tmp_path, "hash-object", str(mine))}
    # In perfbench's own repository nobody knows what an installed method imports.
    git(tmp_path, "init", "--quiet", str(tmp_path / "own"))
    plugin_repository.commit(tmp_path / "own", "one", {"perfbench/ab_worker.py": ""})
    one = Revision("one", git(tmp_path / "own", "rev-parse", "HEAD"), tmp_path / "own", Path(sys.executable), "x")
    assert "can import" in str(same_code({"baseline": one, "candidate": one}, scenario, []))
    monkeypatch.setattr(same_code_module, "entry_points", lambda group: [group])
    assert "files but Markdown" in str(same_code({"baseline": one, "candidate": one}, scenario, []))


def test_a_shadowed_module_is_refused(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An editable install whose finder comes before all others, as some build tools make it: both sides would run what
    lies in the checkout."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'scaling':\n"
        f"            return importlib.util.spec_from_file_location(name, {str(repository / 'src/scaling.py')!r})\n"
        "sys.meta_path.insert(0, Finder())\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{ROOT}")
    assert ab(tmp_path, "base", "more", "--plugin", "value_scale.py") == 2
    said = capsys.readouterr().out.splitlines()[0]
    assert f"base ({git(repository, 'rev-parse', 'base')[:12]}): this process does not run its commit's code: " in said
    assert f"{repository}/src/scaling.py is loaded from the checkout" in said
    assert git(repository, "worktree", "list").count("\n") == 0


@pytest.mark.usefixtures("own_methods")
def test_a_plugin_that_raises_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the label of its commit before it, as all that a process refuses: test_ab.py, `refusing`."""
    from perfbench.ab_worker import _plan

    file = tmp_path / "mine.py"
    file.write_text("raise RuntimeError('not yet')\n")
    job = {"scenario": "gate.yaml", "set": [], "case": None, "threads": 1, "prepare": True}
    with pytest.raises(PerfbenchError, match=r"--plugin .*mine.py: raised RuntimeError: not yet"):
        _plan(job | {"plugins": [str(file)]})
    with pytest.raises(PerfbenchError, match=r"unknown method 'value-scale'"):
        _plan(job)
    monkeypatch.setitem(sys.modules, "scaling", types.SimpleNamespace(MODULES=("v",)))
    comparisons, settings = _plan(job | {"plugins": ["value_scale.py"]})
    assert [case.method for case in comparisons[0].cases] == ["none", "value-scale"]
    assert [plugin["methods"] for plugin in settings["plugins"]] == [["value-scale"]], "the ranks load it too"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["base", "more", "--plugin", "value_scales.py"], "base (@) has no such file (did you mean 'value_scale.py'?"),
        (["base", "more", "--plugin", "/no/such.py"], "--plugin /no/such.py: no such file; expected a Python file"),
        (["torch==2.12.*", "base"], "torch==2.12.*: other packages are possible in perfbench's own checkout only"),
        (["base", "nothing"], "nothing: no such commit"),
        (["command: true", "command: true", "--plugin", "x.py"], "no side is a commit, and a command loads its own"),
    ],
)
def test_sides_that_can_not_be(
    repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert ab(tmp_path, *arguments) == 2
    assert words.replace("@", git(repository, "rev-parse", "base")[:12]) in capsys.readouterr().out.splitlines()[0]
    assert git(repository, "worktree", "list").count("\n") == 0


def test_a_repository_without_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gate.yaml").write_text("")
    monkeypatch.chdir(tmp_path)
    git(tmp_path, "init", "--quiet")
    assert ab(tmp_path, "HEAD~1", "HEAD") == 2
    assert "has no commit yet; commit two states to compare" in capsys.readouterr().out.splitlines()[0]


def test_other_packages_that_the_commits_ask_for_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perfbench.gate import ab as ab_module

    folder = tmp_path / "theirs"
    git(tmp_path, "init", "--quiet", str(folder))
    plugin_repository.commit(folder, "tools", {"pyproject.toml": "[tool.ruff]\n"})
    plugin_repository.commit(folder, "asking", {"pyproject.toml": '[project]\ndependencies = ["einops>=1"]\n'})
    plugin_repository.commit(folder, "broken", {"pyproject.toml": "[project\n"})
    plan = types.SimpleNamespace(policy=None, out=tmp_path)
    for refs, notes in (
        (
            ("tools", "asking"),
            ["the commits ask for different packages (einops>=1); both ran with those of this Python"],
        ),
        (("asking", "asking"), []),
    ):
        with revisions(folder, dict(zip(("baseline", "candidate"), refs, strict=True)), tmp_path) as arms:
            assert ab_module._Session(plan, arms, None).notes == notes  # type: ignore[arg-type]
    with (
        revisions(folder, {"baseline": "tools", "candidate": "broken"}, tmp_path) as arms,
        pytest.raises(ComparisonError, match=r"^broken \(\w{12}\): pyproject\.toml: .*mend it"),
    ):
        ab_module._Session(plan, arms, None)  # type: ignore[arg-type]


def test_the_folders_where_modules_are_looked_for_are_those_of_the_worktree(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An editable install is a line of sys.path; whatever the layout, the worktree's own folder comes first."""
    monkeypatch.setattr(sys, "path", [str(repository / "lib"), *sys.path])
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    with revisions(repository, {"baseline": "base"}, tmp_path) as arms:
        own = arms["baseline"].folder
        assert arms["baseline"].search_path.split(":") == [
            *map(str, (own, own / "src", own / "lib", ROOT)),
            "/elsewhere",
        ]
        installed = Revision("x", "", own, Path(), "", checkout=repository, runner=Path("/x/site-packages"))
        assert "/x/site-packages" not in installed.search_path


def test_the_worker_names_what_it_has_loaded_out_of_a_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from perfbench import ab_worker

    (tmp_path / "env").mkdir()
    for name in ("theirs", "installed", "gone"):
        file = tmp_path / ("env" if name == "installed" else "") / f"{name}.py"
        file.write_text("x")
        module = types.ModuleType(name)
        module.__file__ = str(file)
        monkeypatch.setitem(sys.modules, name, module)
    (tmp_path / "gone.py").unlink()
    monkeypatch.setattr(ab_worker.sysconfig, "get_path", lambda _: str(tmp_path / "env"))
    blob = hashlib.sha1(b"blob 1\0x").hexdigest()
    assert ab_worker.loaded_modules([tmp_path]) == {str(tmp_path / "theirs.py"): blob}
    assert ab_worker.loaded_modules([tmp_path / "theirs.py"]) == {str(tmp_path / "theirs.py"): blob}
    assert ab_worker.loaded_modules([]) == {}


@pytest.mark.parametrize("worker", sorted(WORKERS))
def test_perfbench_s_own_code_is_proved_with_the_worker_of_either_layout(tmp_path: Path, worker: str) -> None:
    git(tmp_path, "init", "--quiet", str(tmp_path / "own"))
    folder = (tmp_path / "own").resolve()
    plugin_repository.commit(folder, "one", {worker: ""})
    here = Revision("one", git(folder, "rev-parse", "HEAD"), folder, Path(sys.executable), "")
    blob = git(folder, "rev-parse", f"HEAD:{worker}")
    assert prove_own_code(here, str(folder), {worker: blob}, {}) == {worker: blob}
    for code, words in (
        ({}, "is not loaded"),
        ({worker: "0" * 40}, f"{worker} is not that of the commit"),
        ({worker: blob, "perfbench/new.py": blob}, "perfbench/new.py is not that of the commit"),
    ):
        with pytest.raises(ComparisonError, match=f"does not run its commit's code: .*{words}"):
            prove_own_code(here, str(folder), code, {})
    with pytest.raises(ComparisonError, match="got code of"):
        prove_own_code(here, "/elsewhere", {worker: blob}, {})


@pytest.fixture(scope="module")
def base(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Revision:
    """`base` of the stranger's repository, as a revision whose worktree is no checkout of git's."""
    folder = tmp_path_factory.mktemp("worktree").resolve() / "tree"
    git(repository, "clone", "--quiet", "--branch", "base", str(repository), str(folder))
    plugins = {folder / "value_scale.py": git(folder, "rev-parse", "HEAD:value_scale.py")}
    commit = git(folder, "rev-parse", "HEAD")
    return Revision("base", commit, folder, Path(sys.executable), "", (), repository, plugins, ROOT)


def test_a_plugin_is_proved_to_be_that_of_its_commit(repository: Path, base: Revision) -> None:
    (file, blob), helper = next(iter(base.plugins.items())), base.folder / "src" / "scaling.py"
    own = git(base.folder, "rev-parse", "HEAD:src/scaling.py")
    good = {str(file): blob, str(helper): own}
    code = {"perfbench/ab_worker.py": "0" * 40}
    assert prove_own_code(base, str(ROOT), code, good) == code | {"value_scale.py": blob, "src/scaling.py": own}
    for modules, words in (
        ({}, "no file of it is loaded; give --plugin FILE, or install"),
        ({str(helper): own}, "has not loaded value_scale.py as it should be"),
        ({**good, str(helper): "0" * 40}, "src/scaling.py is not that of the commit"),
        ({**good, str(base.folder / "made.py"): own}, "made.py is not that of the commit"),
        ({**good, str(repository / "src" / "scaling.py"): own}, "src/scaling.py is loaded from the checkout"),
    ):
        with pytest.raises(ComparisonError, match=words):
            prove_own_code(base, str(ROOT), code, modules)
    with pytest.raises(ComparisonError, match=f"expected code of {ROOT}, got code of {base.folder}"):
        prove_own_code(base, str(base.folder), code, good)


def test_a_plugin_from_elsewhere_is_proved_to_be_what_it_was(tmp_path: Path) -> None:
    """In perfbench's own repository too: also a perfbench that knows nothing of plugins is found out."""
    git(tmp_path, "init", "--quiet", str(tmp_path / "own"))
    folder = (tmp_path / "own").resolve()
    worker = max(WORKERS, key=len)
    plugin_repository.commit(folder, "one", {worker: ""})
    blob, elsewhere = git(folder, "rev-parse", f"HEAD:{worker}"), tmp_path / "mine.py"
    own = Revision("one", git(folder, "rev-parse", "HEAD"), folder, Path(), "", plugins={elsewhere: "1" * 40})
    told = prove_own_code(own, str(folder), {worker: blob}, {str(elsewhere): "1" * 40})
    assert told == {worker: blob, str(elsewhere): "1" * 40}
    for modules in ({}, {str(elsewhere): "2" * 40}):
        with pytest.raises(ComparisonError, match=r"has not loaded .*/mine\.py as it should be"):
            prove_own_code(own, str(folder), {worker: blob}, modules)

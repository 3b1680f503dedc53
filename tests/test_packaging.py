"""What goes out with the code: name, licences, notices, citation, workflow, templates say the same and are complete."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

import perfbench
from perfbench.doctor import requirements
from perfbench.machine import environment

ROOT = Path(__file__).parents[1]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
# The folders of other people's work; each has its licences in it.
VENDORED = ("perfbench/report/vendor", "perfbench/profiling/viewer/speedscope")


def test_the_distribution_has_one_name_and_the_command_another() -> None:
    assert PROJECT["name"] == requirements.DISTRIBUTION == environment.DISTRIBUTIONS["perfbench"] != "perfbench"
    assert PROJECT["scripts"] == {"perfbench": "perfbench.cli:main"}


@pytest.mark.parametrize("folder", ["perfbench", "methods", "README.md", "CONTRIBUTING.md", "docs"])
def test_nobody_is_told_to_install_another_project(folder: str) -> None:
    """`pip install perfbench` would bring somebody else's package."""
    place = ROOT / folder
    files = [place] if place.is_file() else [*place.rglob("*.py"), *place.rglob("*.md")]
    for file in files:
        assert not re.search(r"pip install [^\n&]*(?<![\w-])perfbench\b", file.read_text(encoding="utf-8")), file


def test_the_extra_all_has_what_the_others_bring_to_a_user() -> None:
    extras = PROJECT["optional-dependencies"]
    for_users = ("parquet", "hub", "pandas", "tensorboard", "gguf", "serve", "cluster")
    assert extras["all"] == [line for name in for_users for line in extras[name]]
    assert set(extras) == {*for_users, "all", "lm-eval", "docs", "test"}


def test_the_licence_is_whole_and_declared() -> None:
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text


def test_every_licence_of_others_goes_into_the_wheel_and_is_named() -> None:
    shipped = {path for pattern in PROJECT["license-files"] for path in ROOT.glob(pattern)}
    notices = (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")
    for folder in VENDORED:
        licences = [path for path in (ROOT / folder).iterdir() if "LICENSE" in path.name]
        assert licences
        for path in licences:
            assert path in shipped
            assert f"`{path.relative_to(ROOT)}`" in notices


def test_every_folder_of_others_is_known() -> None:
    found = {path.parent for folder in ("perfbench", "docs") for path in (ROOT / folder).rglob("*LICENSE*")}
    assert found == {ROOT / folder for folder in (*VENDORED, "docs/vendor")}
    assert "`docs/vendor/iframe-worker-LICENSE`" in (ROOT / "THIRD_PARTY_NOTICES.md").read_text(encoding="utf-8")


def test_the_citation_names_both_papers_and_this_version() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(cited["version"]) == PROJECT["version"] == perfbench.__version__
    assert cited["license"] == PROJECT["license"]
    assert [one["title"].partition(":")[0] for one in cited["references"]] == ["PARA", "FanLoRA"]


def test_the_tests_run_on_every_python_that_is_promised() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    versions = workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={versions[0]}"
    assert f"Python {versions[0]} or later" in (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"Python {versions[0]} to {versions[-1]}" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    steps = [step for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert any(".ci/run" in step["run"] for step in steps)
    assert any("mkdocs build --strict" in step["run"] for step in steps)


@pytest.mark.parametrize(
    "path", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.name
)
def test_an_issue_template_is_one(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    if path.name != "config.yml":
        assert {"name", "description", "body"} <= set(form)
        assert all(item["attributes"]["label"] for item in form["body"])


def test_the_source_archive_has_what_its_tests_and_pages_need() -> None:
    manifest = (ROOT / "MANIFEST.in").read_text(encoding="utf-8")
    for needed in ("constraints.txt", "graft tests", "graft docs", "graft results", ".ci/run", "mkdocs.yml"):
        assert needed in manifest

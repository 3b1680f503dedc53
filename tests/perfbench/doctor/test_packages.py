"""What perfbench requires against what is there: with `packaging`, and the same with the standard library alone."""

from __future__ import annotations

import importlib.metadata
import platform
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from perfbench.doctor import packages, requirements
from perfbench.doctor.check import Check
from perfbench.doctor.requirements import UncoveredError

ROOT = Path(__file__).parents[3]
MACHINES = [("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")]


@pytest.fixture(params=["with packaging", "alone"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "alone":
        for name in ("packaging", "packaging.markers", "packaging.specifiers"):
            monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.usefixtures("_either_way")
def test_packages_in_out_of_range_and_absent() -> None:
    found = packages.packages(
        (
            "perfbench-no-such-package>=1",
            "rich>=9999",
            "rich>=1",
            "perfbench-no-such-package; platform_system == 'Nowhere'",
            'perfbench-no-such-package<2,>=1; extra == "test"',
        )
    )
    assert [check.status for check in found] == ["missing", "warn", "ok"]
    assert found[0].remedy == "pip install 'perfbench-no-such-package>=1'"
    assert found[1].finding == f"{importlib.metadata.version('rich')}, outside the tested range >=9999"
    assert found[1].remedy == "pip install 'rich>=9999'"


@pytest.mark.usefixtures("_either_way")
def test_the_ranges_are_those_of_pyproject() -> None:
    declared = requirements.declared()
    assert declared is not None
    names = {Requirement(line).name for line in declared.packages}
    assert {"torch", "transformers", "peft", "packaging"} <= names
    assert {check.name for check in packages.packages(declared.packages)} <= names
    assert not any("can't be told" in check.finding for check in packages.packages(declared.packages))


def test_every_line_of_pyproject_is_judged_alike_without_packaging(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = requirements.declared()
    assert declared is not None
    for line in declared.packages:
        ours, theirs = requirements.parse(line), Requirement(line)
        assert (ours.name, SpecifierSet(ours.versions)) == (theirs.name, theirs.specifier)
        assert (ours.marker == "") == (theirs.marker is None)
        for system, machine in MACHINES:
            with monkeypatch.context() as planted:
                planted.setattr(platform, "system", lambda system=system: system)
                planted.setattr(platform, "machine", lambda machine=machine: machine)
                expected = theirs.marker is None or theirs.marker.evaluate(
                    {"platform_system": system, "platform_machine": machine, "extra": ""}
                )
                assert (ours.marker == "" or requirements.applies_alone(ours.marker)) == expected


def test_triton_is_for_linux_on_both_machines_that_have_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    declared = requirements.declared()
    assert declared is not None
    (line,) = (line for line in declared.packages if line.startswith("triton"))
    for system, machine in MACHINES:
        monkeypatch.setattr(platform, "system", lambda system=system: system)
        monkeypatch.setattr(platform, "machine", lambda machine=machine: machine)
        assert requirements.applies_alone(requirements.parse(line).marker) == (system == "Linux")


RANGES = (">=2.11,<2.14", "<2.14,>=2.11", ">=3", "<6", ">=2.11.1", "==2.12", "!=2.12.0", "")
VERSIONS = ("2.10.9", "2.11", "2.11.0", "2.11rc1", "2.12", "2.13.0+cpu", "2.13.1.post1", "2.14", "2.14.0rc1", "10.0")


@pytest.mark.parametrize("versions", RANGES)
@pytest.mark.parametrize("version", VERSIONS)
def test_ranges_are_judged_alike_without_packaging(version: str, versions: str) -> None:
    assert requirements.meets_alone(version, versions) == SpecifierSet(versions).contains(version, prereleases=True)


@pytest.mark.parametrize("marker", ["python_version < '4'", "extra in 'test'", "platform_system", "not ("])
def test_a_marker_that_is_not_covered_is_said_to_be(marker: str) -> None:
    with pytest.raises(UncoveredError):
        requirements.applies_alone(marker)


@pytest.mark.parametrize(("version", "versions"), [("1.0", "~=1.0"), ("1.0", "==1.*"), ("nightly", ">=1")])
def test_a_range_that_is_not_covered_is_said_to_be(version: str, versions: str) -> None:
    with pytest.raises(UncoveredError):
        requirements.meets_alone(version, versions)


def test_what_can_not_be_told_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("packaging", "packaging.markers", "packaging.specifiers"):
        monkeypatch.setitem(sys.modules, name, None)
    lines = ("rich~=13.9", "rich; python_version < '4'", "rich @ https://example.org/rich.whl")
    found = packages.packages(lines)
    assert [check.status for check in found] == ["warn"] * 3
    assert all("can't be told without the package packaging" in check.finding for check in found)
    assert {check.remedy for check in found} == {"pip install packaging"}


def test_a_damaged_installation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda name: None)
    (check,) = packages.packages(("rich>=1",))
    assert (check.status, check.remedy) == ("missing", "pip install 'rich>=1'")


@pytest.mark.usefixtures("_either_way")
def test_python_outside_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.8.1")
    check = packages.python(">=3.11")
    assert (check.status, check.finding) == ("missing", "3.8.1, outside >=3.11")


def absent(name: str) -> None:
    raise importlib.metadata.PackageNotFoundError(name)


def test_a_checkout_that_is_not_installed_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    found = packages.all_of_them()
    assert (found[1].name, found[1].status) == ("perfbench", "warn")
    assert {"torch", "rich"} <= {check.name for check in found}


def test_neither_installed_nor_a_checkout(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    monkeypatch.setattr(importlib.metadata, "distribution", absent)
    assert requirements.declared(tmp_path) is None
    monkeypatch.setattr(requirements, "declared", lambda: None)
    assert packages.all_of_them() == [
        Check(
            "perfbench",
            "missing",
            "not installed in this Python, and no pyproject.toml beside it says what it requires",
            "run pip install -e . in its checkout",
        )
    ]


def test_an_installed_copy_says_it_itself(tmp_path: Path) -> None:
    declared = requirements.declared(tmp_path)
    assert declared is not None, "the tests run where perfbench is installed"
    assert declared.python == ">=3.11"
    assert any(line.startswith("torch") for line in declared.packages)

"""Python and the packages that perfbench requires, against their ranges. Needs nothing but the standard library."""

from __future__ import annotations

import importlib.metadata
import platform

from perfbench.doctor import requirements
from perfbench.doctor.check import Check
from perfbench.doctor.requirements import UncoveredError

INSTALL = "pip install "


def all_of_them() -> list[Check]:
    """Python, perfbench itself where it is not installed, and every package."""
    declared = requirements.declared()
    if declared is None:
        finding = "not installed in this Python, and no pyproject.toml beside it says what it requires"
        return [Check("perfbench", "missing", finding, "run pip install -e . in its checkout")]
    return [python(declared.python), *perfbench(), *packages(declared.packages)]


def python(wanted: str) -> Check:
    """Python's version against perfbench's own requirement."""
    version = platform.python_version()
    if not requirements.meets(version, wanted):
        remedy = f"make a virtual environment of Python {wanted}"
        return Check("python", "missing", f"{version}, outside {wanted}", remedy)
    return Check("python", "ok", version)


def perfbench() -> list[Check]:
    """A warning where it runs from a checkout that is only on the path; else nothing."""
    if requirements.is_installed():
        return []
    finding = "not installed in this Python: it runs from its checkout, which has to be on PYTHONPATH"
    return [Check("perfbench", "warn", finding, "run pip install -e . in its checkout")]


def packages(lines: tuple[str, ...]) -> list[Check]:
    """Every package that is required here, extras left out, against its range."""
    found = []
    for line in lines:
        try:
            wanted = requirements.parse(line)
            if requirements.applies(wanted.marker):
                found.append(_package(wanted))
        except UncoveredError as error:
            name = line.split(";")[0].strip()
            finding = f"whether it is met can't be told without the package packaging ({error})"
            found.append(Check(name, "warn", finding, f"{INSTALL}packaging"))
    return found


def _package(wanted: requirements.Wanted) -> Check:
    remedy = f"{INSTALL}'{wanted.name}{wanted.versions}'"
    try:
        version = importlib.metadata.version(wanted.name)
    except importlib.metadata.PackageNotFoundError:
        finding = f"not installed; perfbench needs {wanted.versions or 'it'}"
        return Check(wanted.name, "missing", finding, remedy)
    if not version:
        return Check(wanted.name, "missing", "its installation is damaged: it names no version", remedy)
    if not requirements.meets(version, wanted.versions):
        return Check(wanted.name, "warn", f"{version}, outside the tested range {wanted.versions}", remedy)
    return Check(wanted.name, "ok", version)

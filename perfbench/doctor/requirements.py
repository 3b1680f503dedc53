"""What perfbench requires, and whether a version or a marker meets it: by `packaging`, or without it by the standard
library alone.

Without `packaging` this covers what pyproject.toml uses and little more. Of markers: `platform_system`,
`platform_machine` and `extra`, compared by == and !=, joined by and, or and parentheses. Of ranges: >=, >, <=, <, ==
and != with plain numbers, a pre-release counting as before its release. No `~=`, `===`, `.*`, epochs or URLs: for these
it raises UncoveredError, and nobody guesses.
"""

from __future__ import annotations

import ast
import importlib.metadata
import operator
import platform
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
# What pyproject.toml calls the distribution: `perfbench` on the package index is another project.
DISTRIBUTION = "adapter-perfbench"
_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;\s*(.*\S)\s*)?")
_CLAUSE = re.compile(r"(>=|<=|==|!=|>|<)\s*v?(\d+(?:\.\d+)*)")
_VERSION = re.compile(r"v?(\d+(?:\.\d+)*)\s*[._-]?(a|b|c|rc|alpha|beta|pre|preview|dev)?", re.IGNORECASE)
_COMPARE: dict[str, Callable[[Any, Any], bool]] = {
    ">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt, "==": operator.eq, "!=": operator.ne,
}  # fmt: skip


class UncoveredError(Exception):
    """What can't be judged without the package `packaging`."""


@dataclass(frozen=True)
class Wanted:
    """One requirement: a package's name, the range as it is written, and the marker, empty if there is none."""

    name: str
    versions: str
    marker: str


@dataclass(frozen=True)
class Declared:
    """What perfbench declares: its range of Python, and its packages as lines."""

    python: str
    packages: tuple[str, ...]


def declared(checkout: Path = CHECKOUT) -> Declared | None:
    """From the pyproject.toml of the checkout that runs, else as installed; None where there is neither."""
    try:
        project = tomllib.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        if project["name"] == DISTRIBUTION:
            return Declared(project["requires-python"], tuple(project["dependencies"]))
    except (OSError, ValueError, KeyError):
        pass  # no checkout of ours
    try:
        found = importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None
    return Declared(found.metadata["Requires-Python"] or "", tuple(found.requires or ()))


def is_installed() -> bool:
    """Whether this Python has perfbench as a package, and not only on its path."""
    try:
        importlib.metadata.distribution(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def parse(line: str) -> Wanted:
    """A line such as "torch>=2.11,<2.14" with or without a marker. UncoveredError where it is another."""
    found = _REQUIREMENT.fullmatch(line)
    if found is None:
        raise UncoveredError(line)
    return Wanted(found[1], found[2].strip(), found[3] or "")


def applies(marker: str) -> bool:
    """Whether a requirement with this marker is one of this machine, extras left out. UncoveredError."""
    if not marker:
        return True
    try:
        from packaging.markers import Marker
    except ImportError:
        return applies_alone(marker)
    return bool(Marker(marker).evaluate({"extra": ""}))


def applies_alone(marker: str) -> bool:
    """The same by the standard library alone."""
    values = {"platform_system": platform.system(), "platform_machine": platform.machine(), "extra": ""}

    def value(node: ast.expr) -> str:
        if isinstance(node, ast.Name) and node.id in values:
            return values[node.id]
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        raise UncoveredError(marker)

    def true(node: ast.expr) -> bool:
        if isinstance(node, ast.BoolOp):
            parts = [true(part) for part in node.values]
            return all(parts) if isinstance(node.op, ast.And) else any(parts)
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], (ast.Eq, ast.NotEq)):
            same = value(node.left) == value(node.comparators[0])
            return same == isinstance(node.ops[0], ast.Eq)
        raise UncoveredError(marker)

    try:
        return true(ast.parse(marker.strip(), mode="eval").body)
    except SyntaxError:
        raise UncoveredError(marker) from None


def meets(version: str, versions: str) -> bool:
    """Whether a version lies in a range, pre-releases too. UncoveredError."""
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return meets_alone(version, versions)
    return SpecifierSet(versions).contains(version, prereleases=True)


def meets_alone(version: str, versions: str) -> bool:
    """The same by the standard library alone."""
    own = _VERSION.match(version)
    if own is None:
        raise UncoveredError(version)
    for clause in filter(None, (part.strip() for part in versions.split(","))):
        found = _CLAUSE.fullmatch(clause)
        if found is None:
            raise UncoveredError(clause)
        # A pre-release is older than its release, and, as in PEP 440, not below it either: "<2" takes no 2rc1.
        early = -1 if own[2] and found[1] != "<" else 0
        if not _COMPARE[found[1]]((*_numbers(own[1]), early), (*_numbers(found[2]), 0)):
            return False
    return True


def _numbers(version: str) -> list[int]:
    """The numbers of a version, filled with zeros to a length that none has."""
    numbers = [int(part) for part in version.split(".")]
    return numbers + [0] * (8 - len(numbers))

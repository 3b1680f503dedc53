"""What `perfbench verify` found: one JSON, and one Markdown table made from it alone. Free of torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from perfbench import exit_codes
from perfbench.errors import RunDirectoryError
from perfbench.files import strict_json
from perfbench.files.plain_text import printable_tree
from perfbench.files.yaml_source import dotted
from perfbench.run_folder.run_schema import ENVIRONMENT, LARGEST, Schema
from perfbench.spec.scenario_schema import problems

SCHEMA_VERSION = 1
JSON, MARKDOWN = "verify.json", "verify.md"
PASS, FAIL, SKIPPED = "pass", "FAIL", "skipped"
_STYLES = {PASS: "green", FAIL: "bold red", SKIPPED: "yellow"}


_TEXT: Schema = {"type": "string"}
_STATUS: Schema = {"type": "string", "enum": [PASS, FAIL, SKIPPED], "title": "result"}
_SOFTWARE = ("perfbench", "torch", "triton")
_FINDING: Schema = {
    "type": "object",
    "properties": {
        "what": _TEXT,
        "status": _STATUS,
        "finding": _TEXT,
        "figures": {"type": "object"},
    },
    "required": ["what", "status", "finding"],
}
_SECTION: Schema = {
    "type": "object",
    "properties": {
        "status": _STATUS,
        "findings": {"type": "array", "items": _FINDING},
        "seconds": {"type": "number", "minimum": 0, "maximum": LARGEST},
    },
    "required": ["status", "findings", "seconds"],
}
# What --resume and the table trust.
_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "device": {"type": "object", "properties": {"name": _TEXT}, "required": ["name"]},
        "environment": {
            **ENVIRONMENT,
            "properties": {
                **ENVIRONMENT["properties"],
                "versions": {
                    "type": "object",
                    "properties": {name: {} for name in _SOFTWARE},
                    "required": list(_SOFTWARE),
                },
                "kernel_settings": {"type": "object"},
            },
            "required": ["versions", "kernel_settings", "checkout"],
        },
        "full": {"type": "boolean"},
        "budget_s": {"type": ["number", "null"], "minimum": 0, "maximum": LARGEST},
        "left_out": {"type": "array", "items": _TEXT},
        "sections": {"type": "object", "properties": {}, "additionalProperties": _SECTION},
    },
    "required": ["device", "environment", "full", "budget_s", "sections"],
}


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. status: PASS, FAIL or SKIPPED; finding: in words, why where it is not PASS;
    figures: the numbers behind it, for the JSON."""

    what: str
    status: str
    finding: str
    figures: dict[str, Any] = field(default_factory=dict)


def status_of(findings: list[dict[str, Any]]) -> str:
    """FAIL where any fails, SKIPPED where nothing was done, else PASS."""
    statuses = {finding["status"] for finding in findings}
    return FAIL if FAIL in statuses else PASS if PASS in statuses else SKIPPED


def verdict(found: dict[str, Any]) -> str:
    """One line: whether all passed, what failed, and what was skipped."""
    findings = list(_findings(found))
    failed = [f"{section}: {finding['what']}" for section, finding in findings if finding["status"] == FAIL]
    skipped = [f"{section}: {finding['what']}" for section, finding in findings if finding["status"] == SKIPPED]
    passed = len(findings) - len(failed) - len(skipped)
    outcome = "FAILED" if failed else "PASSED" if passed else "NOTHING VERIFIED"
    text = f"{outcome} on {found['device']['name']}: {passed} passed"
    if failed:
        text += f"; failed: {', '.join(failed)}"
    return text + (f"; {len(skipped)} skipped: {_shortened(skipped)}" if skipped else "; nothing skipped")


def exit_code(found: dict[str, Any]) -> int:
    """0 where no check failed and some passed (skips are named), else 1."""
    statuses = {finding["status"] for _, finding in _findings(found)}
    return exit_codes.OK if FAIL not in statuses and PASS in statuses else exit_codes.FAILED


def markdown(found: dict[str, Any]) -> str:
    """The verdict, where it ran, and the table."""
    found = printable_tree(found)
    lines = [f"**{_cell(verdict(found))}**", "", _cell(_where(found)), ""]
    lines += ["| section | what | result | finding |", "| --- | --- | --- | --- |"]
    for section, finding in _findings(found):
        cells = (section, finding["what"], finding["status"], finding["finding"])
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    return "\n".join(lines) + "\n"


def render(found: dict[str, Any], console: Console | None = None) -> None:
    """Prints the verdict first, then the table."""
    console, found = console or Console(), printable_tree(found)
    failed = exit_code(found) != 0
    console.print(Text(verdict(found), _STYLES[FAIL] if failed else _STYLES[PASS]))
    console.print(Text(_where(found), "dim"))
    table = Table("section", "what", "result", "finding", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    before = None
    for section, finding in _findings(found):
        result = Text(finding["status"], _STYLES[finding["status"]])
        name = "" if section == before else section
        table.add_row(Text(name), Text(finding["what"]), result, Text(finding["finding"]))
        before = section
    console.print(table)


def write(found: dict[str, Any], folder: Path) -> None:
    """Puts both files into `folder`, each as a whole or not at all. RunDirectoryError where it can't be written."""
    text = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in ((JSON, text), (MARKDOWN, markdown(found))):
            temporary = folder / f".{name}.tmp"
            temporary.write_text(content, encoding="utf-8")
            temporary.replace(folder / name)
    except OSError as error:
        raise RunDirectoryError(f"{folder}: can't be written ({error.strerror}); give another --out") from None


def read(folder: Path) -> dict[str, Any]:
    """What an earlier `perfbench verify --out` left. RunDirectoryError where that is nothing that can be read."""
    file = folder / JSON
    try:
        found: dict[str, Any] = strict_json.parse(file.read_bytes())
    except FileNotFoundError:
        raise RunDirectoryError(f"{folder}: has no {JSON} to go on with; leave --resume out") from None
    except (OSError, ValueError) as error:
        raise RunDirectoryError(f"{file}: can't be read ({error}); give another --out") from None
    if not isinstance(found, dict) or found.get("schema_version") != SCHEMA_VERSION:
        raise RunDirectoryError(f"{file}: expected schema_version {SCHEMA_VERSION}; give another --out")
    for problem in problems(found, _SCHEMA):
        raise RunDirectoryError(f"{file}: {dotted(problem.place)}: {problem.message}; give another --out")
    return found


def _findings(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, section in found["sections"].items():
        for finding in section["findings"]:
            yield name, finding


def _where(found: dict[str, Any]) -> str:
    seconds = sum(section["seconds"] for section in found["sections"].values())
    versions = found["environment"]["versions"]
    software = ", ".join(f"{name} {versions[name]}" for name in _SOFTWARE)
    limit = "" if found["budget_s"] is None else f" of at most {found['budget_s']:.0f}"
    tuned = ", ".join(f"{source} ({gpu})" for gpu, source in found["environment"]["kernel_settings"].items())
    left_out = f"; left out: {', '.join(found['left_out'])}" if found.get("left_out") else ""
    return f"{seconds:.0f} s{limit}{left_out}; {software}; kernel settings: {tuned or 'defaults (no GPU)'}"


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _cell(text: str) -> str:
    """Text from anywhere, as one cell of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")

"""A repository as a stranger has it: a method of theirs, in a file with a package beside it, at several commits."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.perfbench.gate.runs import ROOT

TUTORIAL = ROOT / "docs" / "tutorials" / "extend.md"
SCENARIO = """\
backbone: llama-tiny
dtype: fp32
device: cpu
runtime: static
methods: [value-scale]
workload: {prompt_tokens: 6, new_tokens: 3, requests: 2, tenants: 2}
warmup: 1
"""
POLICY = "exact: {}\ntimed: {primary: [{figure: decode_tokens_per_s, cases: '*/value-scale*'}]}\n"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def commit(folder: Path, tag: str, files: dict[str, str]) -> None:
    """The files at their paths, committed and tagged."""
    for path, text in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text, encoding="utf-8")
    git(folder, "add", "-A")
    git(folder, "commit", "--quiet", "-m", tag)
    git(folder, "tag", tag)


def method() -> str:
    """The plugin of the tutorial, which asks a module beside it what it scales."""
    text = TUTORIAL.read_text(encoding="utf-8")
    code: str = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[0]
    every = "for layer in range(shape.layers) for module in MODULES}"
    for old, new in {
        "from dataclasses import dataclass\n": "from dataclasses import dataclass\n\nfrom scaling import MODULES\n",
        'v.l": (shape.features("v")[1],) for layer in range(shape.layers)}': (
            '{module}.l": (shape.features(module)[1],) ' + every
        ),
        '{"v": parameters[f"layers.{layer}.v.l"] - 1}': (
            '{module: parameters[f"layers.{layer}.{module}.l"] - 1 for module in MODULES}'
        ),
        '(layer, "v"): parameters[f"layers.{layer}.v.l"] for layer in range(shape.layers)}': (
            '(layer, module): parameters[f"layers.{layer}.{module}.l"] ' + every
        ),
        '("v",)': "MODULES",
    }.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    return code


def make(folder: Path) -> Path:
    """`base`; `mine`, a branch of one commit, whose method scales two modules; `main`, where others have changed
    README.md since, with both merged: what CI checks out."""
    git(folder.parent, "init", "--quiet", "--initial-branch=main", str(folder))
    files = {"value_scale.py": method(), "src/scaling.py": 'MODULES = ("v",)\n', "README.md": "A method.\n"}
    commit(folder, "base", files | {"gate.yaml": SCENARIO, "policy.yaml": POLICY})
    git(folder, "checkout", "--quiet", "-b", "mine")
    commit(folder, "more", {"src/scaling.py": 'MODULES = ("v", "o")\n'})
    git(folder, "checkout", "--quiet", "main")
    commit(folder, "readme", {"README.md": "A method, told better.\n"})
    git(folder, "merge", "--quiet", "--no-ff", "-m", "merge", "mine")
    return folder

"""Who imports whom: arrows between the rooms of the code point down only, and `--help` loads no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Modules of perfbench that touch the device; those of TOP stand above; every other one is core. One in a folder of its
# own is told by folder and name.
RUNTIME = {"arms", "backbone", "workload", "measure", "measured_roof", "memory", "counts", "check", "worker"}
RUNTIME |= {"ab_worker", "best_choices", "kept_worker", "oracle"}
RUNTIME |= {f"profiling.{name}" for name in ("memory_timeline", "probes", "profile_worker", "ranges")}
TOP = {"__main__", "cli", "commands", "inputs", "params", "profiling.profile", "roof_table", "run"}
TOP |= {f"verify.{name}" for name in ("command", "grid", "sections", "worker")}
# kernels/<name>.py that looks at them as the runtimes call them.
COMMANDS_OF_KERNELS = {"resources"}
# methods/<name>.py that a scenario is checked with, so they load no torch.
REGISTRY = {"__init__", "registry", "shape"}

HEAVY = {"torch", "transformers", "peft", "triton", "safetensors", "accelerate", "datasets"}

# Room -> the rooms of perfbench it may import at module level.
MAY_IMPORT = {
    "errors": set[str](),
    "kernels": {"kernels"},
    "registry": {"errors", "registry"},
    "methods": {"errors", "registry", "methods"},
    "core": {"errors", "registry", "core"},
    "runtime": {"errors", "registry", "methods", "kernels", "core", "runtime"},
    "finetune": {"errors", "registry", "methods", "kernels", "core", "runtime", "finetune"},
    "top": {"errors", "registry", "core", "top"},
}

# Room -> the only third-party packages it may import, at any level. Rooms that are not here may import any,
# but only `runtime` and `finetune` a heavy one at module level.
ONLY_PACKAGES = {
    "errors": set[str](),
    "kernels": {"torch", "triton"},
    "registry": set[str](),
    "methods": {"torch", "safetensors"},
}

# Inside functions, the top may import everything, and these two torch: they ask it for a device.
LAZY_TORCH = {"perfbench/device.py", "perfbench/doctor/machine.py"}


@dataclass(frozen=True)
class Import:
    """One imported name, its line, and whether importing the file imports it (not inside a function, not only
    for type checkers)."""

    name: str
    line: int
    at_module_level: bool


def imports_of(source: str) -> list[Import]:
    """Every import of a Python source; `from a import b` counts as a.b, a relative import keeps its dots."""
    found: list[Import] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found.extend(Import(f"{module}.{alias.name}", node.lineno, top) for alias in node.names)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            top = False
        for child in ast.iter_child_nodes(node):
            visit(child, top)

    visit(ast.parse(source), True)
    return found


def room_of(module: str) -> str:
    """The room of a dotted name inside perfbench."""
    parts = [*module.split("."), ""]
    if parts[1] == "kernels":
        return "runtime" if parts[2] in COMMANDS_OF_KERNELS else "kernels"
    if parts[1] == "methods":
        return "registry" if parts[2] in REGISTRY else "methods"
    if parts[1] == "finetune":
        return "finetune"
    if parts[1] == "verify" and parts[2] in {"", "__init__", "report"}:
        return "core"
    names = {parts[1], ".".join(parts[1:3])}
    if names & TOP:
        return "top"
    if parts[1] in {"runtimes", "verify"} or names & RUNTIME:
        return "runtime"
    return "errors" if parts[1] == "errors" else "core"


def arrows_up(path: str, source: str) -> list[str]:
    """What `source`, which stands at `path` under the root, imports and may not: one line each."""
    module = ".".join(Path(path).with_suffix("").parts)
    room = room_of(module if module.startswith("perfbench") else f"perfbench.{module}")
    wrong = []
    for imported in imports_of(source):
        package = imported.name.split(".")[0]
        if not package:
            wrong.append(f"{path}:{imported.line}: {imported.name} is relative; write it from perfbench on")
        elif package in {"kernels", "methods", "scenarios"}:
            wrong.append(f"{path}:{imported.line}: {imported.name}; write perfbench.{imported.name}")
        elif package == "perfbench":
            target = room_of(imported.name)
            lazily = room == "top" and not imported.at_module_level
            if target not in MAY_IMPORT[room] and not lazily:
                wrong.append(f"{path}:{imported.line}: {room} imports {imported.name} of {target}")
        elif package not in sys.stdlib_module_names and not _may_import(path, room, package, imported):
            wrong.append(f"{path}:{imported.line}: {room} imports {package}")
    return wrong


def _may_import(path: str, room: str, package: str, imported: Import) -> bool:
    if room in ONLY_PACKAGES:
        return package in ONLY_PACKAGES[room]
    if room in {"runtime", "finetune"} or package not in HEAVY:
        return True
    return not imported.at_module_level and (room == "top" or path in LAZY_TORCH)


def sources() -> list[Path]:
    """Every Python file of the rooms; perfbench/kernels and perfbench/methods are links to the top."""
    ours = [path for path in sorted((ROOT / "perfbench").rglob("*.py")) if not _linked(path)]
    return [path for folder in ("kernels", "methods") for path in sorted((ROOT / folder).glob("*.py"))] + ours


def test_every_arrow_points_down():
    assert len(sources()) > 10
    wrong = [
        line
        for path in sources()
        for line in arrows_up(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8"))
    ]
    assert wrong == []


def _linked(path: Path) -> bool:
    return path.resolve() != ROOT.resolve() / path.relative_to(ROOT)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/low_rank.py", "import transformers\n"),
        ("kernels/low_rank.py", "from perfbench.methods.plan import LowRank\n"),
        ("kernels/low_rank.py", "def f():\n    import numpy\n"),
        ("kernels/low_rank.py", "from perfbench.kernels import resources\n"),
        ("methods/lora.py", "from perfbench.kernels import low_rank\n"),
        ("methods/lora.py", "from perfbench import kernels\n"),
        ("methods/lora.py", "import peft\n"),
        ("methods/lora.py", "from .plan import LowRank\n"),
        ("methods/registry.py", "import torch\n"),
        ("methods/registry.py", "from perfbench.methods import lora\n"),
        ("methods/shape.py", "def f():\n    import torch\n"),
        ("perfbench/errors.py", "from perfbench import result\n"),
        ("perfbench/stats.py", "import torch.nn.functional as F\n"),
        ("perfbench/stats.py", "def f():\n    import torch\n"),
        ("perfbench/stats.py", "from perfbench.worker import main\n"),
        ("perfbench/stats.py", "from perfbench.runtimes import generation\n"),
        ("perfbench/stats.py", "from perfbench.methods.bank import Bank\n"),
        ("perfbench/stats.py", "from methods import bank\n"),
        ("perfbench/doctor/machine.py", "try:\n    import torch\nexcept ImportError:\n    torch = None\n"),
        ("perfbench/cli.py", "from perfbench.worker import main\n"),
        ("perfbench/a_new_module.py", "import transformers\n"),
        ("perfbench/worker.py", "from perfbench.cli import main\n"),
        ("perfbench/worker.py", "from perfbench.finetune import recipe\n"),
    ],
)
def test_a_planted_arrow_up_is_found(tmp_path, path, source):
    planted = tmp_path / path
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    (line,) = arrows_up(planted.relative_to(tmp_path).as_posix(), planted.read_text())
    assert line.startswith(f"{path}:")


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/low_rank.py", "import math\nimport torch\nimport triton.language as tl\n"),
        ("methods/lora.py", "import torch\nfrom perfbench.methods import plan\n"),
        ("perfbench/doctor/machine.py", "def f():\n    import torch\n"),
        ("perfbench/cli.py", "def f():\n    from perfbench.worker import main\n"),
        ("perfbench/worker.py", "import peft\nfrom perfbench.kernels import low_rank\n"),
    ],
)
def test_an_arrow_down_is_not(path, source):
    assert arrows_up(path, source) == []


def test_kernels_is_a_namespace_package():
    """A regular package of that name would shadow Hugging Face's, which transformers imports."""
    assert (ROOT / "kernels").is_dir()
    assert not (ROOT / "kernels" / "__init__.py").exists()


def heavy_after(code: str) -> set[str]:
    """The heavy packages that a fresh Python has loaded after running `code`."""
    report = "import sys; print('\\nloaded', *sorted({name.split('.')[0] for name in sys.modules}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=60, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return HEAVY & set(done.stdout.splitlines()[-1].split()[1:])


def test_core_modules_load_nothing_heavy():
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in sources()]
    core = [name for name in modules if name.startswith("perfbench.") and room_of(name) in {"core", "top", "errors"}]
    core = [name for name in core if not name.endswith(("__init__", "__main__"))]
    assert {"perfbench.backbone_config", "perfbench.profiling.view"} <= set(core)
    assert heavy_after(f"import {', '.join(core)}, perfbench.methods.registry") == set()


def test_heavy_after_finds_what_was_loaded():
    assert heavy_after("import safetensors") == {"safetensors"}


@pytest.mark.parametrize("arguments", [["--help"], ["validate", "scenarios/smoke.yaml"]])
def test_quick_commands_load_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = ['perfbench', *{arguments}]\n"
        "from perfbench.cli import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "assert code in (0, None), code"
    )
    assert heavy_after(code) == set()

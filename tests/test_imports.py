"""Who imports whom: arrows between the rooms of the code point down only, and `--help` loads no torch."""

from __future__ import annotations

import ast
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

HEAVY = {"torch", "transformers", "peft", "triton", "safetensors", "accelerate", "datasets"}

# The floors of the house, from the ground up: a file imports, at module level, only from its own floor and those below.
# A folder that is not here stands with its parent; a file at the top of perfbench is a room of its own.
FLOORS = (
    {"errors", "exit_codes"},
    {"methods.registry", "methods.shape", "methods.options", "methods.dtypes"},
    {"files", "figures", "machine", "spec", "run_folder", "progress", "crash_report", "interruption"},
    {"report", "history", "gate", "doctor"},
    {"measure", "profiling", "verify", "traffic", "serving", "capacity", "cluster"},
    {"kernels"},
    {"methods"},
    {"runtimes", "proof", "peft", "on_device", "ab_worker"},
    {"finetune", "testing"},
    {"__init__", "__main__", "api", "cli", "commands"},
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Rooms whose files may import torch and its kin at module level. Everything else is free of torch: its functions may
# import from any floor, where a command has to touch the device, but not those of STRICTLY_FREE.
HEAVY_ROOMS = {"kernels", "methods", "runtimes", "proof", "peft", "on_device", "ab_worker", "finetune", "testing"}
STRICTLY_FREE = {room for floor in FLOORS[:4] for room in floor}

# Room -> the only third-party packages it may import, at any level.
ONLY_PACKAGES = {
    "errors": set[str](),
    "methods.registry": set[str](),
    "exit_codes": set[str](),
    "methods.shape": set[str](),
    "methods.options": set[str](),
    "methods.dtypes": set[str](),
    "kernels": {"torch", "triton"},
    "methods": {"torch", "safetensors"},
}
# Room -> the only rooms it may import; the other rooms of its floor are closed to it.
ONLY_ROOMS = {"kernels": {"kernels"}, "methods": {"methods", "errors"} | FLOORS[1]}

# These two ask torch for a device, inside functions.
LAZY_TORCH = {"perfbench/machine/device.py", "perfbench/doctor/machine.py"}


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
    parts = module.split(".")[1:]
    if ".".join(parts[:2]) in FLOOR_OF:
        return ".".join(parts[:2])
    if "on_device" in parts[:2]:
        return "on_device"
    return parts[0] if parts else "__init__"


def arrows_up(path: str, source: str) -> list[str]:
    """What `source`, which stands at `path` under the root, imports and may not: one line each."""
    module = ".".join(Path(path).with_suffix("").parts)
    room = room_of(module if module.startswith("perfbench") else f"perfbench.{module}")
    wrong = []
    if room not in FLOOR_OF:
        wrong.append(f"{path}:1: {room} stands on no floor of FLOORS")
        return wrong
    for imported in imports_of(source):
        package = imported.name.split(".")[0]
        if not package:
            wrong.append(f"{path}:{imported.line}: {imported.name} is relative; write it from perfbench on")
        elif package in {"kernels", "methods", "scenarios"}:
            wrong.append(f"{path}:{imported.line}: {imported.name}; write perfbench.{imported.name}")
        elif package == "perfbench":
            if not _may_import_room(room, room_of(imported.name), imported):
                wrong.append(f"{path}:{imported.line}: {room} imports {imported.name}")
        elif package not in sys.stdlib_module_names and not _may_import_package(path, room, package, imported):
            wrong.append(f"{path}:{imported.line}: {room} imports {package}")
    return wrong


def _may_import_room(room: str, target: str, imported: Import) -> bool:
    if target not in FLOOR_OF:
        return target == "__version__"
    if room in ONLY_ROOMS:
        return target in ONLY_ROOMS[room]
    if room not in STRICTLY_FREE | HEAVY_ROOMS and not imported.at_module_level:
        return True
    if room not in HEAVY_ROOMS and target in HEAVY_ROOMS:
        return False
    return FLOOR_OF[target] <= FLOOR_OF[room]


def _may_import_package(path: str, room: str, package: str, imported: Import) -> bool:
    if room in ONLY_PACKAGES:
        return package in ONLY_PACKAGES[room]
    if room in HEAVY_ROOMS or package not in HEAVY:
        return True
    return not imported.at_module_level and (room not in STRICTLY_FREE or path in LAZY_TORCH)


def sources() -> list[Path]:
    """Every Python file of the rooms; perfbench/kernels and perfbench/methods are links to the top."""
    ours = [path for path in sorted((ROOT / "perfbench").rglob("*.py")) if not _linked(path)]
    return [path for folder in ("kernels", "methods") for path in sorted((ROOT / folder).rglob("*.py"))] + ours


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
        ("kernels/low_rank.py", "from perfbench.verify.on_device import resources\n"),
        ("methods/lora.py", "from perfbench.kernels import low_rank\n"),
        ("methods/lora.py", "from perfbench import kernels\n"),
        ("methods/lora.py", "import peft\n"),
        ("methods/lora.py", "from .plan import LowRank\n"),
        ("methods/registry.py", "import torch\n"),
        ("methods/registry.py", "from perfbench.methods import lora\n"),
        ("methods/shape.py", "def f():\n    import torch\n"),
        ("perfbench/errors.py", "from perfbench.figures import stats\n"),
        ("perfbench/figures/stats.py", "import torch.nn.functional as F\n"),
        ("perfbench/figures/stats.py", "def f():\n    import torch\n"),
        ("perfbench/figures/stats.py", "from perfbench.measure.on_device.worker import main\n"),
        ("perfbench/figures/stats.py", "from perfbench.runtimes import generation\n"),
        ("perfbench/figures/stats.py", "from perfbench.methods.bank import Bank\n"),
        ("perfbench/figures/stats.py", "from methods import bank\n"),
        ("perfbench/doctor/machine.py", "try:\n    import torch\nexcept ImportError:\n    torch = None\n"),
        ("perfbench/cli.py", "from perfbench.measure.on_device.worker import main\n"),
        ("perfbench/a_new_module.py", "import transformers\n"),
        ("perfbench/measure/on_device/worker.py", "from perfbench.cli import main\n"),
        ("perfbench/measure/on_device/worker.py", "from perfbench.finetune import recipe\n"),
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
        ("perfbench/cli.py", "def f():\n    from perfbench.measure.on_device.worker import main\n"),
        ("perfbench/measure/on_device/worker.py", "import peft\nfrom perfbench.kernels import low_rank\n"),
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
    core = [name for name in modules if name.startswith("perfbench.") and room_of(name) not in HEAVY_ROOMS]
    core = [name for name in core if not name.endswith(("__init__", "__main__"))]
    assert {"perfbench.spec.backbone_config", "perfbench.profiling.view"} <= set(core)
    assert heavy_after(f"import {', '.join(core)}, perfbench.methods.registry") == set()


def test_heavy_after_finds_what_was_loaded():
    assert heavy_after("import safetensors") == {"safetensors"}


def test_importing_perfbench_loads_nothing_heavy():
    assert heavy_after("import perfbench; perfbench.run, perfbench.Run, perfbench.accuracy, perfbench.search") == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["validate", "scenarios/smoke.yaml"],
        ["list"],
        ["list", "lora"],
        ["params"],
        shlex.split("plan --model llama2-7b --device h100 --tenants 9 --rate 1 --slo ttft=500ms,itl=40ms"),
    ],
)
def test_quick_commands_load_nothing_heavy(arguments):
    code = (
        f"import sys; sys.argv = ['perfbench', *{arguments}]\n"
        "from perfbench.cli import main\n"
        "try:\n    code = main()\n"
        "except SystemExit as stop:\n    code = stop.code\n"
        "assert code in (0, None), code"
    )
    assert heavy_after(code) == set()

"""Whether two revisions would run the very same thing, told from their files before any process is started.

What is compared is every file that perfbench/ab_worker.py can come to import, however late, and the data files beside
these: a commit that changes another part of perfbench, or its documentation, has nothing that could be timed. What a
method from outside imports or reads nobody can tell: with one, every file counts but Markdown. Free of torch.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath

from perfbench.gate.revisions import Revision, files_of
from perfbench.spec.method_plugins import GROUP

WORKER = "perfbench/ab_worker.py"
# Their modules are imported by names that other files are asked for, so all of them count.
_BY_NAME = re.compile(r"(perfbench/)?(methods|kernels)/")
# It offers users the whole of perfbench, of which a worker calls nothing: of what only it names, functions are not
# followed.
_FRONT = "perfbench/__init__.py"
_MODULE = re.compile(r"perfbench(\.\w+)+\.?")


def same_code(arms: Mapping[str, Revision], scenario: Path, settings: Sequence[str]) -> str | None:
    """What was compared, in words, where both arms run the same; None where they don't, or where it can't be told."""
    one, other = arms["baseline"], arms["candidate"]
    if one.command or other.command or one.python != other.python or one.packages != other.packages:
        return None
    measured = [scenario.read_text(encoding="utf-8", errors="replace"), *settings]
    scenario_told = f"and {scenario.name} ({_digest(measured)})"
    if one.runner or one.plugins or entry_points(group=GROUP):
        every = _all_but_markdown(one)
        if every != _all_but_markdown(other):
            return None
        packages = f"the packages ({one.packages})" if one.packages else "this Python with its packages"
        return f"all {len(every)} files but Markdown ({_digest(every)}), {packages}, {scenario_told}"
    files = imported_files(one)
    if files is None or files != imported_files(other):
        return None
    return (
        f"the {len(files)} files that {WORKER} can import ({_digest(files)}), the packages and their constraints "
        f"({one.packages}), {scenario_told}"
    )


def _all_but_markdown(revision: Revision) -> dict[str, str]:
    """{path: git's hash} of every file of the commit that could matter, and of the files of --plugin."""
    own = {str(path): blob for path, blob in revision.plugins.items() if not path.is_relative_to(revision.folder)}
    return own | {path: blob for path, blob in files_of(revision).items() if not path.lower().endswith(".md")}


def imported_files(revision: Revision) -> dict[str, str] | None:
    """{path: git's hash} of what the worker of a revision can import; None where one of these files can't be read."""
    tracked = files_of(revision)
    # Path -> whether what its functions import is followed too.
    found = dict[str, int]()
    open_ = [(WORKER, True), *((path, True) for path in tracked if _BY_NAME.match(path))]
    while open_:
        path, whole = open_.pop()
        whole = whole and path != _FRONT
        if path not in tracked or found.get(path, -1) >= whole:
            continue
        found[path] = whole
        if path.endswith(".py"):
            try:
                names = set(_names(ast.parse((revision.folder / path).read_bytes()), whole))
            except (OSError, SyntaxError, ValueError):
                return None
            open_ += [(file, whole) for name in names for file in _files(name, tracked)]
            folder = PurePosixPath(path).parent
            beside = [one for one in tracked if PurePosixPath(one).parent == folder and not one.endswith(".py")]
            open_ += [(one, whole) for one in beside]
    return {path: tracked[path] for path in sorted(found)}


def _names(node: ast.AST, whole: bool) -> Iterator[str]:
    """Every module of perfbench that a file names, in an import or in a text, which may be the begin of a name; inside
    functions only where the `whole` of it is asked for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
        yield node.value
    elif whole or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in ast.iter_child_nodes(node):
            yield from _names(child, whole)


def _files(name: str, tracked: Mapping[str, str]) -> Iterator[str]:
    """The files that importing `name` can run: its packages, itself, and all below it where it ends with a dot."""
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        path = "/".join(parts[:count])
        yield from (f"{path}.py", f"{path}/__init__.py")
    if name.endswith("."):
        yield from (path for path in tracked if path.startswith("/".join(parts)))


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]

"""Methods from outside: of installed packages, and of files given with `--plugin`. Free of torch.

Nothing registers itself: an object is read. An installed package names it in the entry point group `perfbench.methods`,
the entry point's name being the method's and its object a `Method`; a file has a dict METHODS, name -> `Method`. What a
method's own file holds is said in `perfbench.methods.parameters`; `perfbench.testing.check_method` checks it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any, TypeVar

from perfbench.errors import PerfbenchError
from perfbench.files.paths import expanded
from perfbench.methods.options import MethodOptions
from perfbench.methods.registry import METHODS, Method
from perfbench.spec.option_schema import schema_of

GROUP = "perfbench.methods"
FUNCTIONS = ("shapes", "initialise", "randomise", "plan", "save", "load")

T = TypeVar("T")


@dataclass(frozen=True)
class Plugin:
    """Where `methods` came from: the absolute path of a file and the hash of its bytes, or a distribution with its
    version."""

    source: str
    methods: tuple[str, ...]
    sha256: str | None = None


# Source -> what was read from it, in this process.
_READ: dict[str, Plugin] = {}


def load(files: Iterable[str | Path] = ()) -> None:
    """Puts the methods of installed packages and of `files` into METHODS; what is there already is not read again.

    PerfbenchError, in one line with the plugin's name, for a file that is not there, one that raises, one without
    methods, and a method that is incomplete or whose name is taken.
    """
    for point in entry_points(group=GROUP):
        _load_entry_point(point)
    for file in files:
        _load_file(file)


def as_json() -> list[dict[str, Any]]:
    """The plugins of this process as plain JSON data: for run.json, and for the jobs of child processes."""
    return [{**dataclasses.asdict(plugin), "methods": list(plugin.methods)} for plugin in _READ.values()]


def load_again(plugins: list[dict[str, Any]]) -> None:
    """In a child process: the plugins that `as_json` told of. PerfbenchError where one is another by now."""
    if not plugins:
        return
    load(plugin["source"] for plugin in plugins if plugin["sha256"] is not None)
    read = {plugin["source"]: plugin for plugin in as_json()}
    for plugin in plugins:
        if read.get(plugin["source"]) != plugin:
            raise PerfbenchError(f"plugin {plugin['source']}: it was changed while the command ran; run it again")


def _load_entry_point(point: EntryPoint) -> None:
    where = f"plugin {point.value} (entry point {point.name!r} of {GROUP})"
    source = f"{point.dist.name} {point.dist.version}: {point.value}" if point.dist else point.value
    if source not in _READ:
        _add(where, {point.name: _or_refuse(where, point.load)}, Plugin(source, (point.name,)))


def _load_file(file: str | Path) -> None:
    where = f"--plugin {file}"
    path = expanded(str(file))
    if not path.is_file():
        raise PerfbenchError(f"{where}: no such file; expected a Python file with METHODS, a dict of name -> Method")
    path = path.resolve()
    if str(path) in _READ:
        return
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    name = f"perfbench_plugin_{re.sub(r'[^A-Za-z0-9_]', '_', path.stem)}_{digest[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PerfbenchError(f"{where}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses, and Method.options, look for it
    try:
        _or_refuse(where, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
        found = getattr(module, "METHODS", None)
        if found is METHODS or not isinstance(found, dict) or not found:
            got = "perfbench's own table" if found is METHODS else "none" if found is None else type(found).__name__
            raise PerfbenchError(f"{where}: expected METHODS, a dict of name -> Method, in the file, got {got}")
        _add(where, found, Plugin(str(path), tuple(found), digest))
    except BaseException:
        del sys.modules[name]
        raise


def _or_refuse(where: str, work: Callable[[], T]) -> T:
    """What `work` gives; PerfbenchError in one line where code of the plugin raises, or leaves."""
    try:
        return work()
    except (Exception, SystemExit) as error:
        raise PerfbenchError(f"{where}: raised {type(error).__name__}: {' '.join(str(error).split())}") from error


def _add(where: str, found: Mapping[Any, Any], plugin: Plugin) -> None:
    """All of its methods, or none: PerfbenchError for the first thing that is wrong with them."""
    for name, method in found.items():
        wrong = _wrong_name(name) or _or_refuse(where, lambda method=method: _wrong_method(method))  # type: ignore[misc]
        if wrong is not None:
            raise PerfbenchError(f"{where}: method {name!r}: {wrong}")
    METHODS.update(found)
    _READ[plugin.source] = plugin


def _wrong_name(name: Any) -> str | None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}", name):
        return "expected a name of at most 40 letters, digits, '.', '_' and '-' that starts with a letter or digit"
    return "the name is taken; choose another" if name in METHODS else None


def _wrong_method(method: Any) -> str | None:
    """What keeps perfbench from using it; whether it is right, `check_method` tells."""
    if not isinstance(method, Method):
        return f"expected a perfbench.methods.registry.Method, got {type(method).__name__}"
    if method.module is None or method.served_by != "plan":
        return "expected a module, and served_by 'plan'"
    if method.trained_by is not None and method.trained_by.count(":") != 1:
        return f"trained_by: expected None or 'module:function', got {method.trained_by!r}"
    module = importlib.import_module(method.module)
    if missing := [name for name in FUNCTIONS if not callable(getattr(module, name, None))]:
        return f"{method.module}: expected the function {missing[0]}, got none"
    options = getattr(module, "Options", None)
    if not (isinstance(options, type) and issubclass(options, MethodOptions) and dataclasses.is_dataclass(options)):
        return f"{method.module}: expected Options, a dataclass that extends MethodOptions, got {options!r}"
    if "label" in schema_of(options):
        return "Options.label: every arm has a label already; rename the field"
    options()
    return None

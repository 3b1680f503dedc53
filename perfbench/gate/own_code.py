"""The proof that a process runs the code of its own commit, out of what it says that it has loaded. Free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from perfbench.errors import ComparisonError
from perfbench.gate.revisions import Revision, files_of

# Where the module that measures stands in a checkout: today, and until version 0.1 (to be dropped with version 0.3).
WORKERS = {"perfbench/measure/on_device/worker.py", "perfbench/worker.py"}


def prove_own_code(
    revision: Revision, root: str, code: Mapping[str, str], modules: Mapping[str, str]
) -> dict[str, str]:
    """What a process runs: {path, under the worktree where it lies there: git's hash of it}, perfbench's own code and
    that of methods from outside. Of a command nothing is known.

    `root`: the folder above the process's perfbench; `code`: {path under it: git's hash of what is there}; `modules`:
    {absolute path: the same} of all else that it has loaded out of the places of `Revision.job`.
    Raises ComparisonError unless all of it is of this very commit, and every file of --plugin is among it.
    """
    if revision.command:
        return {}
    expected = revision.runner or revision.folder
    if Path(root) != expected:
        raise ComparisonError(f"{revision.label}: expected code of {expected}, got code of {root}")
    found = {_under(revision.folder, path): blob for path, blob in modules.items()}
    if what := _foreign(revision, code if revision.runner is None else {}, found):
        raise ComparisonError(f"{revision.label}: this process does not run its commit's code: {what}")
    for file, blob in revision.plugins.items():
        if found.get(_under(revision.folder, str(file))) != blob:
            raise ComparisonError(
                f"{revision.label}: this process has not loaded {_under(revision.folder, str(file))} as it should be: "
                "it was changed meanwhile, or this perfbench is older than `ab --plugin`"
            )
    return {**code, **found}


def _foreign(revision: Revision, code: Mapping[str, str], modules: Mapping[str, str]) -> str | None:
    """What is loaded and not of the commit, in words; None where all is."""
    blobs = files_of(revision)
    for path in sorted(path for path in modules if Path(path).is_absolute() and Path(path) not in revision.plugins):
        return f"{path} is loaded from the checkout; install its package elsewhere, or in no way that comes first"
    own = {**code, **{path: blob for path, blob in modules.items() if not Path(path).is_absolute()}}
    for path in sorted(path for path, blob in own.items() if blobs.get(path) != blob):
        return f"{path} is not that of the commit"
    if revision.runner is None and not code.keys() & WORKERS:
        return f"{max(WORKERS, key=len)} is not loaded"
    if revision.runner is not None and not own:
        return "no file of it is loaded; give --plugin FILE, or install the package that it is of"
    return None


def _under(folder: Path, path: str) -> str:
    return Path(path).relative_to(folder).as_posix() if Path(path).is_relative_to(folder) else path

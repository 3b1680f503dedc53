"""Two revisions side by side: of a checkout, of other commits or with other packages, a worktree and an environment for
each; or a command of the user's. Free of torch.

The checkout is perfbench's own, whose commits run themselves, or one of methods of the user's, whose commits are run by
the perfbench that was called. That a process runs the code of its own commit is proved by `perfbench.gate.own_code`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from perfbench.errors import ComparisonError, nearest
from perfbench.files.paths import expanded
from perfbench.files.scratch import PREFIX, Scratch, is_stale
from perfbench.gate.sides import Side, side_of, without
from perfbench.progress import say

_PIP_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Revision:
    """A commit in a worktree of its own: what the user called it, or the packages that it has instead of its own; its
    full hash, the worktree, the Python that has its dependencies, and a hash of what these are. Of a command of the
    user's there is nothing but its words, and the folder in which it runs.

    `checkout`: the working tree that the commit is of, from which nothing may be loaded; `plugins`: {file of --plugin:
    git's hash of what it has to hold}; `runner`: of a commit that is not perfbench's, the folder above the perfbench
    that runs it."""

    ref: str
    commit: str
    folder: Path
    python: Path
    packages: str
    command: tuple[str, ...] = ()
    checkout: Path | None = None
    plugins: Mapping[Path, str] = field(default_factory=dict)
    runner: Path | None = None

    @property
    def label(self) -> str:
        """Such as `main (0123456789ab)`, or the command."""
        return self.ref if self.command else f"{self.ref} ({self.commit[:12]})"

    @property
    def starts(self) -> tuple[str, ...]:
        """The words that start a process which measures."""
        # -P and the worktree in front: neither the current folder nor an installed perfbench can come first.
        return self.command or (str(self.python), "-P", "-m", "perfbench.ab_worker")

    @property
    def search_path(self) -> str:
        """PYTHONPATH of such a process: before all else the worktree. Of a commit that is not perfbench's also the
        worktree's own of every folder of the checkout where this process looks for modules; then what it has here."""
        if self.runner is None or self.checkout is None:
            return str(self.folder)
        here = [Path(entry) for entry in sys.path if Path(entry).is_relative_to(self.checkout)]
        found = [self.folder, self.folder / "src", *(self.folder / one.relative_to(self.checkout) for one in here)]
        # Python finds installed packages by itself; in front they could hide modules of its library.
        if self.runner.name not in ("site-packages", "dist-packages"):
            found.append(self.runner)
        inherited = os.environ.get("PYTHONPATH")
        return os.pathsep.join([*dict.fromkeys(map(str, found)), *([inherited] if inherited else [])])

    @property
    def job(self) -> dict[str, list[str]]:
        """What such a process is told of its own side: the files of --plugin, and the `places` of which it names every
        module that it loads."""
        places = [self.folder, self.checkout or self.folder, *self.plugins]
        return {} if self.command else {"plugins": list(map(str, self.plugins)), "places": list(map(str, places))}


def repository_of(folder: Path) -> Path:
    """The root of the git checkout that `folder` is in. Raises ComparisonError where it is in none."""
    try:
        root = Path(_git(folder, "rev-parse", "--show-toplevel"))
    except ComparisonError:
        raise ComparisonError(
            f"{folder}: not in a git checkout; run `perfbench ab` inside that of your methods, or of perfbench"
        ) from None
    return root


def is_dirty(repository: Path) -> bool:
    """Whether the checkout has changes that no commit has."""
    return bool(_git(repository, "status", "--porcelain"))


@contextmanager
def revisions(
    here: Path, refs: Mapping[str, str], cache: Path, plugins: Sequence[str] = ()
) -> Iterator[dict[str, Revision]]:
    """{arm: Revision} for {arm: what `side_of` takes}, the worktrees removed again at the end; environments stay in
    `cache`. `here`: a folder of the checkout that has the commits, and where commands run. `plugins`: files with
    methods, each of them the commit's own where it lies in the checkout, and one for both sides where it does not.

    Raises ComparisonError, before anything is made, on a ref that there is not, and on one that can't be built.
    """
    sides = {arm: side_of(text) for arm, text in refs.items()}
    found = {
        arm: Revision(side.text, "", here, Path(), "", side.command) for arm, side in sides.items() if side.ref is None
    }
    of_commits = {arm: side for arm, side in sides.items() if side.ref is not None}
    if not of_commits:
        if plugins:
            raise ComparisonError(
                f"--plugin {plugins[0]}: no side is a commit, and a command loads its own; leave it out"
            )
        yield found
        return
    repository = repository_of(here)
    runner = None if (repository / "perfbench" / "cli.py").is_file() else Path(__file__).resolve().parents[2]
    for side in of_commits.values():
        if runner and side.requirements:
            raise ComparisonError(
                f"{side.text}: other packages are possible in perfbench's own checkout only, not in {repository}; "
                "give a commit, and run both in the packages of this Python"
            )
    commits = {arm: _commit(repository, str(side.ref)) for arm, side in of_commits.items()}
    _forget_stale(repository)
    with Scratch() as scratch:
        folders = {arm: scratch.path / arm for arm in commits}
        try:
            for arm, folder in folders.items():
                _git(repository, "worktree", "add", "--quiet", "--detach", str(folder), commits[arm])
            for arm, side in of_commits.items():
                python = (Path(sys.executable), "") if runner else _python(repository, folders[arm], side, cache)
                one = Revision(side.text, commits[arm], folders[arm], *python, checkout=repository, runner=runner)
                found[arm] = replace(one, plugins=_plugins(one, here, plugins))
            yield {arm: found[arm] for arm in refs}
        finally:
            for folder in folders.values():
                _forget(repository, folder)


def _forget(repository: Path, folder: Path) -> None:
    """Removes a worktree and its entry in the repository, however far its making came: git locks one that it makes,
    which takes the second force."""
    with suppress(ComparisonError):
        _git(repository, "worktree", "remove", "--force", "--force", str(folder))


def _forget_stale(repository: Path) -> None:
    """Removes the worktrees that a session left registered which was killed; those of one that runs stay."""
    for line in _git(repository, "worktree", "list", "--porcelain").splitlines():
        kind, _, name = line.partition(" ")
        scratch = Path(name).parent
        if kind == "worktree" and scratch.name.startswith(PREFIX) and (is_stale(scratch) or not scratch.exists()):
            _forget(repository, Path(name))


def _commit(repository: Path, ref: str) -> str:
    try:
        return _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{ref}^{{commit}}")
    except ComparisonError:
        if not _git(repository, "rev-list", "--all", "--max-count=1"):
            raise ComparisonError(f"{ref}: {repository} has no commit yet; commit two states to compare") from None
        raise ComparisonError(
            f"{ref}: no such commit in {repository}; give a branch, tag or hash that `git log` knows "
            "(a shallow clone of CI has few: fetch-depth: 0)"
        ) from None


def _plugins(revision: Revision, here: Path, files: Sequence[str]) -> dict[Path, str]:
    """{where the revision has each of the files of --plugin: git's hash of what it has to hold}."""
    tracked, found = files_of(revision), {}
    for name in files:
        file = (here / expanded(name)).resolve()
        if revision.checkout and file.is_relative_to(revision.checkout):
            path = file.relative_to(revision.checkout).as_posix()
            if path not in tracked:
                known = nearest(path, [one for one in tracked if one.endswith(".py")])
                raise ComparisonError(f"--plugin {name}: {revision.label} has no such file ({known})")
            found[revision.folder / path] = tracked[path]
        elif file.is_file():
            found[file] = _git(here, "hash-object", "--no-filters", str(file))
        else:
            raise ComparisonError(f"--plugin {name}: no such file; expected a Python file with METHODS")
    return found


def asked_for(revision: Revision) -> list[str]:
    """The packages that the commit's pyproject.toml asks for, none where it has no such file."""
    file = revision.folder / "pyproject.toml"
    try:
        project = tomllib.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return sorted(project.get("project", {}).get("dependencies", []))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise ComparisonError(f"{revision.label}: pyproject.toml: {error}; mend it") from None


def _python(repository: Path, folder: Path, side: Side, cache: Path) -> tuple[Path, str]:
    """This Python where `folder` asks for the packages of the checkout, else that of an environment made for it; and a
    hash of Python's version and these packages."""
    dependencies, constraints = _dependencies(folder, side.text)
    if side.requirements:
        dependencies, constraints = [*dependencies, *side.requirements], without(constraints, side.requirements)
    wanted = dependencies, constraints
    digest = hashlib.sha256(json.dumps([wanted, sys.version]).encode()).hexdigest()[:16]
    if wanted == _dependencies(repository, "the checkout"):
        return Path(sys.executable), digest
    environment = cache / digest
    python = environment / "bin" / "python"
    if not (environment / "complete").exists():
        _build(environment, wanted, side.text)
        (environment / "complete").touch()
    return python, digest


def _dependencies(folder: Path, ref: str) -> tuple[list[str], str]:
    """(what pyproject.toml asks for, the constraints) of a revision."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        constraints = folder / "constraints.txt"
        lines = constraints.read_text(encoding="utf-8") if constraints.exists() else ""
        return sorted(project.get("dependencies", [])), lines
    except (OSError, ValueError, KeyError) as error:
        raise ComparisonError(f"{ref}: can't be built: pyproject.toml: {error}; choose a ref that has one") from None


def _build(environment: Path, wanted: tuple[list[str], str], ref: str) -> None:
    dependencies, constraints = wanted
    environment.parent.mkdir(parents=True, exist_ok=True)
    file, asked = environment.with_suffix(".constraints.txt"), environment.with_suffix(".requirements.txt")
    file.write_text(constraints, encoding="utf-8")
    asked.write_text("\n".join(dependencies) + "\n", encoding="utf-8")
    python = environment / "bin" / "python"
    commands = [[sys.executable, "-m", "venv", "--clear", str(environment)]]
    if dependencies:
        # Not quietly: what conflicts with what it says on standard output alone.
        install = [str(python), "-m", "pip", "install", "--constraint", str(file)]
        commands.append([*install, "--requirement", str(asked)])
    say(f"{ref}: making an environment with its packages, once, in {environment}")
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S)
        if done.returncode:
            raise ComparisonError(f"{ref}: can't be built: {_why(done.stdout, done.stderr)}")


def _why(stdout: str, stderr: str) -> str:
    """What pip says of its failure, in a line, with the way out."""
    _, _, conflict = stdout.partition("The conflict is caused by:\n")
    if conflict:
        parts = "; ".join(line.strip() for line in conflict.partition("\n\n")[0].splitlines())
        return f"{parts}; in a requirements file, name also what holds the package back"
    last = (stderr.strip() or stdout.strip() or "no message").splitlines()[-1]
    return f"{last}; mend its dependencies, or the network"


def files_of(revision: Revision) -> dict[str, str]:
    """{path: git's hash} of every file of the commit."""
    listing = _git(revision.folder, "ls-tree", "-r", "-z", revision.commit)
    entries = [line.partition("\t") for line in listing.split("\0") if line]
    return {path: entry.split()[2] for entry, _, path in entries}


def _git(folder: Path, *arguments: str) -> str:
    """What git prints, stripped. Raises ComparisonError with git's last line where it fails."""
    # Inside a git hook these variables would point git at another repository.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, env=environment, check=False
        )
    except OSError as error:
        raise ComparisonError(f"git can't be run ({error.strerror}); install it") from None
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ComparisonError(f"git {arguments[0]} {folder}: {last}")
    return done.stdout.strip()

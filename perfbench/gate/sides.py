"""What a side of `perfbench ab` is: a commit; the checkout's HEAD with other packages, told as one requirement such as
`torch==2.12.*` or as a requirements file; a command of the user's that measures whatever it likes; or the address of a
server, which a command of ours measures. Free of torch.
"""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from perfbench.errors import ComparisonError

# What the text of a command begins with; no commit can be called so.
COMMAND = "command:"
# What the address of a server begins with, and the module that sends it requests.
_SERVER, _SERVER_SIDE = re.compile(r"https?://"), "perfbench.traffic.on_device.server_side"
# A name, and a version that it must have: git forbids none of these signs in a branch, but nobody has them there.
_REQUIREMENT = re.compile(r"[A-Za-z0-9._-]+(\[[^]]*\])?\s*(==|~=|!=|<=|>=|<|>)\s*[0-9]")


@dataclass(frozen=True)
class Side:
    """What `--baseline` or `--candidate` says: `text`, as it was given; the commit that it means, and the lines of a
    requirements file that come on top of the commit's own, none for a commit alone; or the words of a command, without
    a commit."""

    text: str
    ref: str | None
    requirements: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def side_of(text: str) -> Side:
    """The side that `text` names. ComparisonError on a requirements file that can't be read, on no command, and on an
    address with a password in it."""
    if text.startswith(COMMAND):
        return Side(text, None, command=_words(text))
    if _SERVER.match(text):
        return Side(text, None, command=(sys.executable, "-P", "-m", _SERVER_SIDE, _address(text)))
    if text.endswith(".txt") and not Path(text).is_file():
        raise ComparisonError(f"{text}: no such file; give a requirements file, a requirement or a commit")
    if text.endswith(".txt"):
        return Side(text, "HEAD", _lines(Path(text)))
    if _REQUIREMENT.match(text):
        _named(text, text)
        return Side(text, "HEAD", (text,))
    return Side(text, text)


def _words(text: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(text.removeprefix(COMMAND)))
    except ValueError as error:
        raise ComparisonError(f"{text}: expected a command, and a shell can't read it ({error})") from None
    if not words or shutil.which(words[0]) is None:
        raise ComparisonError(f"{text}: no such command; expected a program and its arguments")
    return words


def _address(text: str) -> str:
    """The address, which a process list and the report will show."""
    address = urlsplit(text)
    if not address.hostname or "@" in address.netloc or address.query:
        # What stands before an @ or in a query may be a password or a key.
        raise ComparisonError(
            f"{address.scheme}://{address.hostname or ''}...: expected an address such as http://127.0.0.1:8000/v1, "
            "without a user and without a query"
        )
    return text


def without(constraints: str, requirements: tuple[str, ...]) -> str:
    """The lines of a constraints file that do not speak of what `requirements` ask for."""
    asked = {name for line in requirements if (name := _named(line, line)) is not None}
    return "".join(line for line in constraints.splitlines(keepends=True) if _constrained(line) not in asked)


def _lines(file: Path) -> tuple[str, ...]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ComparisonError(f"{file}: can't be read ({error}); give a requirements file") from None
    found = []
    for number, line in enumerate(lines, 1):
        if stripped := re.sub(r"(^|\s)#.*", "", line).strip():
            _named(stripped, f"{file}:{number}")
            found.append(stripped)
    if not found:
        raise ComparisonError(f"{file}: expected requirements, found none")
    return tuple(found)


def _named(line: str, place: str) -> str | None:
    """The package that a line asks for, None for an option of pip's such as --extra-index-url. ComparisonError."""
    if line.startswith("-"):
        return None
    try:
        return canonicalize_name(Requirement(line).name)
    except InvalidRequirement as error:
        why = str(error).splitlines()[0]
        raise ComparisonError(f"{place}: expected a requirement such as torch==2.12.*, got {line!r} ({why})") from None


def _constrained(line: str) -> str | None:
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line)
    return None if match is None else canonicalize_name(match[1])

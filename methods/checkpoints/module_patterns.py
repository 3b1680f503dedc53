"""The regular expressions of an adapter's configuration, matched against the names of a backbone's modules.

An expression comes from a file and may take for ever (catastrophic backtracking), which nothing inside a process can
end. Words without any operator are matched here; all else in a child process, which has LIMIT_S seconds.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

LIMIT_S = 10.0
LONGEST = 10_000  # characters of one pattern

# How PEFT uses a pattern: a method of `re`, and what stands before and after the pattern.
Form = tuple[str, str, str]
WHOLE: Form = ("fullmatch", "", "")  # target_modules, exclude_modules
TAIL: Form = ("match", r"(.*\.)?(", ")$")  # rank_pattern, alpha_pattern
LAYER: Form = ("match", r"(?:^|.*?\.)", r"\.(?P<idx>\d+)\.")  # layers_pattern; its group is the layer's number

# For each expression: the group `idx` ("" without one) or None for each name, or why it is no expression.
Found = list[list[str | None] | str]

_WORD = re.compile(r"[\w.\-]*")

_CHILD = r"""
import json, re, sys, warnings
warnings.simplefilter("ignore")
method, expressions, names = json.load(sys.stdin)
found = []
for expression in expressions:
    try:
        matches = [getattr(re, method)(expression, name) for name in names]
        found.append([m and (m.groupdict().get("idx") or "") for m in matches])
    except (re.error, OverflowError, RecursionError) as error:
        found.append(" ".join(str(error).split()))
json.dump(found, sys.stdout)
"""


class BadPattern(ValueError):
    """No regular expression, or one that takes too long. The message is what was expected and what came."""


def matches(patterns: Sequence[str], form: Form, names: Sequence[str]) -> list[list[str | None]]:
    """For each of `patterns` and each name: the group `idx` ("" where there is none), or None where it does not
    match. Raises BadPattern."""
    for pattern in patterns:
        if len(pattern) > LONGEST:
            raise BadPattern(f"expected a pattern of at most {LONGEST} characters, got {len(pattern)}")
    method, before, after = form
    expressions = tuple(f"{before}{pattern}{after}" for pattern in patterns)
    if all(_WORD.fullmatch(pattern) for pattern in patterns):
        return _here(method, expressions, tuple(names))
    try:
        found = _in_child(method, expressions, tuple(names))
    except subprocess.TimeoutExpired:
        raise BadPattern(
            f"expected a pattern that is matched within {LIMIT_S:g} s, got {', '.join(patterns)[:80]!r}, which "
            f"takes longer; write it without repetitions inside of repetitions"
        ) from None
    good = []
    for pattern, one in zip(patterns, found, strict=True):
        if isinstance(one, str):
            raise BadPattern(f"expected a regular expression, got {pattern[:80]!r} ({one})")
        good.append(one)
    return good


@lru_cache(maxsize=64)
def _here(method: str, expressions: tuple[str, ...], names: tuple[str, ...]) -> list[list[str | None]]:
    found = []
    for expression in expressions:
        each = [getattr(re.compile(expression), method)(name) for name in names]
        found.append([None if m is None else m.groupdict().get("idx") or "" for m in each])
    return found


@lru_cache(maxsize=64)
def _in_child(method: str, expressions: tuple[str, ...], names: tuple[str, ...]) -> Found:
    child = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _CHILD],
        input=json.dumps([method, expressions, names]),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    if child.returncode != 0:
        why = (child.stderr.strip().splitlines() or ["its process was killed"])[-1]
        raise BadPattern(f"expected a pattern that can be matched, got {expressions[0][:80]!r} ({why})")
    found: Found = json.loads(child.stdout)
    return found

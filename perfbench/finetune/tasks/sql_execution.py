"""Whether a query returns the gold rows. Every query runs read-only in a child process of its own, with limits."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.tasks.task import Example

SECONDS = 5
MEMORY_BYTES = 512 * 2**20
ROWS = 10_000

_CHILD = Path(__file__).with_name("sql_child.py")
# What stands between quotes or brackets, and comments: no word of it is the query's own.
_QUOTED = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|\[[^\]]*\]|--[^\n]*|/\*.*?\*/", re.DOTALL)
_INNERMOST = re.compile(r"\([^()]*\)")


class QueryError(Exception):
    """A query that does not run, is not allowed, or exceeds a limit; the message says which."""


def execution_match(prediction: str, example: Example) -> float:
    """1 where the prediction runs and returns the rows of the gold query in `example.extra`: `database`, `gold`.

    Duplicates count; the order of the rows does where the gold query has an ORDER BY of its own; columns' names don't.
    TaskError where the gold query itself can't be run.
    """
    database, gold = example.extra["database"], example.extra["gold"]
    try:
        expected = _gold_rows(database, gold)
    except QueryError as error:
        raise TaskError(f"{example.where}: the gold query can't be run on {database}: {error}") from None
    try:
        found = run_query(database, prediction)
    except QueryError:
        return 0.0
    return float(same_rows(found, expected, ordered=is_ordered(gold)))


def run_query(
    database: str, query: str, *, seconds: int = SECONDS, memory_bytes: int = MEMORY_BYTES, rows: int = ROWS
) -> list[tuple[Any, ...]]:
    """The rows of one SELECT on a SQLite file, opened read-only; QueryError otherwise.

    seconds: of running, on the clock; memory_bytes: address space of the child; rows: the most it may return.
    """
    if sys.platform == "win32":
        raise TaskError("generated SQL is run under limits of memory and time that Windows lacks; score it on Linux")
    asked = {"database": database, "query": query, "seconds": seconds, "memory_bytes": memory_bytes, "rows": rows}
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(_CHILD)],
            input=json.dumps(asked),
            capture_output=True,
            text=True,
            encoding="utf-8",
            timeout=seconds + 5,
            env={},
        )
    except subprocess.TimeoutExpired:
        raise QueryError(f"ran longer than {seconds} s, and did not let itself be interrupted") from None
    if done.returncode != 0:
        last = done.stderr.strip().rpartition("\n")[2] or f"signal {-done.returncode}"
        raise QueryError(f"its process ended with {last}")
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise QueryError(answer["error"])
    return [tuple(_plain(cell) for cell in row) for row in answer["rows"]]


def same_rows(found: list[tuple[Any, ...]], expected: list[tuple[Any, ...]], *, ordered: bool) -> bool:
    """Equal as lists where `ordered`, else as multisets."""
    return found == expected if ordered else Counter(found) == Counter(expected)


def is_ordered(query: str) -> bool:
    """Whether the query has an ORDER BY outside of every bracket and quotation."""
    text = _QUOTED.sub(" ", query)
    while (inner := _INNERMOST.sub(" ", text)) != text:
        text = inner
    return re.search(r"\border\s+by\b", text, re.IGNORECASE) is not None


@functools.lru_cache(maxsize=10_000)
def _gold_rows(database: str, gold: str) -> list[tuple[Any, ...]]:
    return run_query(database, gold)


def _plain(cell: Any) -> Any:
    """A cell as it is compared: 12 digits of a real number, so that the order of a sum does not matter."""
    if isinstance(cell, float):
        return float(f"{cell:.12g}")
    return bytes.fromhex(cell["blob"]) if isinstance(cell, dict) else cell

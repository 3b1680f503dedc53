"""The child process that runs one query read-only, within limits. Run as a script by sql_execution.py; the standard
library alone, and nothing of perfbench: it starts in a few milliseconds and has nothing to lose.

Reads {"database", "query", "seconds", "memory_bytes", "rows"} as JSON on stdin; writes {"rows": [...]} or
{"error": "..."}.
"""

import json
import resource
import sqlite3
import sys
import time
from pathlib import Path

# Progress is looked at every this many of SQLite's virtual-machine instructions.
STEPS = 10_000
# Functions that reach outside of the database, or that make a query's result another one each time.
FORBIDDEN = {"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "random", "randomblob", "zeroblob"}
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}


def main() -> None:
    """One query in, one answer out."""
    asked = json.load(sys.stdin)
    # Its own memory is some 20 MB; no file may grow, no core be written, no process be started.
    resource.setrlimit(resource.RLIMIT_AS, (asked["memory_bytes"], asked["memory_bytes"]))
    resource.setrlimit(resource.RLIMIT_CPU, (asked["seconds"] + 1, asked["seconds"] + 1))
    for limit in (resource.RLIMIT_FSIZE, resource.RLIMIT_CORE, resource.RLIMIT_NPROC):
        resource.setrlimit(limit, (0, 0))
    try:
        answer = json.dumps({"rows": run(**asked)})
        if len(answer) > asked["memory_bytes"] // 32:
            raise ValueError(f"returns more than {asked['memory_bytes'] // 32} bytes")
    except MemoryError:
        answer = json.dumps({"error": f"needs more than {asked['memory_bytes']} bytes of memory"})
    except Exception as error:  # whatever a query can cause is its own error
        answer = json.dumps({"error": str(error)})
    print(answer)


def run(database: str, query: str, seconds: int, memory_bytes: int, rows: int) -> list[list[object]]:
    """The rows of `query`; raises ValueError or sqlite3.Error where it is not allowed, fails or exceeds a limit."""
    uri = f"{Path(database).absolute().as_uri()}?mode=ro&immutable=1"
    connection = sqlite3.connect(uri, uri=True, isolation_level=None)
    connection.execute(f"PRAGMA hard_heap_limit = {memory_bytes // 2}")
    connection.execute("PRAGMA temp_store = MEMORY")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, memory_bytes // 8)
    connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, 100_000)
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")
    connection.set_authorizer(authorize)
    end = time.monotonic() + seconds
    connection.set_progress_handler(lambda: time.monotonic() > end, STEPS)
    try:
        cursor = connection.execute(query)
        if cursor.description is None:
            raise ValueError("is no SELECT")
        found = cursor.fetchmany(rows + 1)
    except sqlite3.OperationalError as error:
        if str(error) == "interrupted":
            raise ValueError(f"ran longer than {seconds} s") from None
        raise
    if len(found) > rows:
        raise ValueError(f"returns more than {rows} rows")
    return [[{"blob": cell.hex()} if isinstance(cell, bytes) else cell for cell in row] for row in found]


def authorize(action: int, first: str | None, second: str | None, database: str | None, trigger: str | None) -> int:
    """Reading and plain functions; SQLite refuses the rest when it prepares the statement."""
    if action not in ALLOWED or (action == sqlite3.SQLITE_FUNCTION and str(second).lower() in FORBIDDEN):
        return sqlite3.SQLITE_DENY
    return sqlite3.SQLITE_OK


if __name__ == "__main__":
    main()

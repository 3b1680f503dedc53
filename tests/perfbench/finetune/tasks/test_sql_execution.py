"""Queries run read-only and within limits; a hostile one changes nothing, and counts as wrong."""

from __future__ import annotations

import hashlib
import sqlite3
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("limits of memory for a child process are POSIX's", allow_module_level=True)

from perfbench.errors import TaskError
from perfbench.finetune.tasks import sql_execution, text2sql
from perfbench.finetune.tasks.sql_execution import QueryError, execution_match, is_ordered, run_query
from perfbench.finetune.tasks.task import Example


@pytest.fixture(scope="module")
def database(tmp_path_factory) -> str:
    """Twelve cities, two of a name."""
    path = tmp_path_factory.mktemp("sql") / "cities #1?.db"
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE city (name TEXT, people INT, area REAL)")
    rows = [("a", 3, 0.1), ("b", 1, 0.2), ("b", 2, 0.3), *[(f"c{n}", 10 + n, 0.1 * n) for n in range(9)]]
    connection.executemany("INSERT INTO city VALUES (?, ?, ?)", rows)
    connection.commit()
    connection.close()
    return str(path)


def match(database: str, gold: str, prediction: str) -> float:
    return execution_match(
        prediction, Example("1", "", gold, (gold,), where="x:1", extra={"database": database, "gold": gold})
    )


@pytest.mark.parametrize(
    ("gold", "prediction", "expected"),
    [
        ("SELECT name FROM city WHERE people < 3", "select NAME as n from city where people in (1, 2)", 1),
        ("SELECT name FROM city WHERE people < 3", "SELECT DISTINCT name FROM city WHERE people < 3", 0),  # duplicates
        ("SELECT people FROM city WHERE people < 4", "SELECT people FROM city WHERE people < 4 ORDER BY people", 1),
        ("SELECT people FROM city ORDER BY people", "SELECT people FROM city ORDER BY people DESC", 0),
        ("SELECT people FROM city ORDER BY people", "SELECT people FROM city ORDER BY -people DESC", 1),
        ("SELECT name, people FROM city", "SELECT people, name FROM city", 0),
        ("SELECT sum(area) FROM city", "SELECT sum(area) FROM (SELECT area FROM city ORDER BY area DESC)", 1),
        ("SELECT count(*) FROM city", "SELECT 12.0", 1),
        ("SELECT count(*) FROM city", "SELECT '12'", 0),
        ("SELECT name FROM city WHERE people = 99", "SELECT name FROM city WHERE people = 98", 1),  # both empty
        ("SELECT name FROM city WHERE people = 99", "", 0),  # no query is no answer
        ("SELECT name FROM city WHERE people = 99", "-- nothing", 0),
        ("SELECT name FROM city", "SELECT nome FROM city", 0),
        ("SELECT name FROM city", "I do not know", 0),
        ("SELECT NULL", "SELECT NULL", 1),
        ("SELECT x'00ff'", "SELECT x'00ff'", 1),
        ("SELECT x'00ff'", "SELECT '00ff'", 0),
    ],
)
def test_a_query_counts_if_it_returns_the_gold_rows(database, gold, prediction, expected):
    assert match(database, gold, prediction) == expected


def test_order_counts_only_where_the_gold_query_itself_has_an_order():
    assert is_ordered("SELECT a FROM t ORDER\n BY a")
    assert is_ordered("SELECT a FROM t WHERE b = 'x)' order by a LIMIT 1")
    assert not is_ordered("SELECT a FROM (SELECT a FROM t ORDER BY a)")
    assert not is_ordered("SELECT a FROM t WHERE b = 'order by' -- order by a")
    assert not is_ordered('SELECT "order by" FROM t')


HOSTILE = {
    "attach": "ATTACH DATABASE '{elsewhere}' AS other",
    "vacuum into": "VACUUM INTO '{elsewhere}'",
    "insert": "INSERT INTO city VALUES ('x', 1, 1)",
    "delete": "DELETE FROM city",
    "update": "UPDATE city SET people = 0",
    "drop": "DROP TABLE city",
    "create": "CREATE TABLE other (x)",
    "temporary table": "CREATE TEMP TABLE other (x)",
    "two statements": "SELECT 1; DELETE FROM city",
    "returning": "WITH x AS (SELECT 1) INSERT INTO city SELECT 'x', 1, 1 RETURNING name",
    "pragma": "PRAGMA writable_schema = 1",
    "pragma as a table": "SELECT * FROM pragma_database_list",
    "begin": "BEGIN IMMEDIATE",
    "load_extension": "SELECT load_extension('{elsewhere}')",
    "readfile": "SELECT readfile('/etc/hostname')",
    "writefile": "SELECT writefile('{elsewhere}', 'x')",
    "random": "SELECT random() FROM city",
    "randomblob": "SELECT randomblob(1000000000)",
    "zeroblob": "SELECT zeroblob(1000000000)",
    # One call of a function, which SQLite can't interrupt: the limit on processor time ends it.
    "endless function": "SELECT printf('%.*c', 2000000000, 'x')",
    "growing text": "WITH RECURSIVE c(x) AS (SELECT 'x' UNION ALL SELECT x || x FROM c) SELECT length(x) FROM c",
    "many large cells": "SELECT printf('%.*c', 2000000, 'x') FROM city",
    "endless": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT count(*) FROM c",
    "endless rows": "WITH RECURSIVE c(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c) SELECT x FROM c",
    "giant join": "SELECT * FROM city a, city b, city c, city d, city e",
    "deep": "SELECT " + "(" * 5000 + "1" + ")" * 5000,
    "null character": "SELECT '\0'",
    "surrogate": "SELECT '\ud800'",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_query_is_refused_and_changes_nothing(name, database, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    before = hashlib.sha256(Path(database).read_bytes()).hexdigest()
    with pytest.raises(QueryError) as caught:
        run_query(database, HOSTILE[name].replace("{elsewhere}", str(elsewhere)), seconds=1)
    assert "\n" not in str(caught.value)
    assert not elsewhere.exists()
    assert hashlib.sha256(Path(database).read_bytes()).hexdigest() == before
    assert [path.name for path in Path(database).parent.iterdir()] == [Path(database).name]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("attach", "not authorized"),
        ("load_extension", "not authorized"),
        ("endless", "ran longer than 1 s$"),
        ("endless rows", "more than 10000 rows"),
        ("randomblob", "not authorized"),
    ],
)
def test_the_reason_is_the_limit_itself(name, says, database):
    with pytest.raises(QueryError, match=says):
        run_query(database, HOSTILE[name], seconds=1)


def test_the_limits_are_those_given(database):
    assert len(run_query(database, "SELECT * FROM city", rows=12)) == 12
    with pytest.raises(QueryError, match="more than 11 rows"):
        run_query(database, "SELECT * FROM city", rows=11)
    big = "SELECT length(replace(printf('%.*c', 200000, 'x'), 'x', printf('%.*c', 100, 'x')))"
    assert run_query(database, big) == [(20_000_000,)]
    with pytest.raises(QueryError, match="too big"):
        run_query(database, big, memory_bytes=64 * 2**20)


def test_without_the_authorizer_a_write_would_still_fail(database):
    """The file is opened read-only: two locks, of which the test above sees the first."""
    connection = sqlite3.connect(f"{Path(database).as_uri()}?mode=ro&immutable=1", uri=True)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        connection.execute("DELETE FROM city")
    connection.close()


def test_a_gold_query_that_can_not_run_is_told_with_its_record(database, tmp_path):
    with pytest.raises(TaskError, match=r"^x:1: the gold query can't be run on .*: no such column: nome$"):
        match(database, "SELECT nome FROM city", "SELECT 1")
    missing = tmp_path / "none.db"
    with pytest.raises(TaskError, match=r"none.db: unable to open database file"):
        match(str(missing), "SELECT 1", "SELECT 1")
    assert not missing.exists()


def test_geoquery_gold_queries_return_their_rows(test_data):
    examples = text2sql.load(str(test_data / "text2sql_geography"), "test")
    sql_execution._gold_rows.cache_clear()
    for example in examples[:8]:
        assert execution_match(example.answer, example) == 1
    # The answer to another question is right only by chance.
    wrong = [execution_match(other.answer, ex) for ex, other in zip(examples[:8], examples[100:108], strict=True)]
    assert sum(wrong) < 3

"""Text to SQL, judged by execution: WikiSQL, the public stand-in for the papers' Q2SQL, or any questions on a database.

WikiSQL's folder, as published: <split>.jsonl, <split>.tables.jsonl and <split>.db. Any other: one .jsonl of
`question`, `sql` and `split` (train, dev, test), and one .sqlite file; such a set is GeoQuery. The prompt gives the
tables and their columns; the answer is a query that runs on the database as it is.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perfbench.errors import TaskError
from perfbench.finetune.tasks.records import Record, find_file, is_local, read_jsonl
from perfbench.finetune.tasks.task import SPLITS, Example, Split, Task

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")


def load(source: str, split: Split) -> list[Example]:
    """Examples of a split; TaskError names file and record."""
    if not is_local(source):
        raise TaskError(f"{source}: text2sql runs queries on a database file: give a folder, not an id on the hub")
    if Path(source, f"{split}.tables.jsonl").is_file():
        return _wikisql(source, split)
    database = find_file(source, "*.sqlite", "*.db")
    schema = _schema(database)
    records = read_jsonl(find_file(source, "*.jsonl"))
    return [
        _example(record, schema, record.text("sql"), database)
        for record in records
        if SPLITS[record.label("split", SPLITS)] == split
    ]


def _example(record: Record, schema: str, sql: str, database: Path) -> Example:
    # On one line, since an answer ends with its line.
    gold = " ".join(line.strip() for line in sql.strip().splitlines())
    prompt = f"Tables:\n{schema}\nQuestion: {record.text('question')}\nSQL:"
    extra = {"database": str(database), "gold": gold}
    return Example(record.id, prompt, f" {gold}", (gold,), where=record.where, extra=extra)


def _schema(database: Path) -> str:
    """A line for each table: its name and its columns."""
    try:
        connection = sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            named = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = [name for (name,) in named if not name.startswith("sqlite_")]
            columns = {
                table: [row[0] for row in connection.execute("SELECT name FROM pragma_table_info(?)", (table,))]
                for table in tables
            }
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise TaskError(f"{database}: expected a SQLite database: {error}") from None
    return "\n".join(f"{table}({', '.join(names)})" for table, names in columns.items())


def _wikisql(source: str, split: str) -> list[Example]:
    """WikiSQL's database names columns col0, col1...; the prompt says which header each has."""
    database = find_file(source, f"{split}.db")
    tables = {record.text("id"): record for record in read_jsonl(find_file(source, f"{split}.tables.jsonl"))}
    examples = []
    for record in read_jsonl(find_file(source, f"{split}.jsonl")):
        table = tables.get(record.text("table_id"))
        if table is None:
            raise TaskError(f"{record.where}: table_id {record.fields['table_id']!r} is not in {split}.tables.jsonl")
        name = f"table_{record.fields['table_id'].replace('-', '_')}"
        headers, types = _texts(table, "header"), _texts(table, "types")
        if len(headers) != len(types):
            raise TaskError(f"{table.where}: expected as many types as columns in header")
        titles = [" ".join(text.split()) for text in headers]
        columns = [f"col{n} {kind} -- {text}" for n, (kind, text) in enumerate(zip(types, titles, strict=True))]
        schema = "\n".join([f"{name}(", *columns, ")"])
        examples.append(_example(record, schema, wikisql_query(record, name, types), database))
    return examples


def wikisql_query(record: Record, table: str, types: list[str]) -> str:
    """WikiSQL's `sql` ({sel, agg, conds}) as SQL on its database, where text is in lower case."""
    sql = record.get("sql")
    try:
        column = f"col{_place(sql['sel'], types)}"
        aggregate = AGGREGATES[_place(sql["agg"], AGGREGATES)]
        wheres = [
            f"col{_place(index, types)} {OPERATORS[_place(operator, OPERATORS)]} {_literal(value, types[index])}"
            for index, operator, value in sql["conds"]
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(f"{record.where}: sql: expected WikiSQL's sel, agg and conds: {error!r}") from None
    selected = f"{aggregate}({column})" if aggregate else column
    return f"SELECT {selected} FROM {table}" + (f" WHERE {' AND '.join(wheres)}" if wheres else "")


def _place(value: Any, among: Sequence[str]) -> int:
    if not isinstance(value, int) or not 0 <= value < len(among):
        raise ValueError(f"{value!r} is not from 0 to {len(among) - 1}")
    return value


def _literal(value: Any, kind: str) -> str:
    """As WikiSQL's own engine binds it: text in lower case; in a column of numbers the first number of the text."""
    if kind == "real" and isinstance(value, str):
        try:
            return repr(float(value.replace(",", "")))
        except ValueError:
            found = _NUMBER.search(value)
            if found is None:
                raise ValueError(f"{value!r} has no number, and its column is real") from None
            return repr(float(found[0]))
    if isinstance(value, str):
        return "'" + value.lower().replace("'", "''") + "'"
    return repr(value)


def _texts(record: Record, name: str) -> list[str]:
    found = record.get(name)
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise TaskError(f"{record.where}: {name}: expected a list of texts")
    return found


TASK = Task(
    "text2sql",
    "a question to a query, on WikiSQL or any SQLite file (execution accuracy)",
    "generate",
    "sql_execution",
    load,
    new_tokens=256,
    stop=("\n",),
)

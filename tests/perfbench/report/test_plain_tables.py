"""The tables of `params` and `roof`, in every format that they have."""

from __future__ import annotations

import csv
import io
import json

import pytest

from perfbench.commands import params, roof_table
from perfbench.commands.roof_table import Question
from perfbench.errors import PerfbenchError
from perfbench.figures.roof import DEVICES
from perfbench.methods.registry import METHODS
from perfbench.report.formats import rendered

ASKED = Question("llama2-7b", "bf16", (1, 8), None, 274, 32, 1)
TABLES = {
    "params": lambda: params.table("llama2-7b", "bf16"),
    "roof": lambda: roof_table.table(ASKED, DEVICES["a40"]),
}


@pytest.mark.parametrize("name", TABLES)
def test_every_format_has_the_same_figures(name: str) -> None:
    subject = TABLES[name]()
    records = subject.records()
    assert json.loads(rendered(subject, "json")) == records
    read = list(csv.DictReader(io.StringIO(str(rendered(subject, "csv")))))
    assert [row["method"] for row in read] == [record["method"] for record in records]
    text, markdown = str(rendered(subject, "table")), str(rendered(subject, "markdown"))
    methods = [name for name in METHODS if METHODS[name].has_one_size and METHODS[name].module]
    for method in methods:
        assert f"\n{method} " in text
        assert f"\n| {method} | " in markdown


def test_sizes_are_those_of_the_papers_model() -> None:
    (lora,) = [row for row in params.table("llama2-7b", "bf16").records() if row["method"] == "lora"]
    assert (lora["trained_parameters"], lora["served_bytes"], lora["printed_in_paper"]) == (
        9_994_240,
        19_988_480,
        "10.0M",
    )


def test_each_number_of_requests_is_a_table_of_its_own() -> None:
    subject = TABLES["roof"]()
    assert [row["requests"] for row in subject.records() if row["method"] == "none"] == [1, 8]
    assert str(rendered(subject, "markdown")).count("| method | weight MiB |") == 2


def test_there_is_no_page() -> None:
    with pytest.raises(PerfbenchError, match="--format html: these tables have no page; choose table"):
        rendered(TABLES["params"](), "html")

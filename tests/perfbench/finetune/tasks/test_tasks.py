"""Each task from a folder in its own format, its splits, and one line for each thing that is wrong with a file."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from perfbench.errors import TaskError
from perfbench.finetune.tasks import records, splits
from perfbench.finetune.tasks.registry import TASKS, find, load_splits
from perfbench.finetune.tasks.sql_execution import execution_match
from perfbench.finetune.tasks.task import Example
from perfbench.finetune.tasks.task_metrics import METRICS


def write(path: Path, rows: Iterable[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def boolq(n: int, **changes: Any) -> dict[str, Any]:
    return {"question": f"is it {n}", "passage": f"It is {n}.", "label": n % 2 == 0, **changes}


@pytest.fixture
def boolq_folder(tmp_path) -> Path:
    write(tmp_path / "train.jsonl", [boolq(n) for n in range(10)])
    write(tmp_path / "val.jsonl", [boolq(n) for n in range(10, 15)])
    return tmp_path


def test_boolq(boolq_folder):
    found = load_splits(find("boolq"), str(boolq_folder))
    assert {split: len(examples) for split, examples in found.items()} == {"train": 10, "dev": 3, "test": 2}
    example = found["test"][0]
    assert example == Example(
        id="val:2",
        prompt="It is 11.\nQuestion: is it 11?\nAnswer:",
        answer=" no",
        references=("no",),
        choices=(" no", " yes"),
        where=f"{boolq_folder}/val.jsonl:2",
    )
    assert {e.id for e in found["dev"]} | {e.id for e in found["test"]} == {f"val:{n}" for n in range(1, 6)}


def test_boolq_of_the_original_release(tmp_path):
    rows = [{"question": "q", "title": "t", "answer": True, "passage": f"p{n}"} for n in range(2)]
    write(tmp_path / "dev.jsonl", rows)
    assert find("boolq").load(str(tmp_path), "dev")[0].answer == " yes"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (boolq(1, label="maybe"), 'label: expected one of 0, 1, got "maybe"'),
        (boolq(1, label=2), "label: expected one of 0, 1, got 2"),
        ({"question": "q", "label": True}, "no field 'passage'; it has 'question', 'label'"),
        ({"question": "q", "passage": "p"}, "no field 'label'"),
        (boolq(1, passage=" "), 'passage: expected text, got " "'),
        (boolq(1, passage=None), "passage: expected text, got null"),
        ([1], "expected a JSON object, got [1]"),
    ],
)
def test_a_record_with_a_fault_is_named(boolq_folder, row, says):
    write(boolq_folder / "train.jsonl", [boolq(1), row])
    with pytest.raises(TaskError) as caught:
        load_splits(find("boolq"), str(boolq_folder))
    assert str(caught.value).startswith(f"{boolq_folder}/train.jsonl:2: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_line_that_is_no_json_is_named(boolq_folder):
    (boolq_folder / "train.jsonl").write_text(json.dumps(boolq(1)) + "\n\n{'a': 1}\n")
    with pytest.raises(TaskError, match=r"train.jsonl:3: malformed JSON: .* \(character 2\)$"):
        find("boolq").load(str(boolq_folder), "train")
    (boolq_folder / "train.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(TaskError, match=r"train.jsonl: expected UTF-8 text, got another byte at offset 0"):
        find("boolq").load(str(boolq_folder), "train")


def test_an_empty_split_is_refused(boolq_folder):
    (boolq_folder / "train.jsonl").write_text("\n")
    with pytest.raises(TaskError, match="boolq has no record for train"):
        load_splits(find("boolq"), str(boolq_folder))
    write(boolq_folder / "train.jsonl", [boolq(1)])
    write(boolq_folder / "val.jsonl", [boolq(2)])
    with pytest.raises(TaskError, match="boolq has no record for test"):
        load_splits(find("boolq"), str(boolq_folder))


@pytest.mark.parametrize(("line", "split"), [(1, "dev"), (2, "test")])
def test_a_leak_into_train_is_refused_and_both_records_are_named(boolq_folder, line, split):
    rows = [boolq(n) for n in range(10, 15)]
    rows[line - 1] = boolq(7, question="IS  it 7", label=True)  # neither case, blanks nor the label hide it
    write(boolq_folder / "val.jsonl", rows)
    with pytest.raises(TaskError) as caught:
        load_splits(find("boolq"), str(boolq_folder))
    assert f"{boolq_folder}/val.jsonl:{line}: this prompt of {split} is in train too" in str(caught.value)
    assert f"{boolq_folder}/train.jsonl:8:" in str(caught.value)
    # Also where a limit would have left the record out; not where train is not asked for.
    with pytest.raises(TaskError, match="in train too"):
        load_splits(find("boolq"), str(boolq_folder), limits={"train": 1, "dev": 1, "test": 1})
    assert set(load_splits(find("boolq"), str(boolq_folder), ("dev", "test"))) == {"dev", "test"}


def test_limits_take_the_same_few_whatever_the_order(tmp_path):
    examples = [Example(str(n), str(n), "", ("",)) for n in range(50)]
    few = splits.take(examples, 10)
    assert len(few) == 10
    assert few != examples[:10]
    assert splits.take(examples[::-1], 10) == few[::-1]
    assert splits.take(examples, 500) == examples


def test_hold_out_keeps_equal_prompts_together(tmp_path):
    examples = [Example(str(n), f"prompt {n // 3}", "", ("",)) for n in range(60)]
    train, dev = splits.hold_out(examples, 10)
    assert len(dev) == 12  # whole groups of three
    assert len(train) + len(dev) == 60
    splits.refuse_leak(train, {"dev": dev})
    assert {example.id for example in splits.hold_out(examples[::-1], 10)[1]} == {example.id for example in dev}


def test_names():
    with pytest.raises(TaskError, match=r"unknown task 'bolq'; did you mean 'boolq'\?"):
        find("bolq")
    with pytest.raises(TaskError, match="perfbench mtbench"):
        find("mt_bench")
    with pytest.raises(TaskError, match=r"unknown metric 'exact'; did you mean 'exact_match'\?"):
        find("own", "exact")
    with pytest.raises(TaskError, match="boolq: its metric is accuracy, not f1"):
        find("boolq", "f1")
    assert find("own", "f1").metric == "f1"
    assert find("own").metric == "exact_match"
    for name, task in TASKS.items():
        assert task.name == name
        assert task.metric in METRICS
        assert (task.new_tokens > 0) == (task.kind == "generate")


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/folder", "no such folder"),
        ("/nowhere", "no such folder"),
        ("nowhere", "no such folder"),
        ("", "expected a file train.jsonl or train32.jsonl; the folder has"),
    ],
)
def test_a_source_that_is_not_there(source, says, boolq_folder, monkeypatch):
    monkeypatch.chdir(boolq_folder)
    (boolq_folder / "train.jsonl").unlink()
    with pytest.raises(TaskError, match=says):
        find("boolq").load(source or ".", "train")


def test_the_hub_without_datasets_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(TaskError, match=r"google/boolq: no such folder.*pip install adapter-perfbench\[hub\]"):
        find("boolq").load("google/boolq", "train")


def test_the_hub_without_network_says_so(monkeypatch):
    class Datasets:
        @staticmethod
        def load_dataset(*arguments: Any, **keywords: Any) -> None:
            raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    with pytest.raises(TaskError, match=r"google/boolq: .*: no route to host; check the name and the network"):
        find("boolq").load("google/boolq", "train")


@pytest.mark.parametrize(
    ("task", "source", "rows"),
    [
        ("boolq", "google/boolq", [{"question": "q", "passage": "p", "answer": True}]),
        ("boolq", "aps/super_glue", [{"question": "q", "passage": "p", "label": 1, "idx": 0}]),
        (
            "copa",
            "aps/super_glue",
            [{"premise": "P.", "choice1": "a", "choice2": "b", "question": "cause", "label": 1}],
        ),
        ("gsm8k", "openai/gsm8k", [{"question": "q", "answer": "a\n#### 1"}]),
        ("instructions", "tatsu-lab/alpaca", [{"instruction": f"i{n}", "input": "", "output": "o"} for n in range(2)]),
        (
            "squad",
            "rajpurkar/squad",
            [{"id": "1", "title": "t", "context": "c", "question": "q", "answers": {"text": ["c"]}}],
        ),
    ],
)
def test_rows_as_the_hub_has_them(task, source, rows, monkeypatch):
    """The shapes that the hub's pages show; the hub itself is out of reach here."""

    class Datasets:
        @staticmethod
        def load_dataset(name: str, config: str | None, *, split: str) -> list[dict[str, Any]]:
            assert (name, split) == (source, "train")
            return rows

    monkeypatch.setitem(sys.modules, "datasets", Datasets)
    example = find(task).load(source, "train")[0]
    assert example.where.startswith(f"{source} (train):")


def test_copa(tmp_path):
    row = {
        "premise": "It rained. ",
        "choice1": "We got wet.",
        "choice2": "We stayed dry.",
        "question": "effect",
        "label": 0,
    }
    write(tmp_path / "val.jsonl", [row, {**row, "question": "cause", "label": 1}])
    (dev,), (test,) = (find("copa").load(str(tmp_path), split) for split in ("dev", "test"))
    assert (dev.prompt, dev.answer) == ("It rained therefore", "  we got wet.")
    assert (test.prompt, test.answer) == ("It rained because", "  we stayed dry.")
    write(tmp_path / "val.jsonl", [{**row, "question": "reason"}])
    with pytest.raises(TaskError, match=r'val.jsonl:1: question: expected one of "cause", "effect", got "reason"'):
        find("copa").load(str(tmp_path), "dev")


def test_gsm8k_wants_a_final_number(tmp_path):
    write(tmp_path / "test.jsonl", [{"question": "q", "answer": "it is 5"}])
    with pytest.raises(
        TaskError, match=r"test.jsonl:1: answer: expected `#### ` and a number at its end, got 'it is 5'"
    ):
        find("gsm8k").load(str(tmp_path), "test")


def squad_file(questions: list[dict[str, Any]], contexts: int = 1) -> dict[str, Any]:
    paragraphs = [{"context": f"c{n} Some text.", "qas": questions} for n in range(contexts)]
    return {"version": "1.1", "data": [{"title": "A_title", "paragraphs": paragraphs}]}


def test_squad(tmp_path):
    questions = [
        {
            "id": "7",
            "question": "What?",
            "answers": [{"text": "Some", "answer_start": 3}, {"text": "text", "answer_start": 8}],
        }
    ]
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(squad_file(questions)))
    (example,) = find("squad").load(str(tmp_path), "test")
    assert example.prompt == "Title: A title\n\nBackground: c0 Some text.\n\nQuestion: What?\n\nAnswer:"
    assert (example.id, example.answer, example.references) == ("7", " Some", ("Some", "text"))
    (tmp_path / "dev-v1.1.json").write_text(json.dumps(squad_file([{**questions[0], "answers": []}])))
    with pytest.raises(TaskError, match=r"dev-v1.1.json:question 1: answers: expected one or more"):
        find("squad").load(str(tmp_path), "test")
    (tmp_path / "dev-v1.1.json").write_text('{"data": 1}')
    with pytest.raises(TaskError, match=r"expected the list 'data' of SQuAD v1.1's layout"):
        find("squad").load(str(tmp_path), "test")


@pytest.mark.parametrize("header", [True, False])
def test_mmlu(tmp_path, header):
    (tmp_path / "test").mkdir()
    text = io.StringIO()
    out = csv.writer(text)
    if header:
        out.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
    out.writerow(["Which,\nthen? ", "w", "x", "y", "z", 2 if header else "C"])
    (tmp_path / "test" / "high_school_physics_test.csv").write_text(text.getvalue())
    (example,) = find("mmlu").load(str(tmp_path), "test")
    assert example.prompt == (
        "The following are multiple choice questions (with answers) about high school physics.\n\n"
        "Which,\nthen?\nA. w\nB. x\nC. y\nD. z\nAnswer:"
    )
    assert example.answer == " C"
    with pytest.raises(TaskError, match="mmlu: has no training set"):
        find("mmlu").load(str(tmp_path), "train")


def test_mmlu_faults(tmp_path):
    path = tmp_path / "dev" / "x_dev.csv"
    with pytest.raises(TaskError, match=r"expected dev/<subject>_dev.csv"):
        find("mmlu").load(str(tmp_path), "dev")
    path.parent.mkdir()
    path.write_text("q,a,b,c,d,A\nq,a,b,c,d,E\n")
    with pytest.raises(TaskError, match=r'x_dev.csv:2: answer: expected one of "A", "B", "C", "D", got "E"'):
        find("mmlu").load(str(tmp_path), "dev")
    path.write_text("q,a,b,c\n")
    with pytest.raises(TaskError, match=r"x_dev.csv:1: expected 6 cells .*, got 4"):
        find("mmlu").load(str(tmp_path), "dev")
    path.write_text('q,"a\n')
    with pytest.raises(TaskError, match=r"x_dev.csv: line 1: malformed CSV"):
        find("mmlu").load(str(tmp_path), "dev")


@pytest.fixture
def wikisql_folder(tmp_path) -> Path:
    """One table in WikiSQL's layout: text in lower case in the database, as published."""
    table = {"id": "1-10-3", "header": ["Player", "No."], "types": ["text", "real"], "rows": [["A'b", 3], ["C", 1200]]}
    write(tmp_path / "test.tables.jsonl", [table])
    connection = sqlite3.connect(tmp_path / "test.db")
    connection.execute("CREATE TABLE table_1_10_3 (col0 text, col1 real)")
    connection.executemany("INSERT INTO table_1_10_3 VALUES (?, ?)", [("a'b", 3), ("c", 1200)])
    connection.commit()
    connection.close()
    rows = [
        {"table_id": "1-10-3", "question": "Who has 1,200?", "sql": {"sel": 0, "agg": 0, "conds": [[1, 0, "1,200"]]}},
        {
            "table_id": "1-10-3",
            "question": "How many?",
            "sql": {"sel": 1, "agg": 5, "conds": [[0, 0, "A'b"], [1, 1, 2]]},
        },
        {"table_id": "1-10-3", "question": "All?", "sql": {"sel": 1, "agg": 3, "conds": []}},
    ]
    write(tmp_path / "test.jsonl", rows)
    return tmp_path


def test_wikisql(wikisql_folder):
    examples = find("text2sql").load(str(wikisql_folder), "test")
    assert [example.answer for example in examples] == [
        " SELECT col0 FROM table_1_10_3 WHERE col1 = 1200.0",
        " SELECT AVG(col1) FROM table_1_10_3 WHERE col0 = 'a''b' AND col1 > 2",
        " SELECT COUNT(col1) FROM table_1_10_3",
    ]
    assert examples[0].prompt == (
        "Tables:\ntable_1_10_3(\ncol0 text -- Player\ncol1 real -- No.\n)\nQuestion: Who has 1,200?\nSQL:"
    )
    predictions = ["SELECT 'c'", "SELECT 3", "SELECT 2"]
    assert [execution_match(text, ex) for text, ex in zip(predictions, examples, strict=True)] == [1, 1, 1]


@pytest.mark.parametrize(
    "sql",
    [
        {"sel": 2, "agg": 0, "conds": []},
        {"sel": 0, "agg": 9, "conds": []},
        {"sel": 0, "agg": 0, "conds": [[1, 0, "x"]]},
        {},
        None,
    ],
)
def test_wikisql_faults(wikisql_folder, sql):
    write(wikisql_folder / "test.jsonl", [{"table_id": "1-10-3", "question": "q", "sql": sql}])
    with pytest.raises(TaskError, match=r"test.jsonl:1: sql: expected WikiSQL's sel, agg and conds"):
        find("text2sql").load(str(wikisql_folder), "test")
    write(wikisql_folder / "test.jsonl", [{"table_id": "9", "question": "q", "sql": sql}])
    with pytest.raises(TaskError, match=r"test.jsonl:1: table_id '9' is not in test.tables.jsonl"):
        find("text2sql").load(str(wikisql_folder), "test")


def test_text2sql_on_any_database(tmp_path):
    connection = sqlite3.connect(tmp_path / "shop.sqlite")
    connection.execute("CREATE TABLE sale (day TEXT, sum REAL)")
    connection.close()
    write(
        tmp_path / "questions.jsonl",
        [{"question": "How much?", "sql": "SELECT sum(sum)\n  FROM sale;", "split": "test"}],
    )
    (example,) = find("text2sql").load(str(tmp_path), "test")
    assert example.prompt == "Tables:\nsale(day, sum)\nQuestion: How much?\nSQL:"
    assert example.answer == " SELECT sum(sum) FROM sale;"
    write(tmp_path / "questions.jsonl", [{"question": "q", "sql": "s", "split": "validation"}])
    with pytest.raises(TaskError, match=r'questions.jsonl:1: split: expected one of "train", "dev", "test", got "val'):
        find("text2sql").load(str(tmp_path), "test")
    (tmp_path / "shop.sqlite").write_text("not a database" * 50)
    with pytest.raises(TaskError, match=r"shop.sqlite: expected a SQLite database: file is not a database"):
        find("text2sql").load(str(tmp_path), "test")
    (tmp_path / "more.sqlite").touch()
    with pytest.raises(TaskError, match=r"expected one file that fits \*.sqlite, got more.sqlite, shop.sqlite"):
        find("text2sql").load(str(tmp_path), "test")


HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "Add.", "input": "1 2", "output": "3"},
        {"instruction": "Add.", "instances": [{"input": "1 2", "output": "3"}]},
        {"id": "0", "data": ["Add.\n\n### Input:\n1 2", "3"]},
        {"messages": [{"role": "user", "content": "Add.\n\n### Input:\n1 2"}, {"role": "assistant", "content": "3"}]},
    ],
)
def test_instructions_of_every_layout(tmp_path, row):
    path = write(tmp_path / "a.jsonl", [row, {"instruction": "Other", "output": "x"}])
    found = [*find("instructions").load(str(path), "train"), *find("instructions").load(str(tmp_path), "dev")]
    (example,) = [example for example in found if example.id == "a:1.0"]
    assert example.prompt == f"{HEAD}### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:"
    assert example.answer == "\n3"


def test_a_dialogue_is_one_example_a_response_and_stays_on_one_side(tmp_path):
    rows = [{"id": str(n), "data": [f"hello {n}", "hi", "and?", "so"]} for n in range(300)]
    write(tmp_path / "0.jsonl", rows)
    train, dev = (find("instructions").load(str(tmp_path), split) for split in ("train", "dev"))
    assert (len(train), len(dev)) == (594, 6)
    assert {ex.id.rpartition(".")[0] for ex in train}.isdisjoint(ex.id.rpartition(".")[0] for ex in dev)
    later = next(example for example in train if example.id == "0:1.1" or example.id == "0:2.1")
    n = later.where.rpartition(":")[2]
    assert later.prompt.endswith(
        f"### Instruction:\nhello {int(n) - 1}\n\n### Response:\nhi\n\n### Instruction:\nand?\n\n### Response:"
    )
    assert later.answer == "\nso"


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"instruction": "i"}, "no field 'output'"),
        ({"input": "i"}, "no field 'instruction'"),
        ({"data": ["alone"]}, "expected the texts of user and assistant by turns"),
        ({"data": ["a", 1]}, "expected the texts of user and assistant by turns"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "message 1: expected user, got 'assistant'"),
        ({"instances": [], "instruction": "i"}, "no field 'output'"),
    ],
)
def test_instruction_faults(tmp_path, row, says):
    write(tmp_path / "a.jsonl", [row])
    with pytest.raises(TaskError, match=rf"a.jsonl:1: .*{says}|a.jsonl:1: {says}"):
        find("instructions").load(str(tmp_path), "train")
    with pytest.raises(TaskError, match="instructions: has no test split"):
        find("instructions").load(str(tmp_path), "test")


def test_own_task_of_one_file(tmp_path):
    path = write(tmp_path / "mine.jsonl", [{"prompt": f"say {n} ", "answer": str(n)} for n in range(30)])
    found = load_splits(find("own", "f1"), str(path))
    assert {split: len(examples) for split, examples in found.items()} == {"train": 24, "dev": 3, "test": 3}
    ids = Counter(example.id for examples in found.values() for example in examples)
    assert set(ids.values()) == {1}
    assert len(ids) == 30
    write(path, [{"prompt": "p", "answer": "a"}])
    with pytest.raises(TaskError, match=r"mine.jsonl: expected at least 3 records"):
        find("own").load(str(path), "train")


def test_own_task_of_a_folder(tmp_path):
    for split in ("train", "dev", "test"):
        write(tmp_path / f"{split}.jsonl", [{"prompt": f"{split}: ", "answer": "a", "references": ["a", "b"]}])
    assert load_splits(find("own"), str(tmp_path))["dev"][0].references == ("a", "b")
    write(tmp_path / "dev.jsonl", [{"prompt": "train: ", "answer": "a"}])
    with pytest.raises(TaskError, match=r"dev.jsonl:1: this prompt of dev is in train too, at .*train.jsonl:1"):
        load_splits(find("own"), str(tmp_path))
    write(tmp_path / "dev.jsonl", [{"prompt": "x", "answer": "a", "references": []}])
    with pytest.raises(TaskError, match=r"dev.jsonl:1: references: expected a list of one text or more"):
        load_splits(find("own"), str(tmp_path))


@pytest.mark.parametrize(
    ("task", "folder", "sizes"),
    [
        ("squad", "squad_v1.1", {"test": 10570}),
        ("boolq", "boolq", {"dev": 1635, "test": 1635}),
        ("copa", "copa", {"train": 400, "dev": 50, "test": 50}),
        ("gsm8k", "gsm8k", {"train": 6873, "dev": 600, "test": 1319}),
        ("text2sql", "text2sql_geography", {"train": 547, "dev": 48, "test": 277}),
        ("mmlu", "mmlu", {"dev": 285, "test": 14042}),
    ],
)
def test_the_real_sets_have_the_published_sizes(test_data, task, folder, sizes):
    wanted = ("dev", "test") if task == "mmlu" else ("train", "dev", "test")
    found = load_splits(find(task), str(test_data / folder), wanted)
    assert {split: len(found[split]) for split in sizes} == sizes
    for examples in found.values():
        for example in examples:
            assert not example.prompt.endswith(" ")
            assert example.answer.startswith(" ")
            assert example.choices == () or example.answer in example.choices


def test_real_instruction_sets(test_data):
    for folder in ("instruct_alpaca5k_NC", "instruct_seed_tasks"):
        found = load_splits(find("instructions"), str(test_data / folder), ("train", "dev"))
        share = len(found["dev"]) / (len(found["dev"]) + len(found["train"]))
        assert 0.005 < share < 0.015


def test_the_registry_loads_no_torch():
    code = (
        "import sys, perfbench.finetune.tasks.registry; print({'torch', 'datasets', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "set()"


def test_a_csv_of_the_wrong_encoding_is_named(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes("é".encode("latin-1"))
    with pytest.raises(TaskError, match="expected UTF-8"):
        list(records.read_csv(path))

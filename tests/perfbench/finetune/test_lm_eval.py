"""Our numbers are lm-eval's: the same items, the same real checkpoint, lm-eval's own task files with local data.

Item by item: each choice's log-probability, each generated text, each score. Skipped where lm_eval is not installed
(`pip install -e '.[test,lm-eval]'`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from perfbench.finetune import predict
from perfbench.finetune.tasks.records import read_csv
from perfbench.finetune.tasks.registry import find
from perfbench.finetune.tasks.task import Example
from perfbench.finetune.tasks.task_metrics import METRICS

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-eval: pip install -e '.[test,lm-eval]'", exc_type=ImportError)

# Not ours: lm-eval and what it imports warn as they like.
pytestmark = pytest.mark.filterwarnings("ignore")

ITEMS = 24
TASK_FILES = Path(lm_eval.__file__).parent / "tasks"


@pytest.fixture(scope="module")
def loaded(stories260k: Path) -> tuple[Any, Any]:
    """(model, tokenizer) of the real 260K checkpoint."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(stories260k).eval(), AutoTokenizer.from_pretrained(stories260k)


def short(examples: Iterable[Example], tokenizer: Any, new_tokens: int) -> list[Example]:
    """The first ITEMS of them that fit the checkpoint's 512 positions."""
    fit = (e for e in examples if len(tokenizer(e.prompt + e.answer)["input_ids"]) + new_tokens < 500)
    return [example for example, _ in zip(fit, range(ITEMS), strict=False)]


def evaluate(
    folder: Path, own_file: str, split: str, rows: list[dict[str, Any]], lm: Any, **changes: Any
) -> list[dict[str, Any]]:
    """lm-eval's samples, in the rows' order, of its task file `own_file` with its data replaced by `rows`."""
    from lm_eval.tasks import TaskManager

    data = folder / "rows.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "include": str(TASK_FILES / own_file),
        "task": "local_rows",
        "tag": None,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(data)}, "cache_dir": str(folder / "cache")},
        "training_split": None,
        "fewshot_split": None,
        "num_fewshot": 0,
        **changes,
    }
    (folder / "local_rows.yaml").write_text(json.dumps(config))
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(lm, tasks=["local_rows"], task_manager=manager, bootstrap_iters=0, log_samples=True)
    # Of gsm8k's two ways to find the answer, the strict one.
    samples = [sample for sample in found["samples"]["local_rows"] if sample["filter"] in ("none", "strict-match")]
    samples.sort(key=lambda sample: sample["doc_id"])
    assert len(samples) == len(rows)
    return samples


def hugging_face(loaded: tuple[Any, Any]) -> Any:
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = loaded
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8, max_length=512, add_bos_token=True)


def boolq_row(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "label": int(row["label"])}


def source_rows(examples: list[Example], change: Callable[[dict[str, Any]], dict[str, Any]] = dict) -> list[Any]:
    """The records that the examples come from, found again by their `file:number`."""
    lines = {path: Path(path).read_text().split("\n") for path in {e.where.rpartition(":")[0] for e in examples}}
    places = [example.where.rpartition(":") for example in examples]
    return [change(json.loads(lines[path][int(number) - 1])) for path, _, number in places]


def check_choices(loaded: tuple[Any, Any], examples: list[Example], samples: list[dict[str, Any]]) -> None:
    """Log-probabilities, item scores and so the mean: ours and lm-eval's."""
    assert len(examples) == ITEMS
    ours = predict.choice_scores(*loaded, examples, batch=7)
    for example, scores, sample in zip(examples, ours, samples, strict=True):
        assert sample["arguments"][0][0] == example.prompt
        theirs = [response[0][0] for response in sample["resps"]]
        assert scores == pytest.approx([float(value) for value in theirs], abs=1e-3)
    predictions = predict.predict(*loaded, find("boolq"), examples)  # as every task of kind `choose`
    right = [METRICS["accuracy"](text, example) for text, example in zip(predictions, examples, strict=True)]
    assert right == [sample["acc"] for sample in samples]
    assert 0 < sum(right) < ITEMS  # else the comparison says little


def test_boolq(loaded, test_data, tmp_path):
    examples = short(find("boolq").load(str(test_data / "boolq"), "test"), loaded[1], 0)
    rows = source_rows(examples, boolq_row)
    samples = evaluate(tmp_path, "super_glue/boolq/default.yaml", "validation", rows, hugging_face(loaded))
    check_choices(loaded, examples, samples)


def test_copa(loaded, test_data, tmp_path):
    examples = short(find("copa").load(str(test_data / "copa"), "test"), loaded[1], 0)
    samples = evaluate(
        tmp_path, "super_glue/copa/default.yaml", "validation", source_rows(examples), hugging_face(loaded)
    )
    check_choices(loaded, examples, samples)


def test_mmlu(loaded, test_data, tmp_path):
    subject = "high_school_geography"
    of_subject = (e for e in find("mmlu").load(str(test_data / "mmlu"), "test") if e.extra["subject"] == subject)
    examples = short(of_subject, loaded[1], 0)
    cells = dict(read_csv(test_data / "mmlu" / "test" / f"{subject}_test.csv"))
    found = [cells[int(example.where.rpartition(":")[2])] for example in examples]
    rows = [{"question": row[0], "choices": row[1:5], "answer": int(row[5]), "subject": subject} for row in found]
    samples = evaluate(tmp_path, f"mmlu/default/mmlu_{subject}.yaml", "test", rows, hugging_face(loaded))
    check_choices(loaded, examples, samples)


def test_gsm8k_texts(loaded, test_data, tmp_path):
    task = replace(find("gsm8k"), new_tokens=48)
    examples = short(task.load(str(test_data / "gsm8k"), "test"), loaded[1], 48)[:8]
    # A stop string that a model of children's stories does write, beside lm-eval's own.
    stop = ["Question:", " was"]
    settings = {"until": stop, "do_sample": False, "temperature": 0.0, "max_gen_toks": 48}
    samples = evaluate(
        tmp_path, "gsm8k/gsm8k.yaml", "test", source_rows(examples), hugging_face(loaded), generation_kwargs=settings
    )
    ours = predict.predict(*loaded, replace(task, stop=tuple(stop)), examples)
    for example, text, sample in zip(examples, ours, samples, strict=True):
        assert sample["arguments"][0][0] == example.prompt
        assert sample["resps"][0][0] == text
    assert len(set(ours)) > 1
    assert any(len(loaded[1](text)["input_ids"]) < 40 for text in ours)


def test_gsm8k_scores(test_data, tmp_path):
    """The scores of many ways to write an answer, given to lm-eval as a model's."""
    from lm_eval.api.model import LM

    endings = ["#### {n}", "#### {n}.", "#### ${n}", "####{n}", "{n}", "#### {n}\n#### 1", "#### 1\n#### {n}"]
    endings += ["#### -{n}", "#### {n}.0"]
    endings += ["#### {n} dollars", "####  {n}", "the answer is {n}.", "#### {n},000", "", "#### ."]
    examples = find("gsm8k").load(str(test_data / "gsm8k"), "test")[: 2 * len(endings)]
    numbers = [example.references[0].rpartition("#### ")[2] for example in examples]
    texts = [f" So.\n{endings[k % len(endings)].format(n=number)}" for k, number in enumerate(numbers)]
    said = dict(zip((example.prompt for example in examples), texts, strict=True))

    class Canned(LM):
        def generate_until(self, requests: list[Any], **keywords: Any) -> list[str]:
            return [said[request.args[0]] for request in requests]

        def loglikelihood(self, requests: list[Any], **keywords: Any) -> Any:
            raise NotImplementedError

        def loglikelihood_rolling(self, requests: list[Any], **keywords: Any) -> Any:
            raise NotImplementedError

    samples = evaluate(tmp_path, "gsm8k/gsm8k.yaml", "test", source_rows(examples), Canned())
    theirs = [sample["exact_match"] for sample in samples]
    ours = [METRICS["final_answer"](text, example) for text, example in zip(texts, examples, strict=True)]
    assert ours == theirs
    assert 0 < sum(ours) < len(ours)

"""Every metric against known cases, or against another way to compute it."""

from __future__ import annotations

import itertools
import re
import string

import pytest

from perfbench.finetune.tasks import squad
from perfbench.finetune.tasks.task import Example
from perfbench.finetune.tasks.task_metrics import METRICS, final_number, normalise


def scored(metric: str, prediction: str, *references: str) -> float:
    return METRICS[metric](prediction, Example("1", "", references[0], references))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Denver\tBroncos.", "denver broncos"),
        ("an apple, a day", "apple day"),
        ("Theatre of Athens", "theatre of athens"),  # `the` and `a` inside a word stay
        ("well-known", "wellknown"),
        ("$5,000", "5000"),
        ("the", ""),
        ("l’équipe", "l’équipe"),  # only ASCII punctuation goes, as in the official script
        ("A.B. the C", "ab c"),
    ],
)
def test_squad_normalisation(text, expected):
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "exact", "f1"),
    [
        ("Denver Broncos", ["The Denver Broncos!"], 1, 1),
        ("Broncos", ["Denver Broncos"], 0, 2 / 3),
        ("Denver Denver", ["Denver Broncos"], 0, 1 / 2),  # a word counts as often as both have it
        ("in the year 1999", ["1999", "year 1999"], 0, 4 / 5),  # the best of the references
        ("", ["1999"], 0, 0),
        ("nothing alike", ["1999"], 0, 0),
        (" 1999\n", ["x", "1999"], 1, 1),
    ],
)
def test_squad_scores(prediction, references, exact, f1):
    assert scored("exact_match", prediction, *references) == exact
    assert scored("f1", prediction, *references) == pytest.approx(f1)
    assert scored("squad", prediction, *references) == pytest.approx((exact + f1) / 2)


def official_f1(prediction: str, truth: str) -> float:
    """As the official script goes about it: step by step over characters and lists."""

    def tokens(text: str) -> list[str]:
        text = "".join(char for char in text.lower() if char not in set(string.punctuation))
        return re.sub(r"\b(a|an|the)\b", " ", text).split()

    left, same = tokens(truth), 0
    for word in tokens(prediction):
        if word in left:
            left.remove(word)
            same += 1
    if same == 0:
        return 0.0
    precision, recall = same / len(tokens(prediction)), same / len(tokens(truth))
    return 2 * precision * recall / (precision + recall)


def test_f1_equals_another_computation_on_real_answers(test_data):
    examples = squad.load(str(test_data / "squad_v1.1"), "test")[:2000]
    # Each is answered with the reference of the next: some words are shared, most are not.
    for example, other in itertools.pairwise(examples):
        prediction = f"{other.answer} {example.references[-1].split()[0]}"
        expected = max(official_f1(prediction, reference) for reference in example.references)
        assert METRICS["f1"](prediction, example) == pytest.approx(expected)
        assert METRICS["squad"](example.answer, example) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("so 9 * 2 = <<9*2=18>>18.\n#### 18", "18"),
        ("#### 1,234,567", "1234567"),
        ("#### -5", "-5"),
        ("#### 0.25", "0.25"),
        ("#### 18.", "18"),
        ("#### 18\n\nQuestion: next\n#### 19", "18"),
        ("####18", None),
        ("#### $18", None),  # lm-eval's pattern and the official one want a digit there
        ("18", None),
        ("", None),
    ],
)
def test_final_numbers(text, expected):
    assert final_number(text) == expected


def test_final_answer():
    assert scored("final_answer", " thus\n#### 1,000", "x\n#### 1000") == 1
    assert scored("final_answer", " thus\n#### 1000.", "x\n#### 1,000") == 1
    assert scored("final_answer", "#### 1001", "x\n#### 1000") == 0
    assert scored("final_answer", "1000", "x\n#### 1000") == 0


def test_every_gold_answer_of_gsm8k_is_right_and_the_next_one_is_not(test_data):
    from perfbench.finetune.tasks import gsm8k

    examples = gsm8k.load(str(test_data / "gsm8k"), "test")
    assert all(METRICS["final_answer"](example.answer, example) == 1 for example in examples)
    # Independently: what stands after the last blank, as a number.
    for example, other in itertools.pairwise(examples):
        equal = example.answer.split()[-1].replace(",", "") == other.answer.split()[-1].replace(",", "")
        assert METRICS["final_answer"](other.answer, example) == equal


def test_accuracy():
    assert scored("accuracy", " yes", "yes") == 1
    assert scored("accuracy", "Yes", "yes") == 0
    assert scored("accuracy", "", "yes") == 0


def test_every_metric_stays_between_0_and_1():
    for name in set(METRICS) - {"sql_execution"}:
        for prediction in ("", "#### 5", "the", "yes no"):
            assert 0 <= scored(name, prediction, "#### 5", "the") <= 1

"""Every metric by name: one prediction and its example -> a score from 0 to 1. A task's figure is the mean."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable

from perfbench.finetune.tasks.sql_execution import execution_match
from perfbench.finetune.tasks.task import Example

Metric = Callable[[str, Example], float]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
# GSM8K's own pattern, and lm-eval's `strict-match`: the first one counts.
_FINAL = re.compile(r"#### (-?[0-9.,]+)")


def accuracy(prediction: str, example: Example) -> float:
    """1 where the prediction is the reference, blanks around it aside."""
    return float(prediction.strip() == example.references[0].strip())


def exact_match(prediction: str, example: Example) -> float:
    """1 where the prediction equals a reference, both normalised as SQuAD does."""
    found = normalise(prediction)
    return float(any(found == normalise(reference) for reference in example.references))


def f1(prediction: str, example: Example) -> float:
    """The harmonic mean of precision and recall over normalised words; the best of the references, as SQuAD's."""
    return max(_f1(normalise(prediction).split(), normalise(ref).split()) for ref in example.references)


def squad(prediction: str, example: Example) -> float:
    """The papers' figure for SQuAD v1.1: the mean of F1 and exact match."""
    return (f1(prediction, example) + exact_match(prediction, example)) / 2


def final_answer(prediction: str, example: Example) -> float:
    """1 where the number after the prediction's first `#### ` is the reference's, as lm-eval's `strict-match`."""
    found = final_number(prediction)
    return float(found is not None and found == final_number(example.references[0]))


def normalise(text: str) -> str:
    """SQuAD v1.1's normalisation: lower case, no punctuation, no articles, single blanks."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def final_number(text: str) -> str | None:
    """The number after the first `#### ` as text without commas and without a full stop at its end; None without."""
    found = _FINAL.search(text)
    return found[1].replace(",", "").removesuffix(".") if found else None


def _f1(predicted: list[str], reference: list[str]) -> float:
    common = sum((Counter(predicted) & Counter(reference)).values())
    if not common:
        return 0.0
    precision, recall = common / len(predicted), common / len(reference)
    return 2 * precision * recall / (precision + recall)


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "exact_match": exact_match,
    "f1": f1,
    "squad": squad,
    "final_answer": final_answer,
    "sql_execution": execution_match,
}

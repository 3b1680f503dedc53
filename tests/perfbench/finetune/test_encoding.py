"""What training sees: the answer's tokens have the loss, and nothing else has."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from perfbench.errors import TaskError
from perfbench.finetune.encoding import IGNORED, Collator, encode, encode_split
from perfbench.finetune.tasks.task import Example
from tests.perfbench.finetune.made_up import byte_tokenizer


def example(prompt: str, answer: str, where: str = "train.jsonl:7") -> Example:
    return Example("7", prompt, answer, (answer,), where=where)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_tokenizer()


def words(*known: str) -> Any:
    """A tokenizer whose tokens cross the line between prompt and answer: `ab` is one token, `a` and `b` are two."""
    inner = Tokenizer(models.BPE({w: i for i, w in enumerate(known)}, [("a", "b")]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


def test_prompt_then_answer_then_end(tokenizer: Any) -> None:
    found = encode(example("2+2=", "4"), tokenizer, end=True)
    assert found.ids == (*tokenizer("2+2=")["input_ids"], *tokenizer("4", add_special_tokens=False)["input_ids"], 1)
    assert found.prompt_tokens == 5  # <s> and four bytes
    assert encode(example("2+2=", "4"), tokenizer, end=False).ids == found.ids[:-1]


def test_an_answer_that_would_change_the_prompts_tokens_is_encoded_alone() -> None:
    tokenizer = words("a", "b", "ab", "</s>")
    assert tokenizer("ab")["input_ids"] == [2], "the two letters have to become one token"
    found = encode(example("a", "b"), tokenizer, end=True)
    assert (found.ids, found.prompt_tokens) == ((0, 1, 3), 1)


def test_the_loss_is_on_the_answer_only(tokenizer: Any) -> None:
    rows = [encode(example(*pair), tokenizer, end=True) for pair in (("2+2=", "4"), ("12+30=", "42"))]
    batch = Collator(pad_id=9)(rows)
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    for index, row in enumerate(rows):
        length = len(row.ids)
        assert batch["input_ids"][index, :length].tolist() == list(row.ids)
        assert set(batch["input_ids"][index, length:].tolist()) <= {9}
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (10 - length)
        expected = [IGNORED] * row.prompt_tokens + list(row.ids[row.prompt_tokens :]) + [IGNORED] * (10 - length)
        assert batch["labels"][index].tolist() == expected


def test_what_does_not_fit_is_refused_with_its_record_and_the_numbers(tokenizer: Any) -> None:
    fits = encode_split([example("2+2=", "4")], tokenizer, end=True, max_tokens=7)
    assert (len(fits[0]), fits[1]) == (1, 0)
    message = "train.jsonl:7: expected at most max_tokens 6, got 5 of the prompt + 2 of the answer"
    with pytest.raises(TaskError, match=message.replace("+", r"\+")):
        encode_split([example("2+2=", "4")], tokenizer, end=True, max_tokens=6)


def test_what_does_not_fit_is_left_out_where_that_is_asked_for(tokenizer: Any) -> None:
    examples = [example("2+2=", "4"), example("20+20=", "40")]
    kept, left_out = encode_split(examples, tokenizer, end=True, max_tokens=7, leave_out=True)
    assert ([len(row.ids) for row in kept], left_out) == ([7], 1)
    with pytest.raises(TaskError, match="none of 1 examples fits max_tokens 7"):
        encode_split(examples[1:], tokenizer, end=True, max_tokens=7, leave_out=True)


@pytest.mark.parametrize(("prompt", "answer", "what"), [("2+2=", "", "answer"), ("", "4", "prompt")])
def test_nothing_to_learn_is_refused(prompt: str, answer: str, what: str) -> None:
    bare = byte_tokenizer()
    bare.backend_tokenizer.post_processor = None  # else a prompt has its <s> at least
    with pytest.raises(TaskError, match=f"train.jsonl:7: expected {what} of at least one token"):
        encode(example(prompt, answer), bare, end=True)


@pytest.mark.parametrize(("prompt", "answer"), [("+2+2=", "4"), ("2=", "2"), ("2+2=", "2+2"), ("2=+", "24")])
def test_an_activated_adapter_learns_from_what_its_prompts_invoke(tokenizer: Any, prompt: str, answer: str) -> None:
    """PEFT looks for the tokens in prompt and answer alike, and finds the last ones."""
    asked: dict[str, Any] = {"end": True, "max_tokens": 16, "invocation": tokenizer.encode("+2")[1:]}
    if answer == "4":
        assert len(encode_split([example(prompt, answer)], tokenizer, **asked)[0]) == 1
        return
    with pytest.raises(TaskError, match=r"^train.jsonl:7: expected the tokens \[\d+, \d+\], which invoke the adapter"):
        encode_split([example(prompt, answer)], tokenizer, **asked)


def test_a_tokenizer_without_an_end_is_refused() -> None:
    bare = byte_tokenizer()
    bare.eos_token = None
    with pytest.raises(TaskError, match="no end-of-sequence token"):
        encode(example("2+2=", "4"), bare, end=True)

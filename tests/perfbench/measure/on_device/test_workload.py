"""The batch: who asks, with which adapter, in which words."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from perfbench.errors import BackboneError, ScenarioError
from perfbench.measure.on_device import prompts, workload
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.spec.cases import Workload

BASE = Workload(
    prompts=None,
    prompt_tokens=9,
    new_tokens=4,
    beams=1,
    requests=12,
    tenants=4,
    resident=10,
    tenant_mix="distinct",
    zipf_exponent=None,
    without_adapter=0.0,
)
MIXES: dict[str, dict[str, Any]] = {
    "distinct": {},
    "identical": {"tenant_mix": "identical"},
    "uniform": {"tenant_mix": "uniform"},
    "zipf": {"tenant_mix": "zipf", "zipf_exponent": 1.2},
}


@pytest.mark.parametrize("mix", MIXES)
def test_slots_are_residents_and_the_seed_decides_them(mix: str) -> None:
    point = replace(BASE, **MIXES[mix], without_adapter=0.25)
    draws = {workload.assign_slots(point, seed) for seed in range(20)}
    assert workload.assign_slots(point, 3) == workload.assign_slots(point, 3)
    assert len(draws) > 10
    for slots in draws:
        assert len(slots) == 12
        assert slots.count(-1) == 3
        assert set(slots) <= {-1, *range(10)}
        assert len(set(slots) - {-1}) <= 4


def test_distinct_tenants_take_turns() -> None:
    assert set(Counter(workload.assign_slots(BASE, 1)).values()) == {3}
    each = workload.assign_slots(replace(BASE, tenants=12, resident=12), 1)
    assert sorted(each) == list(range(12))


def test_identical_is_one_tenant() -> None:
    assert len(set(workload.assign_slots(replace(BASE, tenant_mix="identical"), 1))) == 1


def test_zipf_favours_low_ranks_as_its_exponent_says_and_uniform_none() -> None:
    # All residents ask, so that the first drawn resident is rank 1; its share is 1 / (1 + 1/2 + 1/3 + 1/4) = 0.48.
    point = replace(BASE, requests=20_000, resident=4, tenant_mix="zipf", zipf_exponent=1.0)
    shares = [count / 20_000 for _, count in Counter(workload.assign_slots(point, 5)).most_common()]
    assert shares == pytest.approx([0.48, 0.24, 0.16, 0.12], abs=0.02)
    uniform = Counter(workload.assign_slots(replace(point, tenant_mix="uniform", zipf_exponent=None), 5))
    assert [count / 20_000 for count in uniform.values()] == pytest.approx([0.25] * 4, abs=0.02)


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
def test_the_share_without_adapter_is_exact(share: float) -> None:
    assert workload.assign_slots(replace(BASE, without_adapter=share), 7).count(-1) == round(12 * share)


def test_random_prompts_are_the_seed_s() -> None:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    one, again, other = (workload.make(BASE, base, seed) for seed in (1, 1, 2))
    assert one.input_ids.shape == (12, 9)
    assert bool((one.attention_mask == 1).all())
    assert torch.equal(one.input_ids, again.input_ids)
    assert one.slots == again.slots
    assert not torch.equal(one.input_ids, other.input_ids)
    assert int(one.input_ids.max()) < base.shape.vocab


def test_a_named_shape_has_no_words(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\n" * 12, encoding="utf-8")
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    with pytest.raises(BackboneError, match="no tokenizer"):
        workload.make(replace(BASE, prompts=str(tmp_path / "p.txt")), base, 1)


READABLE = {
    "p.txt": ("one\n\n  \ntwo words\n", ["one", "two words"]),
    "a.jsonl": ('{"prompt": "one"}\n"two"\n', ["one", "two"]),
    "b.jsonl": ('{"question": "one", "answer": "x"}\n{"turns": ["two", "three"]}\n', ["one", "two"]),
}


# Some that Python's splitlines, and its reading of text, take for line ends.
SEPARATORS = "a\u0085b\u2028c\u2029d\x0be\x0cf\x1cg\rh"
ODD_LINES: dict[str, tuple[bytes, list[str]]] = {
    "marks.txt": (b"\xef\xbb\xbfone\ntwo\n", ["one", "two"]),
    "marks.jsonl": (b'\xef\xbb\xbf"one"\n"two"\n', ["one", "two"]),
    "windows.txt": (b"one\r\n\r\ntwo words\r\n", ["one", "two words"]),
    "windows.jsonl": (b'"one"\r\n\r\n"two"', ["one", "two"]),
    "separators.txt": (f"{SEPARATORS}\ni\n".encode(), [SEPARATORS, "i"]),
    "separators.jsonl": ('"a\u0085b\u2028c"\n"d"\n'.encode(), ["a\u0085b\u2028c", "d"]),
    "pairs.jsonl": (b'"\\ud83d\\ude00"\n', ["\U0001f600"]),
    "null.jsonl": (b'{"prompt": null, "question": "one"}\n', ["one"]),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD_LINES)
def test_only_a_line_end_ends_a_prompt(name: str, tmp_path: Path) -> None:
    content, expected = ODD_LINES[name]
    (tmp_path / name).write_bytes(content)
    assert prompts.read_prompts(tmp_path / name) == expected


@pytest.mark.parametrize("name", READABLE)
def test_prompts_are_read(name: str, tmp_path: Path) -> None:
    text, expected = READABLE[name]
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert prompts.read_prompts(tmp_path / name) == expected


UNREADABLE = {
    "empty.txt": (b"\n \n", r"empty\.txt: expected at least one prompt"),
    "latin.txt": (b"\xff\xfe", "can't read the prompts"),
    "broken.jsonl": (b'"one"\n{"prompt": \n', r"broken\.jsonl:2: expected a line of JSON"),
    "keys.jsonl": (b'{"word": "one"}\n', r"keys\.jsonl:1: expected a string or an object"),
    "type.jsonl": (b'{"prompt": 3}\n', r"type\.jsonl:1: expected a string or an object"),
    "turns.jsonl": (b'{"turns": []}\n', r"turns\.jsonl:1: expected a string or an object"),
    "blanks.jsonl": (b'"one"\n\n \r\n"two"\n{"id": 5}\n', r"blanks\.jsonl:5: expected .* got an object with 'id'"),
    "half.jsonl": (b'"one"\n"a \\ud83d b"\n', r"half\.jsonl:2: expected text, got half of a surrogate pair"),
    "chat.jsonl": (b'{"messages": [{"role": "user", "content": 3}]}', r"chat\.jsonl:1: messages: expected 'role' and"),
    "share.jsonl": (b'{"conversations": [{"from": "human"}]}', r"share\.jsonl:1: conversations: expected 'from' and"),
    "none.jsonl": (b'{"messages": []}', r"none\.jsonl:1: messages: expected a list of messages, got \[\]"),
    "role.jsonl": (b'{"messages": [{"role": "usr", "content": "a"}]}', r"unknown role 'usr'; did you mean 'user'\?"),
    "answer.jsonl": (
        b'{"messages": [{"role": "system", "content": "a"}]}',
        "expected a message of the user's, got none",
    ),
    "halved.jsonl": (b'{"messages": [{"role": "user", "content": "\\ud83d"}]}', "half of a surrogate pair"),
    "deep.jsonl": (b"[" * 100_000, r"deep\.jsonl:1: expected a line of JSON"),
    "long.jsonl": (b"9" * 5000, r"long\.jsonl:1: expected a line of JSON"),
    "wide.txt": ("one\ntwo\n".encode("utf-16"), r"wide\.txt: can't read the prompts: expected UTF-8"),
}


CHATS: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "OpenAI's": (
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]},
        [("system", "s"), ("user", "u")],
    ),
    "ShareGPT's, with its answer": (
        {"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": "a"}]},
        [("user", "u")],
    ),
    "of two turns": (
        {"conversation": [{"from": who, "value": who} for who in ("human", "gpt", "human", "gpt")]},
        [("user", "human"), ("assistant", "gpt"), ("user", "human")],
    ),
}


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_read_up_to_the_user_s_last_message(name: str, tmp_path: Path) -> None:
    record, expected = CHATS[name]
    (tmp_path / "c.jsonl").write_text(json.dumps(record) + "\n", encoding="utf-8")
    (found,) = prompts.read_prompts(tmp_path / "c.jsonl")
    assert [(message["role"], message["content"]) for message in found if isinstance(message, dict)] == expected


def test_the_tokenizer_s_template_writes_a_chat() -> None:
    tokenizer, chat = words(), [{"role": "user", "content": "one"}]
    answer = "{% if add_generation_prompt %} two{% endif %}"
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}" + answer
    ids, mask = prompts.tokenise([chat, "two"], tokenizer, 2, None)
    assert ids.tolist() == [[0, 2, 3], [0, 0, 3]]
    assert mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    tokenizer.chat_template = "{{ raise_exception('no such roles') }}"
    with pytest.raises(ScenarioError, match=r"^c\.jsonl:1: the tokenizer's chat template takes no such chat: no such"):
        prompts.tokenise([chat], tokenizer, 1, None, places=["c.jsonl:1"])
    tokenizer.chat_template = None
    with pytest.raises(ScenarioError, match=r"^c\.jsonl:1: a chat needs a chat template, and the tokenizer has none"):
        prompts.tokenise([chat], tokenizer, 1, None, places=["c.jsonl:1"])


@pytest.mark.parametrize("name", UNREADABLE)
def test_prompts_that_can_not_be_read_say_where(name: str, tmp_path: Path) -> None:
    content, message = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ScenarioError, match=message) as raised:
        prompts.read_prompts(tmp_path / name)
    assert "\n" not in str(raised.value)


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.txt: can't read the prompts"):
        prompts.read_prompts(tmp_path / "none.txt")


@pytest.fixture(scope="module")
def real(stories260k: Path) -> backbone.Backbone:
    return backbone.load(str(stories260k), "fp32", "cpu", seed=0)


@pytest.fixture(scope="module")
def questions(test_data: Path) -> Path:
    path = test_data / "mt_bench" / "question.jsonl"
    if not path.is_file():
        pytest.skip(f"needs real prompts: no mt_bench/question.jsonl in {test_data}")
    return path


def test_real_prompts_are_padded_on_the_left(real: backbone.Backbone, questions: Path) -> None:
    texts, tokenizer = prompts.read_prompts(questions), real.tokenizer()
    assert len(texts) == 80
    ids, mask = prompts.tokenise(texts, tokenizer, 5, None)
    rows = [tokenizer(text)["input_ids"] for text in texts[:5]]
    lengths = [len(row) for row in rows]
    assert len(set(lengths)) > 1
    assert ids.shape == mask.shape == (5, max(lengths))
    assert mask.sum(dim=1).tolist() == lengths
    for i, row in enumerate(rows):
        assert ids[i, -len(row) :].tolist() == row
        assert mask[i].tolist() == [0] * (max(lengths) - len(row)) + [1] * len(row)


def test_real_prompts_are_cut_and_served(real: backbone.Backbone, questions: Path) -> None:
    point = replace(BASE, prompts=str(questions), prompt_tokens=20)
    batch = workload.make(point, real, 1)
    assert batch.input_ids.shape == (12, 20)
    assert tuple(batch.alone(0).attention_mask.unique().tolist()) == (1,)


def test_too_long_and_too_few_prompts_are_refused(real: backbone.Backbone, questions: Path, tmp_path: Path) -> None:
    long = replace(BASE, prompts=str(questions), prompt_tokens=None, new_tokens=real.shape.context)
    with pytest.raises(ScenarioError, match=r"set workload\.prompt_tokens to cut them"):
        workload.make(long, real, 1)
    (tmp_path / "p.txt").write_text("one\n", encoding="utf-8")
    with pytest.raises(ScenarioError, match="12 requests need as many prompts, got 1"):
        workload.make(replace(BASE, prompts=str(tmp_path / "p.txt")), real, 1)


def words(*added: str) -> Any:
    """A tokenizer of four words that puts <s> before a text; `added` come after its vocabulary."""
    inner = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, "one": 2, "two": 3}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    made.add_tokens(list(added))
    return made


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two", [0, 2, 3]),
        ("<s>one two", [0, 2, 3]),
        ("<s><s> one two", [0, 2, 3]),
        ("one <s> two", [0, 2, 3]),
        ("<s>one <s> two", [0, 2, 3]),
    ],
)
def test_a_text_begins_once(text: str, expected: list[int]) -> None:
    ids, _ = prompts.tokenise([text], words(), 1, None)
    assert ids.tolist() == [expected]


def test_letters_that_are_tokens_stay_letters(real: backbone.Backbone) -> None:
    tokenizer = real.tokenizer()
    ids, _ = prompts.tokenise(["<s>One <s> day"], tokenizer, 1, None)
    assert ids[0].tolist().count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "One <s> day"


def test_a_tokenizer_that_begins_nothing_is_left_alone() -> None:
    bare = words()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    ids, _ = prompts.tokenise(["<s> one <s> two"], bare, 1, None)
    assert ids.tolist() == [[0, 2, 0, 3]]


def test_a_token_beyond_the_backbone_s_is_refused() -> None:
    texts, places = ["one", "two <new>"], ["p.txt:1", "p.txt:4"]
    with pytest.raises(ScenarioError, match=r"^p\.txt:4: expected tokens .* has 4, got '<new>', token 4 of"):
        prompts.tokenise(texts, words("<new>"), 2, None, vocabulary=4, places=places)
    ids, _ = prompts.tokenise(texts, words("<new>"), 2, 2, vocabulary=4, places=places)
    assert ids.tolist() == [[0, 2], [0, 3]], "what is cut is not served"


def test_a_prompt_without_tokens_is_refused() -> None:
    bare = words()
    bare.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A", special_tokens=[])
    with pytest.raises(ScenarioError, match=r"^workload.prompts: prompt 1: expected at least one token"):
        prompts.tokenise(["\u3000"], bare, 1, None)


def test_a_batch_names_the_prompt_it_can_t_serve(tiny_backbone: backbone.Backbone, tmp_path: Path) -> None:
    path = tmp_path / "p.txt"
    path.write_text("one\n\ntwo <new>\n", encoding="utf-8")
    point = replace(BASE, prompts=str(path), requests=2, tenants=2)
    with pytest.raises(ScenarioError, match=rf"^{path}:3: expected tokens of the backbone, which has 4"):
        workload.make(point, tiny_backbone, 1)


@pytest.fixture
def tiny_backbone(tmp_path: Path) -> backbone.Backbone:
    """A backbone of four tokens whose tokenizer has got a fifth."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=4, **sizes)).save_pretrained(str(tmp_path / "model"))
    words("<new>").save_pretrained(str(tmp_path / "model"))
    return backbone.load(str(tmp_path / "model"), "fp32", "cpu", seed=0)


def test_every_turn_has_prompts_of_its_own_and_the_same_for_all_arms() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 8], [9, 10, 11, 12, 13, 14]])
    batch = Batch(ids, (ids > 0).long(), (0, 1), 1, new_tokens=2, follow_up=ids)
    first, again, second = (workload.fresh(batch, 7, turn) for turn in (0, 0, 1))
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.follow_up is not None
    assert torch.equal(first.follow_up, again.follow_up)
    for other in (batch, second, workload.fresh(batch, 8, 0), workload.fresh(batch, 7, -1)):
        assert not torch.equal(first.input_ids, other.input_ids)
    assert torch.equal(first.attention_mask, batch.attention_mask)
    assert not first.input_ids[0, :2].any(), "padding stays padding"
    assert set(first.input_ids[first.attention_mask.bool()].tolist()) <= set(range(5, 15))

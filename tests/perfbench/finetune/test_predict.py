"""Predictions as trained against the plainest way to make them: one row at a time, no padding, no cache."""

from __future__ import annotations

import copy
import string
from typing import Any

import peft
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perfbench.errors import FinetuneError, TaskError
from perfbench.finetune import choices, predict, trained
from perfbench.finetune.tasks.task import Example, Task

CHARACTERS = string.ascii_lowercase + string.digits + " .?\n"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """A token for each character, and <s> in front."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{char: n for n, char in enumerate(CHARACTERS, start=3)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture
def model() -> Any:
    """Two layers, 16 wide, with weights large enough that its choices are clear."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(CHARACTERS) + 3,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,
    )
    return LlamaForCausalLM(config).eval()


EXAMPLES = [
    Example("1", "is it?", " yes", ("yes",), (" no", " yes"), "x:1"),
    Example("2", "a longer one. is it?", " no", ("no",), (" no", " yes", " by no means"), "x:2"),
    Example("3", "x", " b", ("b",), (" a", " b", " c", " d"), "x:3"),
    # Each a single token: read at once.
    Example("4", "which one? ", "b", ("b",), ("a", "b", "c", "d"), "x:4"),
]
CHOOSE = Task("choose", "", "choose", "accuracy", lambda source, split: [])


def generating(**changes: Any) -> Task:
    return Task("generate", "", "generate", "exact_match", lambda source, split: [], **{"new_tokens": 12, **changes})


@torch.no_grad()
def plain_score(model: Any, prompt: list[int], choice: list[int], soft: int = 0) -> float:
    """The sum of log-probabilities, a call for each token; `soft` logits stand in front."""
    total, tokens = 0.0, list(prompt)
    for token in choice:
        logits = model(input_ids=torch.tensor([tokens])).logits[0, soft:].double()
        total += float(torch.log_softmax(logits[-1], dim=-1)[token])
        tokens.append(token)
    return total


@torch.no_grad()
def plain_text(model: Any, tokenizer: Any, prompt: str, new_tokens: int) -> str:
    """Greedy: the whole sequence again for each token."""
    tokens = tokenizer(prompt)["input_ids"]
    start = len(tokens)
    for _ in range(new_tokens):
        tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(tokens[start:], skip_special_tokens=True))


@pytest.mark.parametrize("batch", [1, 2, 16])
def test_choice_scores_equal_those_of_single_rows(model, tokenizer, batch):
    found = predict.choice_scores(model, tokenizer, EXAMPLES, batch=batch)
    for example, scores in zip(EXAMPLES, found, strict=True):
        expected = [plain_score(model, *row) for row in choices.encode_choices(tokenizer, example)]
        assert scores == pytest.approx(expected, abs=1e-4)
    predictions = predict.predict(model, tokenizer, CHOOSE, EXAMPLES, batch=batch)
    assert predictions == [ex.choices[scores.index(max(scores))] for ex, scores in zip(EXAMPLES, found, strict=True)]


def test_a_trained_adalora_that_was_loaded_scores_choices(model, tokenizer, tmp_path):
    """PEFT adds AdaLoRA's orthogonality term wherever it is given labels, and fails where nothing is trainable."""
    module = trained.attach(copy.deepcopy(model), "adalora", None, 0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "lora_E" in name:
                parameter.fill_(20.0)
    trained.save(module, tmp_path / "adapter")
    loaded = trained.load(copy.deepcopy(model), tmp_path / "adapter")
    found = predict.choice_scores(loaded, tokenizer, EXAMPLES, batch=2)
    for example, scores in zip(EXAMPLES, found, strict=True):
        expected = [plain_score(loaded, *row) for row in choices.encode_choices(tokenizer, example)]
        assert scores == pytest.approx(expected, abs=1e-3)
    assert found != predict.choice_scores(model, tokenizer, EXAMPLES, batch=2)


def test_a_longer_choice_is_not_helped():
    """The sum, as lm-eval's `acc`, not the mean."""
    assert choices.choose([-3.0, -2.0, -2.5]) == 1
    assert choices.choose([-2.0, -2.0]) == 0
    assert choices.choose([float("-inf"), float("-inf")]) == 0


@pytest.mark.parametrize("batch", [1, 3])
def test_texts_in_a_padded_batch_equal_those_alone(model, tokenizer, batch):
    found = predict.predict(model, tokenizer, generating(), EXAMPLES, batch=batch)
    assert found == [plain_text(model, tokenizer, example.prompt, 12) for example in EXAMPLES]
    assert len(set(found)) == len(EXAMPLES)


def test_beams_in_a_padded_batch_equal_those_alone(model, tokenizer):
    found = predict.predict(model, tokenizer, generating(), EXAMPLES, batch=3, beams=3)
    for example, text in zip(EXAMPLES, found, strict=True):
        ids = torch.tensor([tokenizer(example.prompt)["input_ids"]])
        out = model.generate(
            input_ids=ids, num_beams=3, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0
        )
        assert text == choices.decode(tokenizer, out[0, ids.shape[1] :].tolist(), ())
    assert found != predict.predict(model, tokenizer, generating(), EXAMPLES)


def test_a_text_ends_at_the_first_stop_string_and_so_does_the_work(model, tokenizer):
    (whole,) = predict.predict(model, tokenizer, generating(new_tokens=20), EXAMPLES[:1])
    stop = whole[3:5]
    calls = 0

    def count(*arguments: Any) -> None:
        nonlocal calls
        calls += 1

    handle = model.register_forward_hook(count)
    (text,) = predict.predict(model, tokenizer, generating(new_tokens=20, stop=("never", stop)), EXAMPLES[:1])
    handle.remove()
    assert text == whole[: whole.index(stop)]
    shorter = (predict.predict(model, tokenizer, generating(new_tokens=n), EXAMPLES[:1])[0] for n in range(1, 21))
    assert calls == next(n for n, text in enumerate(shorter, start=1) if stop in text) < 20
    beams = predict.predict(model, tokenizer, generating(stop=(stop,)), EXAMPLES, beams=3)
    assert not any(stop in text for text in beams)


def test_a_stop_string_that_the_prompt_ends_in_does_not_stop(model, tokenizer):
    free = predict.generate(model, tokenizer, ["is it?"], new_tokens=6)
    assert predict.generate(model, tokenizer, ["is it?"], new_tokens=6, stop=("it?" + free[0][:1],)) == free


def test_a_text_ends_at_the_end_of_sequence_token(model, tokenizer):
    (whole,) = predict.predict(model, tokenizer, generating(), EXAMPLES[:1])
    other = copy.deepcopy(tokenizer)
    other.eos_token = whole[4]
    found = predict.predict(model, other, generating(), EXAMPLES[:1])
    assert found == [whole[: whole.index(whole[4])]]


def test_generation_settings_of_the_checkpoint_do_not_count(model, tokenizer):
    plain = predict.predict(model, tokenizer, generating(), EXAMPLES)
    model.generation_config.update(
        do_sample=True, temperature=5.0, top_k=2, repetition_penalty=9.0, no_repeat_ngram_size=1, num_beams=2,
        max_new_tokens=2, eos_token_id=list(range(3, 40)),
    )  # fmt: skip
    assert predict.predict(model, tokenizer, generating(), EXAMPLES) == plain


def test_dropout_is_off_and_the_mode_comes_back(model, tokenizer):
    config = peft.LoraConfig(r=2, lora_dropout=0.9, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    tuned = peft.get_peft_model(model, config).train()
    first = predict.choice_scores(tuned, tokenizer, EXAMPLES)
    assert predict.choice_scores(tuned, tokenizer, EXAMPLES) == first
    assert tuned.training
    merged = tuned.merge_and_unload()
    expected = predict.choice_scores(merged, tokenizer, EXAMPLES)
    for scores, others in zip(first, expected, strict=True):
        assert scores == pytest.approx(others, abs=1e-3)


def test_logits_of_soft_prompts_are_left_out(model, tokenizer):
    torch.manual_seed(1)
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    tuned = peft.get_peft_model(model, config).eval()
    found = predict.choice_scores(tuned, tokenizer, EXAMPLES)
    for example, scores in zip(EXAMPLES, found, strict=True):
        expected = [plain_score(tuned, *row, soft=4) for row in choices.encode_choices(tokenizer, example)]
        assert scores == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_soft_prompts_stand_before_the_prompt_and_not_before_padding(model, tokenizer, kind):
    torch.manual_seed(1)
    config = {"prompt": peft.PromptTuningConfig, "prefix": peft.PrefixTuningConfig}[kind]
    tuned = peft.get_peft_model(model, config(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    embedding = next(p for p in tuned.parameters() if p.requires_grad)
    torch.nn.init.normal_(embedding)
    alone = [predict.predict(tuned, tokenizer, generating(), [example])[0] for example in EXAMPLES]
    assert len(set(alone)) > 1
    assert predict.predict(tuned, tokenizer, generating(), EXAMPLES, batch=3) == alone
    assert predict.predict(tuned, tokenizer, CHOOSE, EXAMPLES, batch=9) == [
        predict.predict(tuned, tokenizer, CHOOSE, [example], batch=1)[0] for example in EXAMPLES
    ]


def test_a_record_longer_than_the_backbone_is_named(model, tokenizer):
    long = Example("9", "x" * 60, " yes", ("yes",), (" no", " yes"), "big.jsonl:9")
    says = r"^big.jsonl:9: prompt and answer may take 6\d tokens, more than the backbone's 64 positions"
    with pytest.raises(TaskError, match=says):
        predict.predict(model, tokenizer, CHOOSE, [*EXAMPLES, long])
    says = r"^big.jsonl:9: prompt and answer may take 73 tokens"
    with pytest.raises(TaskError, match=says):
        predict.predict(model, tokenizer, generating(), [*EXAMPLES, long])


def test_scores_that_are_no_numbers_choose_nothing(model, tokenizer):
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(FinetuneError, match=r"x:\d: the model's log-probabilities are not numbers"):
        predict.predict(model, tokenizer, CHOOSE, EXAMPLES)


def test_a_choice_without_a_token_is_named(model, tokenizer):
    empty = Example("9", "x", "a", ("a",), ("a", ""), "x:9")
    with pytest.raises(TaskError, match="x:9: the choice '' has no token"):
        predict.predict(model, tokenizer, CHOOSE, [empty])


def test_the_answers_tokens_are_those_in_its_place(stories260k):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(stories260k)
    prompt, answer = choices.encode_answer(tokenizer, "Once upon", " a time")
    assert prompt + answer == tokenizer("Once upon a time")["input_ids"]
    assert tokenizer.decode(prompt, skip_special_tokens=True) == "Once upon"
    # Here the prompt's last token changes when the answer follows, so the answer's own tokens are taken.
    before = tokenizer("Once u")["input_ids"]
    assert tokenizer("Once upon")["input_ids"][: len(before)] != before
    assert choices.encode_answer(tokenizer, "Once u", "pon") == (
        before, tokenizer("pon", add_special_tokens=False)["input_ids"]
    )  # fmt: skip


def test_cut():
    assert choices.cut("abcab", ("b", "ca")) == "a"
    assert choices.cut("abc", ()) == "abc"
    assert choices.cut("abc", ("z",)) == "abc"
    assert choices.cut("", ("z",)) == ""


def test_no_example_is_no_prediction(model, tokenizer):
    assert predict.predict(model, tokenizer, CHOOSE, []) == []
    assert predict.predict(model, tokenizer, generating(), []) == []

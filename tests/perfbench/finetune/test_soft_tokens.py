"""P-tuning, IDPG and LPT against the plainest way to run them: soft tokens among a row's other tokens, no padding, no
cache, and no masks but that of the past."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch.nn.functional import adaptive_avg_pool1d
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.errors import FinetuneError
from perfbench.finetune import predict, trained
from perfbench.finetune.baselines import soft_tokens
from perfbench.finetune.baselines.lpt import stretches
from perfbench.finetune.choices import Scored
from perfbench.finetune.encoding import answers_only
from perfbench.methods.shape import LLAMA_FAMILY
from tests.perfbench.finetune.models import examples, other_llama, train

OPTIONS: dict[str, dict[str, int]] = {
    "p-tuning": {"tokens": 5, "dim": 3},
    "idpg": {"bottleneck": 16},
    "lpt": {"bottleneck": 16},
}
NAMES = tuple(OPTIONS)
PROMPTS = ([7, 9, 11, 30, 41, 8, 22], [5, 6], [50, 13, 14, 3])
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def backbone(family: str = "llama") -> Any:
    """Four layers, with weights large enough that what a token sees shows in its logits."""
    config = other_llama().config.to_dict() | {"num_hidden_layers": 4, "initializer_range": 0.2}
    config = {name: config[name] for name in config if name not in ("model_type", "layer_types")}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **config | {"head_dim": 8})).eval()
    return model.requires_grad_(False)


def attached(name: str, base: Any) -> Any:
    """With soft tokens that are as large as they may become in training."""
    module = trained.attach(copy.deepcopy(base), name, OPTIONS[name], 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.soft_tokens.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return module.eval()


def soft_of(module: Any, base: Any, prompt: list[int]) -> torch.Tensor:
    """[1, tokens, hidden]: what the methods' papers say, for one prompt."""
    soft = module.soft_tokens
    if hasattr(soft, "projection"):
        return (soft.tokens @ soft.projection)[None]
    states = base.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
    if soft.at == 0:
        return soft.generator(states.last_hidden_state[:, -1]).reshape(1, 4, -1)
    pooled = adaptive_avg_pool1d(states.hidden_states[soft.at].transpose(1, 2), 4)
    return soft.generator(pooled.transpose(1, 2))


@torch.no_grad()
def plain(module: Any, base: Any, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """[S, V]: the logits of one row."""
    inner, soft = base.model, soft_of(module, base, prompt)
    hidden = inner.embed_tokens(torch.tensor([[*prompt, *answer]]))
    for index, layer in enumerate(inner.layers):
        if index == module.soft_tokens.at:
            hidden = torch.cat((soft, hidden), dim=1)
        places = torch.arange(hidden.shape[1])[None]
        embeddings = inner.rotary_emb(hidden, position_ids=places)
        hidden = layer(hidden, attention_mask=None, position_ids=places, position_embeddings=embeddings)
    return base.lm_head(inner.norm(hidden[:, soft.shape[1] :]))[0]


def left_padded(prompts: tuple[list[int], ...]) -> dict[str, torch.Tensor]:
    ids, mask = predict._pad_left(prompts, torch.device("cpu"))
    return {"input_ids": ids, "attention_mask": mask}


def generated(module: Any, prompts: tuple[list[int], ...], **settings: Any) -> Any:
    return module.generate(
        **left_padded(prompts), do_sample=False, max_new_tokens=6, eos_token_id=None, pad_token_id=0,
        return_dict_in_generate=True, output_logits=True, **settings,
    )  # fmt: skip


@torch.no_grad()
def off_the_plain_logits(module: Any, base: Any) -> float:
    """How far logits lie from the plain ones in a batch that is padded on the left: those of the last token in one
    forward, which counts positions with the padding, and all while texts are generated, where they are told."""
    found, last, worst = generated(module, PROMPTS), module(**left_padded(PROMPTS)).logits[:, -1], 0.0
    for row, prompt in enumerate(PROMPTS):
        answer = found.sequences[row, -6:].tolist()
        expected = plain(module, base, prompt, answer)[len(prompt) - 1 : -1]
        logits = torch.stack([last[row], *[step[row] for step in found.logits]])
        worst = max(worst, float((logits - torch.cat((expected[:1], expected))).abs().max()))
    return worst


@pytest.mark.parametrize("family", LLAMA_FAMILY)
@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_of_prompts_and_answers_gives_the_plain_logits(name: str, family: str) -> None:
    base = backbone(family)
    module, batch = attached(name, base), examples()
    with torch.no_grad():
        found = module(**batch).logits
    for row in range(3):
        ids = batch["input_ids"][row, : int(batch["attention_mask"][row].sum())].tolist()
        torch.testing.assert_close(found[row, : len(ids)], plain(module, base, ids[:-3], ids[-3:]), **CLOSE)
    assert float((found - base(batch["input_ids"], batch["attention_mask"]).logits).abs().max()) > 0.1


@pytest.mark.parametrize("family", LLAMA_FAMILY)
@pytest.mark.parametrize("name", NAMES)
def test_logits_and_texts_in_a_batch_padded_on_the_left_are_the_plain_ones(name: str, family: str) -> None:
    base = backbone(family)
    assert off_the_plain_logits(attached(name, base), base) < 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_a_sliding_window_does_not_slide_over_them(name: str) -> None:
    """With the cache, which forgets what is out of the window, as without it."""
    base = backbone("mistral")
    base.config.sliding_window = 4
    module = attached(name, base)
    found = generated(module, PROMPTS)
    for row, prompt in enumerate(PROMPTS):
        ids = torch.tensor([[*prompt, *found.sequences[row, -6:]]])
        labels = torch.where(torch.arange(ids.shape[1]) < len(prompt), -100, ids)
        with torch.no_grad():
            expected = module(ids, labels=labels, use_cache=False).logits[0, len(prompt) - 1 : -1]
        torch.testing.assert_close(torch.stack(found.logits)[:, row], expected, **CLOSE)


@pytest.mark.parametrize("name", NAMES)
def test_beams_in_a_padded_batch_equal_those_of_each_prompt_alone(name: str) -> None:
    module = attached(name, backbone())
    together = generated(module, PROMPTS, num_beams=3).sequences[:, -6:]
    alone = [generated(module, (prompt,), num_beams=3).sequences[0, -6:] for prompt in PROMPTS]
    assert torch.equal(together, torch.stack(alone))


@pytest.mark.parametrize("name", NAMES)
def test_the_soft_tokens_are_made_once_for_a_text(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, made = attached(name, backbone()), []
    make = module.soft_tokens.make
    monkeypatch.setattr(module.soft_tokens, "make", lambda *given: made.append(1) or make(*given))
    generated(module, PROMPTS)
    assert made == [1]


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_choices_score_what_a_plain_forward_gives_them(name: str) -> None:
    base = backbone()
    module = attached(name, base)
    rows = [Scored((7, 9, 11, 30), ((4, 5, 6),)), Scored((5, 6), ((7,), (8,))), Scored((5, 6), ((7, 7),))]
    for row, scores in zip(rows, predict._log_probabilities(module, rows), strict=True):
        for choice, score in zip(row.choices, scores, strict=True):
            logits = plain(module, base, [*row.prompt], [*choice])[len(row.prompt) - 1 : -1].log_softmax(dim=-1)
            assert score == pytest.approx(float(logits[range(len(choice)), choice].sum()), abs=1e-3)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_that_of_the_answers_alone(name: str) -> None:
    module, batch = attached(name, backbone()).requires_grad_(False), examples()
    assert float(module(**answers_only(batch)).loss) == pytest.approx(float(module(**batch).loss), rel=1e-5)


def moved_by_a_later_token(module: Any) -> float:
    """How far the logits of the answer's first token move when tokens after it are others."""
    batch = examples()
    other = {**batch, "input_ids": batch["input_ids"].clone()}
    for row in range(3):
        other["input_ids"][row, 6 - row + 1 : 6 - row + 3] = torch.tensor([61, 62])
    with torch.no_grad():
        both = [module(**one).logits[torch.arange(3), torch.tensor([5, 4, 3])] for one in (batch, other)]
    return float((both[0] - both[1]).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_does_not_reach_what_is_made_of_the_prompt(name: str) -> None:
    assert moved_by_a_later_token(attached(name, backbone())) < 1e-5


# Planted faults: what the tests above measure must be seen.


@pytest.mark.parametrize("name", ["idpg", "lpt"])
def test_a_generator_that_looks_at_the_answer_is_seen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = soft_tokens.last_prompt_token
    monkeypatch.setattr(soft_tokens, "last_prompt_token", lambda ids, labels, mask: right(ids, None, mask))
    assert moved_by_a_later_token(attached(name, backbone())) > 0.01


FAULTS: dict[str, Any] = {
    "soft tokens before the padding": lambda patch: patch.setattr(
        torch.Tensor, "gather", lambda tensor, dim, index: _GATHER(tensor, dim, torch.zeros_like(index))
    ),
    "other tokens hidden from them": lambda patch: patch.setattr(
        soft_tokens, "_seen", lambda *given: _without_the_last(_SEEN(*given))
    ),
    "zeros in the cache": lambda patch: patch.setattr(
        soft_tokens, "_Behind", lambda pair, cache: _BEHIND(_zeros_later(pair, cache), cache)
    ),
}
_GATHER, _SEEN, _BEHIND = torch.Tensor.gather, soft_tokens._seen, soft_tokens._Behind


def _without_the_last(mask: torch.Tensor | None) -> torch.Tensor | None:
    """No token sees the first soft one."""
    if mask is not None:
        mask[..., 0] = False
    return mask


def _zeros_later(pair: Any, cache: Any) -> Any:
    """Nothing is left of the soft tokens once a token is generated."""
    return tuple(torch.zeros_like(one) for one in pair) if cache.get_seq_length(3) else pair


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", NAMES)
def test_a_fault_in_what_tokens_see_is_seen(name: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    base = backbone()
    module = attached(name, base)
    FAULTS[fault](monkeypatch)
    assert off_the_plain_logits(module, base) > 0.01


# What they can't do


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_filled_without_them_is_refused(name: str) -> None:
    base = backbone()
    module, ids = attached(name, base), torch.tensor([PROMPTS[0]])
    cache = base(ids, use_cache=True).past_key_values
    with pytest.raises(RuntimeError, match="the cache was filled without them"):
        module(ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_fixed_size_is_refused(name: str) -> None:
    """For it `generate` hands over masks that no longer say where prompts end."""
    with pytest.raises(ValueError, match=r"the prompt's end: expected an attention mask \[B, S\], got \[3, 1, 7, 12\]"):
        generated(attached(name, backbone()), PROMPTS, cache_implementation="static", disable_compile=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_part_of_the_model_and_checkpointing_are_refused(name: str) -> None:
    module = attached(name, backbone())
    with pytest.raises(RuntimeError, match="call the whole model"):
        module.model(torch.tensor([PROMPTS[0]]))
    module.train().gradient_checkpointing_enable()
    with pytest.raises(RuntimeError, match="train without checkpointing"):
        module(**examples())


@pytest.mark.parametrize("name", NAMES)
def test_another_attention_is_refused(name: str) -> None:
    base = backbone()
    base.set_attn_implementation("eager")
    with pytest.raises(FinetuneError, match=f"method.{name}: attn_implementation: expected sdpa, got eager"):
        trained.attach(base, name, None, 0)


@pytest.mark.parametrize("layer", [4, 9])
def test_a_layer_that_the_backbone_has_not_is_refused(layer: int) -> None:
    with pytest.raises(FinetuneError, match=f"method.lpt: layer: expected from 1 to 3, got {layer}"):
        trained.attach(backbone(), "lpt", {"layer": layer}, 0)
    assert trained.attach(backbone(), "lpt", {"layer": 3}, 0).soft_tokens.at == 3


@pytest.mark.parametrize("name", NAMES)
def test_they_learn_in_a_bf16_model_and_stay_fp32(name: str) -> None:
    module = trained.attach(backbone().to(torch.bfloat16), name, OPTIONS[name], 0)
    losses = train(module, examples(), steps=8, learning_rate=2e-2)
    assert losses[-1] < losses[0]
    assert {parameter.dtype for parameter in module.soft_tokens.parameters()} == {torch.float32}


@pytest.mark.parametrize("tokens", range(1, 12))
def test_stretches_are_those_of_adaptive_pooling(tokens: int) -> None:
    states = torch.randn(1, tokens, 3, generator=torch.Generator().manual_seed(0))
    inside = torch.tensor([[False] * 2 + [True] * tokens + [False] * 3])
    padded = torch.nn.functional.pad(states, (0, 0, 2, 3), value=9.0)
    expected = adaptive_avg_pool1d(states.transpose(1, 2), 4).transpose(1, 2)
    torch.testing.assert_close(stretches(inside, 4) @ padded, expected)


def test_a_folder_of_peft_s_own_p_tuning_is_still_read(tmp_path: Path) -> None:
    base, batch = backbone(), examples()
    config = peft.PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=3)
    theirs = peft.get_peft_model(copy.deepcopy(base), config).eval()
    trained.save(theirs, tmp_path)
    ask = partial(dict, input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    with torch.no_grad():
        found = trained.load(copy.deepcopy(base), tmp_path).eval()(**ask()).logits
        torch.testing.assert_close(found, theirs(**ask()).logits)

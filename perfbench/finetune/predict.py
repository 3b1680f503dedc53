"""Predictions of a task's examples as trained: by a model of transformers or PEFT, with its tokenizer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from peft.utils.peft_types import PeftType
from transformers import GenerationConfig
from transformers.generation import StoppingCriteria, StoppingCriteriaList

from perfbench.errors import FinetuneError
from perfbench.finetune.choices import (
    Scored,
    check_length,
    choose,
    cut,
    decode,
    encode_choices,
    read_together,
    scores_of,
)
from perfbench.finetune.encoding import IGNORED, answers_only
from perfbench.finetune.tasks.task import Example, Task
from perfbench.finetune.trained import is_soft

# Stands in padding, whatever the vocabulary has there: it is masked.
PAD = 0


def predict(
    model: Any, tokenizer: Any, task: Task, examples: Sequence[Example], *, batch: int = 8, beams: int = 1
) -> list[str]:
    """The prediction of each example: the choice that wins, or the text generated, as task.kind says.

    batch: rows of one call (examples, or choices of examples); beams: of generation, 1 is greedy. TaskError, with the
    record, for one that is longer than the backbone.
    """
    if task.kind == "choose":
        scores = choice_scores(model, tokenizer, examples, batch=batch)
        return [ex.choices[choose(row)] for ex, row in zip(examples, scores, strict=True)]
    return generate(
        model,
        tokenizer,
        [example.prompt for example in examples],
        new_tokens=task.new_tokens,
        stop=task.stop,
        batch=batch,
        beams=beams,
        where=[example.where for example in examples],
    )


@torch.inference_mode()
def choice_scores(model: Any, tokenizer: Any, examples: Sequence[Example], *, batch: int = 8) -> list[list[float]]:
    """For each example, each choice's sum of log-probabilities (fp32) of its tokens after the prompt.

    FinetuneError, with the record, where one is NaN.
    """
    rows = []
    for index, example in enumerate(examples):
        for scored in read_together(encode_choices(tokenizer, example)):
            check_length(example.where, scored.length, _positions(model))
            rows.append((index, scored))
    found: dict[int, list[float]] = {}
    with _evaluating(model):
        for places in _batches([scored.length for _, scored in rows], batch):
            values = _log_probabilities(model, [rows[place][1] for place in places])
            found |= dict(zip(places, values, strict=True))
    scores: list[list[float]] = [[] for _ in examples]
    for place, (index, _) in enumerate(rows):
        if any(map(math.isnan, found[place])):  # which of the choices would win then is chance
            where = examples[index].where
            raise FinetuneError(f"{where}: the model's log-probabilities are not numbers; use dtype fp32")
        scores[index] += found[place]
    return scores


@torch.inference_mode()
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    stop: Sequence[str] = (),
    batch: int = 8,
    beams: int = 1,
    where: Sequence[str] = (),
) -> list[str]:
    """The text that follows each prompt: at most `new_tokens`, up to the end-of-sequence token and the stop strings.

    No sampling and no penalty, whatever the checkpoint's own generation settings say. where: of each prompt, for
    messages. PEFT's soft prompts are asked one at a time, whatever `batch` says.
    """
    where = where or [f"prompt {number}" for number in range(1, len(prompts) + 1)]
    encoded = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    for tokens, at in zip(encoded, where, strict=True):
        check_length(at, len(tokens) + new_tokens, _positions(model))
    settings = GenerationConfig(
        do_sample=False,
        num_beams=beams,
        max_new_tokens=new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=PAD,
        repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        early_stopping=False,
    )
    texts = [""] * len(prompts)
    # PEFT puts soft prompts before the padding, where the model was not trained to find them.
    batch = 1 if is_soft(model) else batch
    with _evaluating(model), warnings.catch_warnings():
        # Without padding the positions that PEFT ignores are those that the model counts itself.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        for places in _batches([len(tokens) for tokens in encoded], batch):
            ids, mask = _pad_left([encoded[place] for place in places], model.device)
            # With beams a row changes its hypothesis, so there the text is cut afterwards alone.
            stops = [_StopStrings(tokenizer, ids.shape[1], stop)] if stop and beams == 1 else []
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=settings,
                stopping_criteria=StoppingCriteriaList(stops),
            )
            for place, tokens in zip(places, out[:, ids.shape[1] :].tolist(), strict=True):
                texts[place] = decode(tokenizer, tokens, stop)
    return texts


class _StopStrings(StoppingCriteria):
    """Ends a row once its new text has a stop string. transformers' own would find one that ends in the prompt too."""

    def __init__(self, tokenizer: Any, prompt_tokens: int, stop: Sequence[str]):
        self._tokenizer, self._prompt_tokens, self._stop = tokenizer, prompt_tokens, tuple(stop)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        texts = [decode(self._tokenizer, row, ()) for row in input_ids[:, self._prompt_tokens :].tolist()]
        return torch.tensor([cut(text, self._stop) != text for text in texts], device=input_ids.device)


def _log_probabilities(model: Any, rows: Sequence[Scored]) -> list[list[float]]:
    """What each of a row's choices scores. One call, padded on the right: a token's position stays as it is alone."""
    longest = max(row.length for row in rows)
    ids = torch.full((len(rows), longest), PAD)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, IGNORED)
    for place, row in enumerate(rows):
        ids[place, : row.length] = torch.tensor([*row.prompt, *row.choices[0]])
        mask[place, : row.length] = 1
        labels[place, len(row.prompt) : row.length] = torch.tensor(row.choices[0])
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    inputs = {name: tensor.to(model.device) for name, tensor in inputs.items()}
    # The logits of a token are those of the place before it.
    counted = inputs["labels"][:, 1:] != IGNORED
    if not is_soft(model):
        inputs = answers_only(inputs)
        counted = inputs["shift_labels"] != IGNORED
    # The labels tell PARA where each prompt ends. AdaLoRA would add its orthogonality term to the loss that they give,
    # which PEFT can't do for an adapter that is not trained.
    if _is(model, PeftType.ADALORA):
        inputs = {name: tensor for name, tensor in inputs.items() if "labels" not in name}
    logits = model(**inputs, use_cache=False).logits
    if is_soft(model):  # its own logits stand in front
        logits = logits[:, -longest:][:, :-1]
    chosen = logits[counted].float().log_softmax(dim=-1)
    lengths = counted.sum(dim=1).tolist()
    return [scores_of(row.choices, part) for row, part in zip(rows, chosen.split(lengths), strict=True)]


def _is(model: Any, kind: PeftType) -> bool:
    """Whether PEFT's active adapter on the model is of this type."""
    return isinstance(model, PeftModel) and model.active_peft_config.peft_type == kind


def _pad_left(rows: Sequence[list[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[PAD] * (longest - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _batches(lengths: Sequence[int], size: int) -> Iterator[list[int]]:
    """Places in batches of like length, the longest first, so that a batch that needs too much memory fails early."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    return (order[start : start + size] for start in range(0, len(order), size))


def _positions(model: Any) -> int | None:
    return getattr(model.config, "max_position_embeddings", None)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    """Without dropout, and as it was afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

"""Shared by tests of fine-tuning: a tiny random Llama with a tokenizer of single bytes, and a made-up set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BEGIN, END = "<s>", "</s>"


def byte_tokenizer() -> Any:
    """One token for each byte, `<s>` before a text; no token for padding, as many a checkpoint has none."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({word: index for index, word in enumerate((BEGIN, END, *letters))}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token=BEGIN, eos_token=END)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a random Llama of two layers with a tokenizer of bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=258,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=2048,
                bos_token_id=0,
                eos_token_id=1,
            )
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def write_own(folder: Path, counts: dict[str, int], start: int = 0) -> Path:
    """A set of one's own in `folder`: sums of one digit, no prompt twice."""
    folder.mkdir(parents=True, exist_ok=True)
    number = start
    for split, count in counts.items():
        lines = []
        for _ in range(count):
            lines.append({"prompt": f"{number // 10}+{number % 10}=", "answer": str(number // 10 + number % 10)})
            number += 1
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up set: 48 of train, 8 of dev, 6 of test."""
    return write_own(tmp_path_factory.mktemp("sums"), {"train": 48, "dev": 8, "test": 6})

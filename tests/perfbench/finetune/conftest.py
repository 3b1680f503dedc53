"""Shared by tests of fine-tuning: a tiny random Llama with a tokenizer of single bytes, and a made-up set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.perfbench.finetune.made_up import byte_tokenizer, write_own


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
                initializer_range=0.2,  # with the usual 0.02 the logits of so small a model could hardly move
            )
        )
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def sums(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a made-up set: 48 of train, 8 of dev, 6 of test."""
    return write_own(tmp_path_factory.mktemp("sums"), {"train": 48, "dev": 8, "test": 6})

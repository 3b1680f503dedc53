"""Shared by tests of the search: tiny models with a random LoRA on every linear, and the same LoRA in PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.finetune.encoding import IGNORED
from perfbench.finetune.search.evaluate import Batch
from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions
from perfbench.runtimes import backbone
from perfbench.runtimes.backbone import Backbone
from perfbench.spec.backbone_config import shape_of

TINY = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
# model_type -> what the family has that Llama has not: a window shorter than the rows, head_dim of its own.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 4},
    "qwen2": {},
    "gemma": {"head_dim": 8},
}


@contextmanager
def one_thread() -> Iterator[None]:
    """Sums are split alike in every process, and tiny ones are faster."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def write_model(folder: Path, family: str = "llama", seed: int = 0, **more: int) -> Path:
    """A random model whose weights are large enough for every module to matter."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(family, **{**TINY, **FAMILIES[family], **more}, initializer_range=0.3)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def write_adapter(folder: Path, model: Path, seed: int = 0, scale: float = 0.5, rank: int = 3) -> Path:
    """A random LoRA on every linear as a PEFT checkpoint; its alpha is not its rank."""
    shape, options = shape_of(str(model)), LoraOptions(rank=rank, alpha=2.0 * rank)
    generator, parameters = torch.Generator().manual_seed(seed), {}
    for name, size in lora.shapes(shape, options).items():
        parameters[name] = torch.empty(size)
        lora.randomise(name, parameters[name], generator)
        parameters[name] *= scale
    lora.save(parameters, shape, options, folder, str(model))
    return folder


def load_bare(model: Path, dtype: torch.dtype = torch.float64) -> Backbone:
    bare = backbone.load(str(model), "fp32", "cpu", seed=0)
    bare.model.to(dtype)
    bare.dtype = dtype
    return bare


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """family -> (model folder, adapter folder), each made once."""
    known: dict[str, tuple[Path, Path]] = {}

    def make(family: str = "llama") -> tuple[Path, Path]:
        if family not in known:
            folder = tmp_path_factory.mktemp(family)
            model = write_model(folder / "model", family)
            known[family] = model, write_adapter(folder / "adapter", model)
        return known[family]

    return make


@pytest.fixture(scope="session")
def batch() -> Batch:
    """Three rows of 7, 9 and 11 tokens, padded on the right; answers of 2, 5 and 4 tokens."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(1, TINY["vocab_size"], (3, 11), generator=generator)
    labels = ids.clone()
    for row, (answer, length) in enumerate(((2, 7), (5, 9), (4, 11))):
        labels[row, : length - answer] = IGNORED
        labels[row, length:] = IGNORED
    return Batch(ids, labels)

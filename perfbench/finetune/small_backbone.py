"""A small Llama that is trained here from scratch on the language of `tasks/skills.py`, and kept in a cache folder.

It stands in for a large pre-trained model where none can be had: it knows some skills well, and an adapter has to
bring out the right one.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from perfbench.finetune.tasks import skills

BEGIN, END, PAD, UNKNOWN = "<s>", "</s>", "<pad>", "<unk>"


@dataclass(frozen=True)
class SmallBackbone:
    """A shape, and how it is trained: `steps` of `batch` sequences with `queries` skills asked for in each."""

    layers: int = 4
    hidden: int = 96
    intermediate: int = 256
    heads: int = 3
    context: int = 64
    steps: int = 500
    batch: int = 64
    queries: int = 6
    learning_rate: float = 3e-3
    warmup_share: float = 0.1
    seed: int = 0


SMALL_BACKBONES: dict[str, SmallBackbone] = {"small-llama": SmallBackbone()}


def resolve(name: str, console: Console | None = None) -> str:
    """What transformers can load: the folder of a small backbone, trained where it is not there yet, else `name`."""
    return str(ensure(name, console)) if name in SMALL_BACKBONES else name


def ensure(name: str, console: Console | None = None) -> Path:
    """The folder of the small backbone `name`, with weights and tokenizer; trained on first use, a minute or two."""
    recipe = SMALL_BACKBONES[name]
    folder = cache_folder() / f"{name}-{_fingerprint(recipe)}"
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=folder.parent))
    try:
        model = train(recipe, console or Console(stderr=True), f"training {name}, once")
        model.save_pretrained(fresh)
        make_tokenizer().save_pretrained(fresh)
        fresh.chmod(0o755)
        if not folder.exists():  # another process may have been quicker; then its folder is as good
            fresh.rename(folder)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return folder


def cache_folder() -> Path:
    """`perfbench` in XDG_CACHE_HOME, by default in ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "perfbench"


def make_tokenizer() -> Any:
    """One token for each word of the language; `<s>` before a text."""
    words = (BEGIN, END, PAD, UNKNOWN, *skills.LETTERS, *skills.SKILLS, skills.ASK)
    inner = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=UNKNOWN))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single=f"{BEGIN} $A", special_tokens=[(BEGIN, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=BEGIN, eos_token=END, pad_token=PAD, unk_token=UNKNOWN
    )


def train(recipe: SmallBackbone, console: Console, title: str) -> Any:
    """The model after its training on the CPU; the same on every call on one machine."""
    tokenizer = make_tokenizer()
    source = random.Random(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        model = LlamaForCausalLM(_config(recipe, tokenizer))
        optimizer = torch.optim.AdamW(model.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, recipe.learning_rate, total_steps=recipe.steps, pct_start=recipe.warmup_share
        )
        model.train()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            if not console.is_terminal:
                console.print(title)
            for _ in bar.track(range(recipe.steps), description=title):
                ids, labels = batch_of(recipe, tokenizer, source)
                logits = model(ids, use_cache=False).logits[:, :-1]
                loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
                loss.backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
    return model.eval()


def batch_of(recipe: SmallBackbone, tokenizer: Any, source: random.Random) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, labels) [B, S]: letters, then skills, each with its answer and an end; loss on answers and ends."""
    names = list(skills.SKILLS)
    known = tokenizer.get_vocab()
    ids, labels = [], []
    for _ in range(recipe.batch):
        letters = skills.draw(source)
        row = [BEGIN, *letters]
        wanted: list[str | None] = [None] * len(row)
        for _ in range(recipe.queries):
            name = source.choice((*names, skills.ASK))
            answer = source.choice(letters) if name == skills.ASK else skills.SKILLS[name](letters)
            row += [name, answer, END]
            wanted += [None, answer, END]
        ids.append([known[word] for word in row])
        labels.append([-100 if word is None else known[word] for word in wanted])
    return torch.tensor(ids), torch.tensor(labels)


def _config(recipe: SmallBackbone, tokenizer: Any) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=recipe.context,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )


def _fingerprint(recipe: SmallBackbone) -> str:
    """Of all that decides what the model learns: another recipe, or another language, is another folder."""
    language = [skills.LETTERS, skills.LENGTH, skills.ASK, list(skills.SKILLS)]
    text = json.dumps([asdict(recipe), language], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]

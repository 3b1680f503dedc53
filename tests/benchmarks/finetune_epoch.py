"""How much longer an epoch takes through `perfbench finetune` than the same PEFT training through a bare Trainer.

    python -m tests.benchmarks.finetune_epoch --rounds 6

Both train LoRA on the same examples in the same order, judge the dev set and write a checkpoint at the epoch's end; all
that each does counts, from loading the weights to the adapter on disk. The two take turns, in an order that changes
from round to round; printed are the median ratio of a round and its interval. Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path

import peft
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from perfbench.figures.stats import median_interval
from perfbench.finetune import recipe
from perfbench.finetune.encoding import Collator, encode_split
from perfbench.finetune.finetune_config import FinetuneConfig, TaskSource
from perfbench.finetune.small_backbone import make_tokenizer
from perfbench.finetune.tasks import skills
from perfbench.finetune.tasks.registry import find, load_splits
from perfbench.machine.device import device_kind
from perfbench.runtimes import backbone

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def make_backbone(folder: Path, hidden: int, layers: int) -> Path:
    """A random Llama with the tokenizer of skills: what it says does not matter for the time."""
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=hidden, intermediate_size=4 * hidden, num_hidden_layers=layers,
            num_attention_heads=8, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
        )
    ).save_pretrained(folder)  # fmt: skip
    tokenizer.save_pretrained(folder)
    return folder


def make_data(folder: Path, examples: int) -> Path:
    """Prompts of some fifty words, so that a step has something to do."""
    source = random.Random(0)
    for split, count in (("train", examples), ("dev", examples // 16), ("test", 1)):
        rows = [[source.choice(skills.LETTERS) for _ in range(50)] for _ in range(count)]
        lines = [json.dumps({"prompt": " ".join(row), "answer": f" {row[0]}"}) for row in rows]
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def ours(config: FinetuneConfig, out: Path) -> None:
    """One epoch through us."""
    recipe.finetune(config, out, console=Console(quiet=True))


def bare(config: FinetuneConfig, out: Path) -> None:
    """The same by transformers and PEFT alone."""
    kind, _ = device_kind(config.device)
    tokenizer = backbone.tokenizer_of(config.backbone)
    splits = load_splits(find(config.task.name), config.task.source, ("train", "dev"))
    train, dev = (
        encode_split(splits[name], tokenizer, end=True, max_tokens=config.max_tokens)[0] for name in ("train", "dev")
    )
    model = backbone.load(config.backbone, config.dtype, kind, 0).model
    lora = peft.LoraConfig(r=4, lora_alpha=4, target_modules=LINEARS, task_type="CAUSAL_LM")
    Trainer(
        model=peft.get_peft_model(model, lora),
        args=TrainingArguments(
            output_dir=str(out), num_train_epochs=1, learning_rate=1e-4, warmup_steps=0.06, report_to="none",
            per_device_train_batch_size=config.batch, per_device_eval_batch_size=config.batch, eval_strategy="epoch",
            save_strategy="epoch", logging_steps=10, disable_tqdm=True, remove_unused_columns=False,
            label_names=["labels"], use_cpu=kind == "cpu", dataloader_pin_memory=kind == "cuda",
        ),
        train_dataset=train,
        eval_dataset=dev,
        data_collator=Collator(0),
    ).train()  # fmt: skip


def main() -> None:
    """Prints each round's two times, then the median ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--examples", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    asked = parser.parse_args()
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for name in ("backbone", "data"):
            (place / name).mkdir()
        config = FinetuneConfig(
            backbone=str(make_backbone(place / "backbone", asked.hidden, asked.layers)),
            method="lora",
            task=TaskSource("own", str(make_data(place / "data", asked.examples)), test_examples=0),
            seeds=(0,),
            max_tokens=64,
            epochs=1,
        )
        order = random.Random(0)
        for number in range(-1, asked.rounds):  # the first round warms up
            seconds = {}
            for function in order.sample((ours, bare), 2):
                started = time.perf_counter()
                function(config, place / f"{function.__name__}{number}")
                seconds[function.__name__] = time.perf_counter() - started
            if number >= 0:
                ratios.append(seconds["ours"] / seconds["bare"])
                print(f"round {number}: {seconds['ours']:.2f} s / {seconds['bare']:.2f} s = {ratios[-1]:.3f}")
    found = median_interval(ratios)
    print(f"ours / bare Trainer: {found['ratio']:.3f} [{found['low']:.3f}, {found['high']:.3f}], {asked.rounds} rounds")


if __name__ == "__main__":
    main()

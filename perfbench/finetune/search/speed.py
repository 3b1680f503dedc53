"""How much faster than the naive evaluation is the shared one? Both in turns, on random weights and tokens.

    python -m perfbench.finetune.search.speed                                  # 768 x 12, 32k words, fp32
    python -m perfbench.finetune.search.speed --answer-tokens 8 --rounds 9     # almost without the head

Prints the bound that the FLOPs allow, the measured ratio and its share of the bound, and whether the scores agree.
Exit code 0, or 1 where they don't, or 2 for bad input. Wants a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.errors import PerfbenchError
from perfbench.figures.stats import median_interval
from perfbench.finetune.encoding import IGNORED
from perfbench.finetune.search.compare import AGREEMENT, bound_of, difference
from perfbench.finetune.search.evaluate import Ablations, Batch, ablations, naive_ablations
from perfbench.finetune.search.gates import GatedModel
from perfbench.finetune.search.scores import SCORES, ab_line, spearman
from perfbench.methods import lora
from perfbench.methods.lora import LoraOptions
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.backbone import DTYPES, Backbone
from perfbench.spec.backbone_config import find_config


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; see the module's text."""
    options = _options(arguments)
    try:
        return measure(options)
    except PerfbenchError as error:
        print(f"speed: {error}", file=sys.stderr)
        return 2


def measure(options: argparse.Namespace) -> int:
    """Warms up, takes the turns, prints; the exit code."""
    model = random_model(options.backbone, options.vocab, options.dtype, options.device, options.rank)
    answers = min(options.answer_tokens or options.tokens - 1, options.tokens - 1)
    batch = random_batch(model, options.rows, options.tokens, answers)
    bound = bound_of(model, options.rank, batch)
    shape = model.shape
    print(
        f"{options.backbone}: {shape.hidden} x {shape.layers}, {shape.vocab} words, {options.dtype}, LoRA rank "
        f"{options.rank}; {options.rows} rows of {options.tokens} tokens, {answers} of them answers; at most "
        f"{options.tokens_per_forward} tokens side by side; {torch.get_num_threads()} threads"
    )
    arms: dict[str, Callable[[], Ablations]] = {
        "naive": lambda: naive_ablations(model, batch),
        "shared": lambda: ablations(model, batch, options.tokens_per_forward),
    }
    found = {name: arm() for name, arm in arms.items()}
    apart = difference(found["naive"], found["shared"], batch)
    agree = report_scores(found, batch, apart, AGREEMENT[model.dtype])
    ratios = []
    for turn in range(options.rounds):
        seconds = {}
        for name in sorted(arms, reverse=bool(turn % 2)):
            start = time.perf_counter()
            arms[name]()
            seconds[name] = time.perf_counter() - start
        ratios.append(seconds["naive"] / seconds["shared"])
        print(f"round {turn}: naive {seconds['naive']:.2f} s, shared {seconds['shared']:.2f} s, ratio {ratios[-1]:.3f}")
    middle = median_interval(ratios)
    ratio, low, high = middle["ratio"], middle["low"], middle["high"]
    assert ratio is not None
    print(f"speed-up: median {ratio:.3f}; FLOPs allow {bound:.3f}; share of the bound {ratio / bound:.1%}")
    if low is not None and high is not None:
        print(f"95% interval: [{low:.3f}, {high:.3f}], {low / bound:.1%} to {high / bound:.1%} of the bound")
    return 0 if agree else 1


def report_scores(found: dict[str, Ablations], batch: Batch, apart: float, allowed: float) -> bool:
    """Prints how far the losses and AB-scores of the two lie apart; whether that is near enough."""
    one, other = (SCORES["ab"].combine([ab_line(losses, batch)]).flat() for losses in found.values())
    scores_apart = max(abs(a - b) for a, b in zip(one, other, strict=True))
    rho = spearman(one, other)
    verdict = "agree" if apart <= allowed else "DO NOT AGREE"
    print(
        f"losses {verdict}: at most {apart:.2g} nats per token apart (allowed {allowed:g}); AB-scores at most "
        f"{scores_apart:.2g} apart where the largest is {max(map(abs, one)):.2g}; Spearman "
        + ("undefined" if rho is None else f"{rho:.6f}")
    )
    return apart <= allowed


def random_model(backbone: str, vocab: int | None, dtype: str, device: str, rank: int) -> GatedModel:
    """A backbone of this shape with random weights, and a random LoRA on every linear."""
    config = find_config(backbone) | ({} if vocab is None else {"vocab_size": vocab})
    fields = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(0)
    with torch.device(device):
        made = AutoConfig.for_model(config["model_type"], **fields)
        model = AutoModelForCausalLM.from_config(made, dtype=DTYPES[dtype], attn_implementation="sdpa")
    model.eval().requires_grad_(False)
    shape, options = BackboneShape.of_config(config), LoraOptions(rank=rank)
    generator, parameters = torch.Generator().manual_seed(1), {}
    for name, size in lora.shapes(shape, options).items():
        parameters[name] = torch.empty(size)
        lora.randomise(name, parameters[name], generator)
    bare = Backbone(backbone, shape, model, DTYPES[dtype], torch.device(device))
    return GatedModel(bare, lora.plan(parameters, shape, options))


def random_batch(model: GatedModel, rows: int, tokens: int, answers: int) -> Batch:
    """Random tokens, the last `answers` of each row with labels."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, model.shape.vocab, (rows, tokens), generator=generator).to(model.device)
    labels = ids.clone()
    labels[:, : tokens - answers] = IGNORED
    return Batch(ids, labels)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m perfbench.finetune.search.speed", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--backbone", default="llama-110m", help="a named shape (default: llama-110m, 768 x 12)")
    parser.add_argument("--vocab", type=int, default=32000, help="words of the vocabulary (default: 32000)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rank", type=int, default=12)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--answer-tokens", type=int, help="the last of each row (default: all but the first)")
    parser.add_argument("--tokens-per-forward", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

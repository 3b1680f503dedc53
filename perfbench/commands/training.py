"""The commands that train, and judge what was trained."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from perfbench import exit_codes
from perfbench.commands.arguments import add_out, add_plugin, add_set, interrupted, out_of, positive
from perfbench.errors import PerfbenchError
from perfbench.files.paths import stamped
from perfbench.methods.dtypes import DTYPES


def add(commands: Any) -> None:
    """Adds them to the command line."""
    finetune = commands.add_parser("finetune", help="train a method on a task", description=_finetune.__doc__)
    finetune.add_argument(
        "config", type=Path, help="a YAML file, or a name that `perfbench list` has: finetune/boolq_para"
    )
    add_set(finetune)
    add_plugin(finetune)
    add_out(finetune, "runs/finetune-<name>-<time>")
    finetune.set_defaults(command=_finetune)

    fanlora = commands.add_parser("fanlora", help="FanLoRA: which modules a layer keeps", description=_search.__doc__)
    search = fanlora.add_subparsers(metavar="COMMAND", required=True).add_parser(
        "search", help="choose a setting by the scores of LoRA modules", description=_search.__doc__
    )
    search.add_argument(
        "config", type=Path, help="a YAML file, or a name that `perfbench list` has: fanlora/skills_cpu"
    )
    add_set(search)
    add_out(search, "runs/<name>-search-<time>")
    search.set_defaults(command=_search)

    accuracy = commands.add_parser("accuracy", help="does accuracy hold, as served?", description=_accuracy.__doc__)
    accuracy.add_argument("config", type=Path, help="a YAML file, or a name that `perfbench list` has: accuracy/cpu")
    add_set(accuracy)
    add_plugin(accuracy)
    add_out(accuracy, "runs/accuracy-<name>-<time>")
    accuracy.add_argument("--run", type=Path, metavar="RUN", help="a run directory with these methods' speeds")
    accuracy.set_defaults(command=_accuracy)

    evaluate = commands.add_parser("evaluate", help="an adapter on a task", description=_evaluate.__doc__)
    evaluate.add_argument("backbone", help="a folder or hub id with weights and tokenizer, or small-llama")
    evaluate.add_argument("--task", required=True, metavar="NAME", help="such as mmlu; `perfbench list task` has all")
    evaluate.add_argument("--source", default="", metavar="DIR", help="the task's data, a folder or hub id")
    about = "an adapter folder, perfbench's or PEFT's; may be repeated"
    evaluate.add_argument("--adapter", action="append", default=[], metavar="DIR", help=about)
    evaluate.add_argument("--split", choices=("dev", "test"), default="test")
    evaluate.add_argument("--metric", metavar="NAME", help="of task `own`")
    evaluate.add_argument("--examples", type=positive, metavar="N", help="at most (default: all)")
    evaluate.add_argument("--beams", type=positive, default=1, metavar="N", help="of generation (default: 1)")
    evaluate.add_argument("--batch", type=positive, default=8, metavar="N", help="rows of one call (default: 8)")
    about = "then the adapters are served as well, all of them mixed in each batch"
    evaluate.add_argument("--served", choices=("static", "transformers"), default="", help=about)
    evaluate.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    evaluate.add_argument("--out", type=Path, metavar="DIR", help="default: runs/evaluate-<task>-<time>")
    evaluate.set_defaults(command=_evaluate)

    about = "Makes a backbone of what others have packed."
    backbone = commands.add_parser("backbone", help="a backbone from a GGUF file", description=about)
    from_file = backbone.add_subparsers(metavar="STEP", required=True).add_parser(
        "import", help="a folder of safetensors from a GGUF file", description=_import_backbone.__doc__
    )
    from_file.add_argument("file", type=Path, help="a GGUF file of a Llama-family model")
    from_file.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder, for `backbone: DIR`")
    from_file.add_argument("--dtype", choices=tuple(DTYPES), default="bf16", help="of the weights (default: bf16)")
    from_file.set_defaults(command=_import_backbone)

    about = "Writes a model's answers to MT-Bench, and has a judge rate them."
    mtbench = commands.add_parser("mtbench", help="MT-Bench's answers and ratings", description=about)
    _add_mtbench_options(mtbench)


def _finetune(arguments: argparse.Namespace) -> int:
    """Trains one method on one task with every seed and prints the test metric's median and spread. Goes on after a
    kill with --resume; several GPUs through torchrun or accelerate launch. Exit codes: 0, or 2 for bad input and for a
    loss that is not finite."""
    import os
    from contextlib import nullcontext

    from perfbench import api
    from perfbench.files import run_lock
    from perfbench.finetune import finetune_config, recipe
    from perfbench.finetune.finetune_folder import FinetuneFolder
    from perfbench.finetune.summary import render

    if not arguments.out and int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise PerfbenchError("--out: say where all processes write")
    resolved = finetune_config.load(api.located(arguments.config), arguments.set)
    out = out_of(arguments, stamped(f"finetune-{resolved.name}"), "run directory")
    is_main = int(os.environ.get("RANK", 0)) == 0  # of several processes that one writes
    try:
        with run_lock.held(out, resume=arguments.resume) if is_main else nullcontext():
            recipe.finetune(resolved, out, resume=arguments.resume)
    except KeyboardInterrupt:
        return interrupted(["finetune", arguments.config], arguments, out)
    if is_main:
        render(FinetuneFolder.open(out).manifest)
        print(f"results: {out}", file=sys.stderr)
    return 0


def _search(arguments: argparse.Namespace) -> int:
    """Trains LoRA on every linear of every layer, scores each module on the examples held out, and writes the setting
    that keeps the best of each layer: a file for `methods: fanlora: {setting: FILE}`. Exit code 0, or 2 for bad
    input."""
    from perfbench import api
    from perfbench.finetune.search import search_config

    chosen = search_config.load(api.located(arguments.config), arguments.set)
    out = out_of(arguments, stamped(f"{chosen.training.name}-search"), "search")
    try:
        api.search(chosen, out=out, resume=arguments.resume)
    except KeyboardInterrupt:
        return interrupted(["fanlora", "search", arguments.config], arguments, out)
    return 0


def _accuracy(arguments: argparse.Namespace) -> int:
    """Trains each method on each task, asks every test item as trained and as served, and judges each method against a
    reference, and what is served against what was trained. Exit codes: 0 pass, 1 a method is inferior or is not served
    as it was trained, 2 invalid input, 3 inconclusive."""
    from perfbench import api
    from perfbench.finetune.accuracy import accuracy_config, verdict_table
    from perfbench.finetune.accuracy.accuracy_folder import PAGE

    resolved = accuracy_config.load(api.located(arguments.config), arguments.set)
    out = out_of(arguments, stamped(f"accuracy-{resolved.name}"), "run directory")
    try:
        found = api.accuracy(resolved, out=out, resume=arguments.resume, run=arguments.run)
    except KeyboardInterrupt:
        run = ["--run", arguments.run] if arguments.run else []
        return interrupted(["accuracy", arguments.config, *run], arguments, out)
    verdict_table.render(found.manifest, found.verdict)
    print(f"results: {out}; the page: {out / PAGE}", file=sys.stderr)
    return found.verdict.exit_code


def _evaluate(arguments: argparse.Namespace) -> int:
    """Asks the bare backbone and each adapter every test item of a task, as trained and with --served as served, and
    prints the scores with the paired difference to the bare backbone. Every answer is in items.jsonl, the scores in
    evaluation.json. Exit codes: 0, 1 where an adapter is not served as it was trained, 2 bad input."""
    from perfbench.finetune import evaluation

    names = [field.name for field in dataclasses.fields(evaluation.Asked) if field.name != "adapters"]
    chosen = {name: getattr(arguments, name) for name in names}
    out = arguments.out or stamped(f"evaluate-{arguments.task}")
    results = evaluation.evaluate(evaluation.Asked(**chosen, adapters=tuple(arguments.adapter)), out)
    print(f"results: {out}", file=sys.stderr)
    return exit_codes.OK if all(result.sound for result in results) else exit_codes.FAILED


def _import_backbone(arguments: argparse.Namespace) -> int:
    """Writes the model, the tokenizer and the chat template of a GGUF file as a folder that every command takes as
    backbone; quantised weights are widened. Needs the extra `gguf`. Exit code 0, or 2 for bad input."""
    from perfbench.finetune import gguf_import

    parameters = gguf_import.import_file(arguments.file, arguments.out, arguments.dtype)
    print(f"{arguments.out}: {parameters:,} parameters in {arguments.dtype}")
    return 0


def _add_mtbench_options(parser: argparse.ArgumentParser) -> None:
    steps = parser.add_subparsers(metavar="STEP", required=True)
    answer = steps.add_parser("answer", help="write a model's answers", description=_mtbench_answer.__doc__)
    answer.add_argument("backbone", help="a folder or hub id with weights and tokenizer")
    answer.add_argument("--adapter", type=Path, metavar="DIR", help="an adapter folder (default: the bare backbone)")
    answer.add_argument("--questions", required=True, metavar="DIR", help="FastChat's data/mt_bench")
    answer.add_argument("--out", type=Path, required=True, metavar="FILE", help="such as model_answer/mine.jsonl")
    answer.add_argument("--model-id", metavar="NAME", help="the model's name (default: that of --out)")
    answer.add_argument("--beams", type=positive, default=3, metavar="N", help="beams (default: 3, as in the papers)")
    answer.add_argument(
        "--new-tokens", type=positive, default=1024, metavar="N", help="at most, of an answer (default: 1024)"
    )
    answer.add_argument("--batch", type=positive, default=4, metavar="N", help="questions at a time (default: 4)")
    answer.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="type of weights and arithmetic")
    about = "where the model runs; auto: on a GPU where there is one"
    answer.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help=about)
    answer.set_defaults(command=_mtbench_answer)

    judge = steps.add_parser("judge", help="have them rated", description=_mtbench_judge.__doc__)
    judge.add_argument("answers", type=Path, help="what `answer` wrote")
    judge.add_argument(
        "--questions", required=True, metavar="DIR", help="the same folder, with judge_prompts.jsonl in it"
    )
    judge.add_argument("--out", type=Path, required=True, metavar="FILE", help="where each judgment is appended")
    judge.add_argument("--url", required=True, help="the endpoint, such as http://127.0.0.1:8000/v1")
    judge.add_argument("--model", required=True, help="name of the judge model at that address")
    judge.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="variable that holds the key")
    judge.set_defaults(command=_mtbench_judge)


def _mtbench_answer(arguments: argparse.Namespace) -> int:
    """Answers MT-Bench's two-turn questions with beam search and writes them in FastChat's answer format. Given again
    after a kill, it goes on."""
    from perfbench.finetune.mt_bench import questions
    from perfbench.machine.device import device_kind
    from perfbench.runtimes import backbone

    questions.questions(arguments.questions)  # a fault in them shows before the weights are loaded
    loaded = backbone.load(arguments.backbone, arguments.dtype, device_kind(arguments.device)[0], seed=0)
    tokenizer = loaded.tokenizer()
    model = loaded.model
    if arguments.adapter:
        from perfbench.finetune import trained

        model = trained.load(model, arguments.adapter)
    settings = {"beams": arguments.beams, "new_tokens": arguments.new_tokens, "batch": arguments.batch}
    name = arguments.model_id or arguments.out.stem
    whose = f"{arguments.backbone} {arguments.adapter} {arguments.dtype}"
    count = questions.answer_with(model, tokenizer, arguments.questions, arguments.out, name, whose, **settings)
    print(f"{arguments.out}: {count} answers of {name}")
    return 0


def _mtbench_judge(arguments: argparse.Namespace) -> int:
    """Has an OpenAI-compatible endpoint rate each answer from 1 to 10, as FastChat does, and prints the mean. Nothing
    but the questions, references and answers is sent, and to that address alone. Given again, it goes on."""
    import os

    from perfbench.finetune.mt_bench import judge
    from perfbench.finetune.mt_bench.judge_endpoint import Endpoint

    endpoint = Endpoint(arguments.url, arguments.model, os.environ.get(arguments.key_variable, ""))
    found = judge.judge(
        arguments.questions, arguments.answers, arguments.out, endpoint, lambda text: print(text, file=sys.stderr)
    )
    turns = ", ".join(f"turn {turn}: {score:.2f}" for turn, score in found.turns.items())
    mean = "none" if found.score is None else f"{found.score:.2f} ({turns})"
    print(f"mean rating by {arguments.model}: {mean}; {found.judged} judged, {found.unrated} without a rating")
    return 0

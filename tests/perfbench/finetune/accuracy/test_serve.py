"""Asking through an arm: the same answers as from the trained model, whoever else is in the batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from perfbench.errors import AdapterError, TaskError
from perfbench.finetune import trained
from perfbench.finetune.accuracy.accuracy_config import Serving
from perfbench.finetune.accuracy.identity import NONE, judge, probe
from perfbench.finetune.accuracy.paths import LeftOut, ServingPath, as_trained, is_served, served
from perfbench.finetune.accuracy.serve import (
    Asked,
    AsTrained,
    Tenant,
    answer,
    banks,
    mixed,
    predictions,
    probes,
    questions,
    serve,
    with_plan,
)
from perfbench.finetune.predict import choice_scores, predict
from perfbench.finetune.tasks.registry import TASKS
from perfbench.finetune.tasks.task import Example, Task
from perfbench.methods import parameters
from perfbench.methods.para import ParaOptions
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from tests.perfbench.finetune.made_up import write_copa

CHOOSE, GENERATE = TASKS["copa"], Task("t", "", "generate", "accuracy", lambda source, split: [], new_tokens=3)


@pytest.fixture(scope="module")
def base(tiny_llama: Path) -> backbone.Backbone:
    torch.set_num_threads(1)
    return backbone.load(str(tiny_llama), "fp32", "cpu", seed=0)


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    """Six made-up records of COPA, of unlike length."""
    folder = tmp_path_factory.mktemp("copa")
    write_copa(folder)
    found = [*CHOOSE.load(str(folder), "train"), *CHOOSE.load(str(folder), "dev")]
    assert len({len(example.prompt) for example in found}) > 1
    return found


def save(base: backbone.Backbone, method: str, seed: int, folder: Path, options: Any = None) -> Tenant:
    """A tenant with random values, on disk and read again."""
    options = options or METHODS[method].options()
    values = parameters.make(method, base.shape, options, seed=seed)
    parameters.implementation(method).save(values, base.shape, options, folder / f"{method}{seed}", base.name)
    return with_plan(Tenant(method, method, seed, folder / f"{method}{seed}"), base.shape)


@pytest.fixture(scope="module")
def tenants(base: backbone.Backbone, tmp_path_factory: pytest.TempPathFactory) -> list[Tenant]:
    folder = tmp_path_factory.mktemp("tenants")
    return [save(base, method, seed, folder) for method in ("lora", "para", "fanlora") for seed in (0, 1)]


def ask(
    base: backbone.Backbone, path: ServingPath, task: Task, tenants: list[Tenant], examples: list[Example]
) -> list[tuple[Asked, Any]]:
    arm, slots = serve(path, base, tenants)
    tokenizer = base.tokenizer()
    asked = questions(task, examples, tokenizer, base.shape.context)
    given: list[tuple[Asked, Any]] = []
    for pairs in mixed(len(tenants), asked, 5, seed=1):
        given += zip(pairs, answer(arm, task, pairs, slots, base, tokenizer, 1), strict=True)
    return given


@pytest.mark.parametrize("runtime", ["transformers", "static"])
def test_choices_get_the_trained_model_s_scores(
    base: backbone.Backbone, tenants: list[Tenant], examples: list[Example], runtime: str
) -> None:
    """Teacher forcing in a mixed batch, against one forward of the PEFT model: two ways that share no code."""
    given = ask(base, ServingPath(runtime, "eager", "fp32"), CHOOSE, tenants, examples)
    found = predictions(given, CHOOSE)
    for index, tenant in enumerate(tenants):
        model = trained.load(base.skeleton(), tenant.folder)
        for example, row in zip(examples, choice_scores(model, base.tokenizer(), examples), strict=True):
            own = {
                pair.question.choice + place: score
                for pair, scores in given
                if pair.tenant == index and pair.question.example is example
                for place, score in enumerate(scores)
            }
            assert [own[0], own[1]] == pytest.approx(row, rel=1e-4)
        expected = predict(model, base.tokenizer(), CHOOSE, examples)
        assert [found[index, example.id] for example in examples] == expected


def test_texts_are_the_trained_model_s(base: backbone.Backbone, tenants: list[Tenant], examples: list[Example]) -> None:
    found = predictions(ask(base, ServingPath("static", "eager", "fp32"), GENERATE, tenants, examples), GENERATE)
    texts = set()
    for index, tenant in enumerate(tenants):
        model = trained.load(base.skeleton(), tenant.folder)
        expected = predict(model, base.tokenizer(), GENERATE, examples)
        assert [found[index, example.id] for example in examples] == expected
        texts |= set(expected)
    assert len(texts) > 6, "tenants answer unlike each other"


def test_every_tenant_is_asked_everything_once_and_batches_are_mixed(
    base: backbone.Backbone, examples: list[Example]
) -> None:
    asked = questions(CHOOSE, examples, base.tokenizer(), base.shape.context)
    batches = list(mixed(6, asked, 5, seed=1))
    counted = Counter((pair.tenant, id(pair.question)) for pairs in batches for pair in pairs)
    assert counted == {(tenant, id(question)): 1 for tenant in range(6) for question in asked}
    assert sum(len({pair.tenant for pair in pairs}) > 2 for pairs in batches) > len(batches) * 0.8
    assert max(map(len, batches)) == 5
    assert [[p.tenant for p in b] for b in mixed(6, asked, 5, seed=1)] == [[p.tenant for p in b] for b in batches]


def test_a_prompt_that_does_not_fit_is_refused_with_its_record(
    base: backbone.Backbone, examples: list[Example]
) -> None:
    with pytest.raises(TaskError, match=r"jsonl:1"):
        questions(CHOOSE, examples, base.tokenizer(), context=10)


def test_methods_share_a_bank_unless_their_generators_pool_unlike(
    base: backbone.Backbone, tenants: list[Tenant], tmp_path: Path
) -> None:
    assert banks(tenants) == [tenants]
    other = save(base, "para", 9, tmp_path, ParaOptions(pool="normalised"))
    assert banks([*tenants, other]) == [tenants, [other]]


def test_an_adapter_that_is_not_there_is_refused(base: backbone.Backbone, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match="no such adapter folder"):
        with_plan(Tenant("lora", "lora", 0, tmp_path / "no"), base.shape)


def test_logits_tell_whose_adapter_answered(
    base: backbone.Backbone, tenants: list[Tenant], examples: list[Example]
) -> None:
    asked = probes(CHOOSE, examples, base.tokenizer())
    own = probe(AsTrained(base.skeleton()), asked, {NONE: -1}, base)
    for tenant in tenants:
        own |= probe(AsTrained(trained.load(base.skeleton(), tenant.folder)), asked, {tenant.name: 0}, base)
    arm, slots = serve(ServingPath("static", "eager", "fp32"), base, tenants)
    names = [tenant.name for tenant in tenants]
    found = probe(arm, asked, dict(zip(names, slots, strict=True)), base)
    assert judge(found, own, names, exact=True).status == "ok"
    assert judge(found, own | {"twin": own[names[0]]}, names, exact=True).status == "void", (
        "nobody could tell them apart"
    )
    swapped = found | {names[0]: found[names[1]]}
    assert judge(swapped, own, names, exact=False).reason == f"{names[0]} is served as {names[1]}"
    off = found | {names[2]: found[names[2]] * 1.001}
    assert judge(off, own, names, exact=False).status == "ok"
    assert "logits differ by" in judge(off, own, names, exact=True).reason
    broken = found | {names[0]: found[names[0]] * float("nan")}
    assert judge(broken, own, names, exact=False).status == "wrong"


def test_paths_that_are_not_there_are_left_out_and_named(base: backbone.Backbone) -> None:
    config = base.model.config.to_dict()
    found = list(served(Serving(), config, "cpu"))
    assert [path.id for path in found] == [
        f"{path}-{dtype}"
        for dtype in ("fp32", "bf16")
        for path in ("transformers-eager", "static-eager", "static-triton")
    ]
    assert [path.id for path in found if isinstance(path, LeftOut)] == ["static-triton-fp32", "static-triton-bf16"]
    assert not any(isinstance(path, LeftOut) for path in served(Serving(), config, "cuda"))
    sliding = config | {"model_type": "mistral", "sliding_window": 8}
    left = [path for path in served(Serving(), sliding, "cuda") if isinstance(path, LeftOut)]
    assert {path.reason for path in left} == {
        "sliding_window 8: sliding-window attention is not in runtime static; choose runtime transformers"
    }
    assert ServingPath("static", "eager", "fp32").must_equal(as_trained("fp32"))
    assert not ServingPath("static", "eager", "fp32").must_equal(as_trained("bf16"))
    assert all(map(is_served, ("para", "adalora")))
    assert not any(map(is_served, ("p-tuning", "none", "peft")))

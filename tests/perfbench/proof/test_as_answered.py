"""The proof of answers: what is right passes, what is not is named, and a control that changes nothing is void."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from perfbench.proof import oracle
from perfbench.proof.as_answered import check
from perfbench.proof.oracle import Served
from perfbench.runtimes import backbone
from perfbench.verify.on_device.runtimes import make_plan


@pytest.fixture(scope="module")
def base() -> backbone.Backbone:
    return backbone.load("llama-tiny", "fp32", "cpu", seed=0)


def answers(base: backbone.Backbone, tenants: int = 3) -> list[Served]:
    """What each tenant's adapter chooses after one prompt, by the oracle itself."""
    made = []
    for tenant in range(tenants):
        one = Served(torch.arange(5, 12), torch.zeros(1, dtype=torch.int64), make_plan(base, "lora", tenant), tenant)
        for _ in range(4):
            (logits,) = oracle.logits(base, [one], torch.float64)
            chosen = torch.cat([one.chosen[:-1], logits[-1].argmax()[None], torch.zeros(1, dtype=torch.int64)])
            one = replace(one, chosen=chosen)
        made.append(replace(one, chosen=one.chosen[:-1]))
    return made


def test_right_answers_pass_and_others_would_differ(base: backbone.Backbone) -> None:
    asked = answers(base)
    found = check(base, asked, [asked[(i + 1) % 3].plan for i in range(3)])
    assert (found.status, found.reason, found.requests, found.ties) == ("ok", None, 3, 0)
    assert (found.adapted, found.control_parted) == (3, 3)


def test_the_bare_backbone_is_a_control_too(base: backbone.Backbone) -> None:
    found = check(base, answers(base, 1), [None])
    assert (found.status, found.control_parted) == ("ok", 1)


def test_one_wrong_token_is_named(base: backbone.Backbone) -> None:
    asked = answers(base)
    wrong = asked[1].chosen.clone()
    wrong[2] = (wrong[2] + 1) % base.shape.vocab
    asked[1] = replace(asked[1], chosen=wrong)
    found = check(base, asked, [None, None, None])
    assert found.status == "check_failed"
    assert found.reason == "1 of 3 answers are not those of their adapters (tenant 1)"


def test_the_neighbour_s_adapter_fails(base: backbone.Backbone) -> None:
    asked = answers(base)
    swapped = [replace(one, plan=asked[(i + 1) % 3].plan) for i, one in enumerate(asked)]
    assert check(base, swapped, [None, None, None]).status == "check_failed"


def test_a_control_that_changes_little_is_void(base: backbone.Backbone) -> None:
    asked = answers(base)
    found = check(base, asked, [asked[0].plan, asked[1].plan, asked[0].plan])
    assert (found.status, found.control_parted) == ("check_void", 1)
    assert found.reason == "the adapters are too alike: of 3 answers 2 would have been the same with another one"


def test_without_adapters_there_is_no_control(base: backbone.Backbone) -> None:
    one = Served(torch.arange(5, 12), torch.zeros(1, dtype=torch.int64), None)
    (logits,) = oracle.logits(base, [one], torch.float64)
    right = replace(one, chosen=logits.argmax(-1))
    assert check(base, [right], [None], adapters=False).status == "ok"
    assert check(base, [right], [None]).reason == "none of the answers that were looked at had an adapter"


def test_what_is_not_finite_proves_nothing() -> None:
    broken = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    broken.model.model.layers[0].mlp.down_proj.weight.data.fill_(float("nan"))
    one = Served(torch.arange(5, 12), torch.zeros(3, dtype=torch.int64), None)
    found = check(broken, [one], [None], adapters=False)
    assert found.status == "check_void"
    assert "too much to prove anything" in str(found.reason)

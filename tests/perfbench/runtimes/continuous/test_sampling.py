"""Drawn tokens: as often as the softmax says, from the likeliest alone where that is asked for, and by the seed."""

from __future__ import annotations

import pytest
import torch

from perfbench.runtimes import backbone
from perfbench.runtimes.continuous.engine import Engine, Request
from perfbench.runtimes.continuous.rows import Rows
from perfbench.runtimes.continuous.sampling import Sampling

LOGITS = torch.tensor([2.0, 1.0, 0.5, -1.0])
DRAWS = 4000


def shares(sampling: Sampling) -> torch.Tensor:
    drawn = torch.tensor([sampling.draw(LOGITS) for _ in range(DRAWS)])
    return torch.bincount(drawn, minlength=len(LOGITS)) / DRAWS


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_come_as_often_as_the_softmax_says(temperature: float) -> None:
    expected = (LOGITS.double() / temperature).softmax(dim=-1)
    error = (expected * (1 - expected) / DRAWS).sqrt()
    assert ((shares(Sampling(temperature, seed=0)) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("top_p", "kept"), [(1e-6, 1), (0.6, 1), (0.7, 2), (0.85, 3), (0.999, 4), (1.0, 4)])
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: int) -> None:
    """The probabilities are 0.61, 0.22, 0.14 and 0.03."""
    found = shares(Sampling(1.0, top_p, seed=0))
    assert int((found > 0).sum()) == kept
    expected = LOGITS.softmax(dim=-1)[:kept]
    assert found[:kept].tolist() == pytest.approx((expected / expected.sum()).tolist(), abs=0.035)


def test_a_seed_gives_the_same_draws_and_none_gives_others() -> None:
    def draws(seed: int | None) -> list[int]:
        sampling = Sampling(1.0, seed=seed)
        return [sampling.draw(LOGITS) for _ in range(40)]

    assert draws(7) == draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_who_draws_does_not_change_what_the_others_get() -> None:
    base = backbone.load("llama-tiny", "fp32", "cpu", seed=0)
    prompts = torch.randint(3, base.shape.vocab, (3, 6), generator=torch.Generator().manual_seed(0))

    def run(*requests: Request) -> list[list[int]]:
        engine = Engine(Rows(base, None, "eager", 3, 20), None)
        for request in requests:
            engine.submit(request)
        while not engine.idle:
            engine.turn()
        return [request.tokens for request in requests]

    def asked(place: int, sampling: Sampling | None = None) -> Request:
        return Request(prompts[place], 12, sampling=sampling)

    greedy = run(asked(0), asked(1), asked(2))
    mixed = run(asked(0), asked(1, Sampling(1.5, seed=3)), asked(2))
    assert (mixed[0], mixed[2]) == (greedy[0], greedy[2])
    assert mixed[1] != greedy[1]
    assert run(asked(1, Sampling(1.5, seed=3)))[0] == mixed[1], "alone the seed gives the same"
    assert run(asked(1, Sampling(1e-4, seed=3)))[0] == greedy[1], "a small temperature is greedy"

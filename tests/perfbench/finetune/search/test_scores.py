"""The scores against their definitions, on numbers made by hand and on a model small enough to enumerate."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from perfbench.finetune.search import gates
from perfbench.finetune.search.evaluate import Ablations, ablations, gate_gradients
from perfbench.finetune.search.scores import SCORES, Measurement, Scores, ab_line, mean, spearman
from perfbench.methods.shape import MODULES
from tests.perfbench.finetune.search.conftest import load_bare, write_adapter, write_model


def losses(every: float, none: float, without: float, only: float, tokens: int = 10) -> dict[str, object]:
    """A line of one example and one layer in which every module has the same mean losses."""

    def full(value: float) -> torch.Tensor:
        return torch.full((1, 7, 1), value * tokens, dtype=torch.float64)

    found = Ablations(full(every)[0, 0], full(none)[0, 0], full(without), full(only))
    return {"tokens": [tokens], **{name: value.tolist() for name, value in vars(found).items()}}


def test_a_useful_module_has_a_positive_ab_score_and_a_harmful_one_a_negative():
    """Losses 2 (all), 3 (none), 2.25 (all but it), 2.875 (it alone): V = -2 + 2.25 - 2.875 + 3."""
    (layer,) = SCORES["ab"].combine([losses(2, 3, 2.25, 2.875)]).values
    assert layer == pytest.approx([0.375] * 7)
    (layer,) = SCORES["ab"].combine([losses(2, 3, 1.75, 3.125)]).values
    assert layer == pytest.approx([-0.375] * 7)


def test_the_constants_decide_the_sign():
    """Without S(all) and S(none), this useful module would come out negative, and be dropped."""
    line = losses(2, 3, 2.25, 2.875)
    without_constants = line["without"][0][0][0] - line["only"][0][0][0]
    assert without_constants < 0 < SCORES["ab"].combine([line]).values[0][0]


def test_an_ab_score_is_the_mean_over_tokens_not_over_examples():
    one, other = losses(2, 3, 2.5, 3, tokens=30), losses(2, 3, 2, 3, tokens=10)
    scores = SCORES["ab"].combine([one, other])
    assert scores.values[0][0] == pytest.approx(0.5 * 30 / 40)
    # Gains of 15 and 0, of which 3/8 a token is taken off, over 40 tokens, times n / (n - 1).
    assert scores.errors[0][0] == pytest.approx(math.sqrt(2 * (3.75**2 + 3.75**2)) / 40)


def measurement_of(made, batch, permutations=4, seed=0):
    gated, _ = gates.load(load_bare(made[0]), made[1])
    return Measurement(gated, [batch], 10**9, permutations, seed)


def lines_of(name, measurement):
    score = SCORES[name]
    return [{"unit": list(unit), **score.measure(measurement, unit)} for unit in score.units(measurement)]


def test_ab_scores_of_a_model_are_the_definition(made, batch):
    measurement = measurement_of(made(), batch)
    found = ablations(measurement.model, batch, 10**9)
    tokens = batch.answer_tokens().sum()

    def performance(nll):
        return -nll.sum(-1) / tokens

    expected = performance(found.every) - performance(found.without) + performance(found.only) - performance(found.none)
    scores = SCORES["ab"].combine(lines_of("ab", measurement))
    torch.testing.assert_close(torch.tensor(scores.values, dtype=torch.float64), expected)
    assert min(scores.flat()) < 0 < max(scores.flat())
    assert SCORES["ab"].combine([ab_line(found, batch)]) == scores


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    model = write_model(folder / "model", num_hidden_layers=1)
    return model, write_adapter(folder / "adapter", model)


def test_shapley_values_are_those_of_every_order(one_layer, batch):
    """Seven modules have 128 settings: the exact value is within the sampled one's error."""
    measurement = measurement_of(one_layer, batch, permutations=60)
    scores = SCORES["shapley"].combine(lines_of("shapley", measurement))
    exact = exact_shapley(measurement, batch)
    (values,), (errors,) = scores.values, scores.errors
    assert all(abs(a - b) < 4 * error for a, b, error in zip(values, exact, errors, strict=True))
    assert max(errors) < 0.25 * max(map(abs, values))


def exact_shapley(measurement, batch):
    """By the sum over all subsets, each evaluated anew."""
    from perfbench.finetune.search.evaluate import Answers, _whole

    model, worth = measurement.model, {}
    with torch.no_grad():
        for gates_on in itertools.product((False, True), repeat=7):
            model.set_layer(0, dict(zip(MODULES, gates_on, strict=True)))
            worth[gates_on] = -float(_whole(model, batch, Answers(batch)).sum() / batch.answer_tokens().sum())
    found = []
    for at in range(7):
        total = 0.0
        for subset, value in worth.items():
            if not subset[at]:
                size = sum(subset)
                weight = math.factorial(size) * math.factorial(6 - size) / math.factorial(7)
                total += weight * (worth[(*subset[:at], True, *subset[at + 1 :])] - value)
        found.append(total)
    return found


def test_shapley_values_add_up_to_what_all_modules_gain(made, batch):
    measurement = measurement_of(made(), batch)
    found = ablations(measurement.model, batch, 10**9)
    gain = float((found.none - found.every).sum() / batch.answer_tokens().sum())
    assert sum(SCORES["shapley"].combine(lines_of("shapley", measurement)).flat()) == pytest.approx(gain, abs=1e-6)


def test_orders_depend_on_the_seed_and_on_the_permutation_alone(made, batch):
    same = [lines_of("shapley", measurement_of(made(), batch, 2, seed)) for seed in (0, 0, 1)]
    assert same[0] == same[1]
    orders = {str(line["order"]) for lines in same for line in lines}
    assert len(orders) == 4


def test_sensitivity_is_the_mean_size_of_the_gradient_over_examples(made, batch):
    measurement = measurement_of(made(), batch)
    gradients = gate_gradients(measurement.model, batch)
    scores = SCORES["sensitivity"].combine(lines_of("sensitivity", measurement))
    torch.testing.assert_close(torch.tensor(scores.values, dtype=torch.float64), gradients.abs().mean(-1))
    spread = gradients.abs().std(-1) / math.sqrt(3)
    torch.testing.assert_close(torch.tensor(scores.errors, dtype=torch.float64), spread)


def test_the_mean_over_seeds_has_their_error():
    one, other = (Scores(((float(value),) * 7,), ((9.0,) * 7,)) for value in (1, 3))
    assert mean([one]) is one
    assert mean([one, other]) == Scores(((2.0,) * 7,), ((pytest.approx(1.0),) * 7,))


@pytest.mark.parametrize(
    ("one", "other", "rho"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 1000], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4, 5], [2, 1, 4, 3, 5], 0.8),
        ([1, 1, 2, 3], [1, 2, 3, 4], 4.5 / math.sqrt(4.5 * 5)),
    ],
)
def test_spearman(one, other, rho):
    assert spearman(one, other) == pytest.approx(rho)


def test_spearman_of_a_constant_is_undefined():
    assert spearman([1, 1, 1], [1, 2, 3]) is None

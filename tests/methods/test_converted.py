"""What a converted adapter is said to be before anything is converted."""

from __future__ import annotations

import pytest

from perfbench.methods import parameters
from perfbench.methods.converted import ConvertedOptions
from perfbench.methods.fanlora import FanLoraOptions
from perfbench.methods.lora import LoraOptions
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import shape_of


@pytest.fixture(scope="module")
def tiny() -> BackboneShape:
    return shape_of("llama-tiny")


@pytest.mark.parametrize("method", [name for name, own in METHODS.items() if own.served_by == "plan" and own.module])
def test_the_table_says_which_methods_read_the_prompt(tiny: BackboneShape, method: str) -> None:
    plan = parameters.meta_plan(method, tiny, METHODS[method].options())
    alike = not any(layer.generator is not None or layer.invocation is not None for layer in plan)
    assert METHODS[method].in_weights == alike


def test_it_takes_what_lora_of_its_rank_takes_and_trained_what_it_was_before(tiny: BackboneShape) -> None:
    options = ConvertedOptions(of="road", rank=8)
    lora = parameters.served_count("lora", tiny, LoraOptions(rank=8))
    assert parameters.served_count("converted", tiny, options) == lora
    trained = parameters.parameter_count("road", tiny, METHODS["road"].options())
    assert parameters.parameter_count("converted", tiny, options) == trained < lora


def test_modules_that_the_other_method_leaves_alone_get_no_pair(tiny: BackboneShape) -> None:
    expected = parameters.implementation("fanlora").shapes(tiny, FanLoraOptions(rank=5))
    assert parameters.implementation("converted").shapes(tiny, ConvertedOptions(of="fanlora", rank=5)) == expected


@pytest.mark.parametrize(
    ("of", "message"),
    [
        ("para", "got 'para', which does not change all tokens alike: no weights stand for it; known: dora, "),
        ("alora", "got 'alora', which does not change all tokens alike: no weights stand for it; did you"),
        ("rod", "expected a method that changes weights, got 'rod'; did you mean 'road'?"),
        ("converted", "expected a method that changes weights, got 'converted'; known: "),
    ],
)
def test_what_changes_no_weights_is_refused(of: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^of: ") as caught:
        ConvertedOptions(of=of)
    assert message in str(caught.value)


def test_a_rank_that_a_weight_does_not_have_is_refused(tiny: BackboneShape) -> None:
    assert min(tiny.features("k")) < min(tiny.features("q"))
    rank = min(tiny.features("k")) + 1
    with pytest.raises(
        ValueError, match=rf"rank {rank}: expected at most {rank - 1}, the smaller side of [kv]'s weight"
    ):
        parameters.implementation("converted").shapes(tiny, ConvertedOptions(rank=rank))

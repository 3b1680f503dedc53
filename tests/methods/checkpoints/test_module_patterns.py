"""The patterns of a configuration: matched as PEFT does, refused where they are none, and never without end."""

from __future__ import annotations

import re

import pytest
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from perfbench.methods.checkpoints import module_patterns, peft_targets
from perfbench.methods.checkpoints.module_patterns import LAYER, TAIL, WHOLE, BadPattern, matches
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes import backbone
from perfbench.spec.backbone_config import find_config

TINY = BackboneShape.of_config(find_config("llama-tiny"))
NAMES = peft_targets.linears(TINY)


def test_the_names_are_those_of_the_model() -> None:
    model = backbone.load("llama-tiny", "fp32", "cpu", seed=0).model
    assert set(peft_targets.modules(TINY)) == {name for name, _ in model.named_modules() if name}


PATTERNS = (
    "q_proj",
    r".*layers\.[01]\.self_attn\.(q|v)_proj",
    r"layers\.[01]\.self_attn\.q_proj",
    r"^model.layers.2.self_attn.v_proj",
    r"(?i)MODEL\..*UP_PROJ",
    r"(mlp|self_attn)\..*_proj",
    "k_proj|v_proj",
    "",
)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_whole_pattern_matches_as_peft_s(pattern: str) -> None:
    config = LoraConfig(target_modules=pattern)
    (found,) = matches([pattern], WHOLE, NAMES)
    assert [m is not None for m in found] == [bool(check_target_module_exists(config, name)) for name in NAMES]


@pytest.mark.parametrize("pattern", [p for p in PATTERNS if "(?i)" not in p])
def test_a_tail_matches_as_peft_s(pattern: str) -> None:
    (found,) = matches([pattern], TAIL, NAMES)
    assert [m is not None for m in found] == [get_pattern_key([pattern], name) == pattern for name in NAMES]


def test_a_layer_s_number_is_found() -> None:
    (plain,) = matches(["layers"], LAYER, NAMES)
    (pattern,) = matches(["lay.rs"], LAYER, NAMES)
    assert plain == pattern == [name.split(".")[2] for name in NAMES]


def test_what_is_no_pattern_is_refused() -> None:
    with pytest.raises(BadPattern, match=re.escape("expected a regular expression, got '(a' (missing )")):
        matches(["q_proj", "(a"], TAIL, NAMES)
    with pytest.raises(BadPattern, match="at most 10000 characters, got 10001"):
        matches(["a" * 10_001], WHOLE, NAMES)


def test_a_pattern_that_never_ends_is_refused_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_patterns, "LIMIT_S", 1.5)
    with pytest.raises(BadPattern, match=r"matched within 1\.5 s, got '.*', which takes longer"):
        matches([r"(\w*[\w.]*)*(\w*[\w.]*)*-"], WHOLE, NAMES)

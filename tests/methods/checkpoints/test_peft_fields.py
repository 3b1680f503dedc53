"""The tables of PEFT's fields, against PEFT's own classes; and a field that asks for more than is served."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adalora, miss, peft_fields, road, vera
from perfbench.methods.checkpoints import lora as lora_checkpoint
from perfbench.methods.checkpoints.peft_fields import Fields
from perfbench.peft.para import ParaConfig
from perfbench.peft.projected_ia3 import ProjectedIa3Config

CLASSES: dict[str, tuple[Fields, Any]] = {
    "LORA": (peft_fields.LORA, peft.LoraConfig),
    "ADALORA": (peft_fields.ADALORA, partial(peft.AdaLoraConfig, total_step=1)),
    "IA3": (peft_fields.IA3, peft.IA3Config),
    "ROAD": (peft_fields.ROAD, peft.RoadConfig),
    "MISS": (peft_fields.MISS, peft.MissConfig),
    "VERA": (peft_fields.VERA, peft.VeraConfig),
    "PARA": (peft_fields.PARA, ParaConfig),
    "PROJECTED_IA3": (peft_fields.PROJECTED_IA3, ProjectedIa3Config),
}
HERE = Path("adapter_config.json")


@pytest.mark.parametrize("kind", CLASSES)
def test_every_field_of_peft_is_in_a_table_and_has_peft_s_default(kind: str) -> None:
    table, config = CLASSES[kind]
    fields = {field.name for field in dataclasses.fields(config())}
    assert fields <= table.known, "decide whether it is served, then write it down"
    made = config()
    for field, default in table.fixed.items():
        # A PEFT that is older than the table lacks some.
        assert field not in fields or getattr(made, field) == default


def test_what_an_absent_field_means_is_peft_s_default() -> None:
    made = peft.LoraConfig()
    assert made.r == lora_checkpoint.DEFAULT_RANK
    assert made.lora_alpha == lora_checkpoint.DEFAULT_ALPHA
    adaptive = peft.AdaLoraConfig(total_step=1)
    summing = peft.MissConfig()
    assert (summing.r, summing.mini_r) == (miss.DEFAULT_RANK, miss.DEFAULT_MINI_RANK)
    sharing = peft.VeraConfig()
    assert (sharing.r, sharing.projection_prng_key) == (vera.DEFAULT_RANK, vera.DEFAULT_KEY)
    rotating = peft.RoadConfig()
    assert (rotating.variant, rotating.group_size) == (road.DEFAULT_VARIANT, road.DEFAULT_GROUP)
    assert (adaptive.init_r, adaptive.lora_alpha) == (adalora.DEFAULT_INITIAL_RANK, adalora.DEFAULT_ALPHA)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_configuration_that_peft_makes_is_served(kind: str) -> None:
    table, config = CLASSES[kind]
    peft_fields.check(config(task_type="CAUSAL_LM").to_dict(), HERE, table)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "doubled layers": ({"layer_replication": [[0, 2], [1, 3]]}, "layer_replication: expected None, got [[0, 2]"),
    "bias": ({"bias": None}, "bias: expected 'none', got None"),
    "a number for a flag": ({"use_qalora": 1}, "use_qalora: expected False, got 1"),
    "a later PEFT's": ({"use_magic": True}, "use_magic: expected a field that perfbench serves or one that is off"),
    "a later PEFT's object": ({"magic_config": {"a": 1}}, "got {'a': 1}"),
    "a misspelt one": ({"use_rslor": True}, "did you mean 'use_rslora'?"),
    "zero is not off": ({"magic_ratio": 0}, "magic_ratio: expected"),
    "another task": ({"task_type": "SEQ_CLS"}, "task_type: expected 'CAUSAL_LM' or null, got 'SEQ_CLS'"),
    "a line end": ({"a\nb": 1}, r"'a\nb': expected"),
}  # fmt: skip


@pytest.mark.parametrize("fault", REFUSED)
def test_a_field_that_asks_for_more_is_refused_by_name(fault: str) -> None:
    values, message = REFUSED[fault]
    with pytest.raises(AdapterError) as raised:
        peft_fields.check({"peft_type": "LORA"} | values, HERE, peft_fields.LORA)
    assert message in str(raised.value)
    assert str(raised.value).startswith(f"{HERE}: ")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("value", [None, False, [], {}])
def test_a_field_of_a_later_peft_that_is_off_is_served(value: Any) -> None:
    peft_fields.check({"peft_type": "LORA", "magic_config": value}, HERE, peft_fields.LORA)

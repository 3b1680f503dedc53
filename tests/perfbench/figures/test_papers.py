"""The papers' numbers: counts worked out again from the shape, and when they are laid beside an arm."""

from __future__ import annotations

from typing import Any

import pytest

from perfbench.errors import ScenarioError
from perfbench.figures.papers import PAPERS, PARAMETERS, STUDIES, find_paper
from perfbench.methods.shape import MODULES, BackboneShape

LLAMA_2_7B = BackboneShape(32, 4096, 11008, 32, 32, 128, 32000, 4096)


def low_rank(module: str, rank: int) -> int:
    return rank * sum(LLAMA_2_7B.features(module))


def out(*modules: str) -> int:
    return sum(LLAMA_2_7B.features(module)[1] for module in modules)


def test_exact_counts_follow_from_the_shape() -> None:
    layers, hidden = LLAMA_2_7B.layers, LLAMA_2_7B.hidden
    shallow = layers * 9 // 16
    fanlora = shallow * (low_rank("v", 12) + low_rank("o", 12))
    fanlora += (layers - shallow) * (low_rank("up", 12) + low_rank("down", 12))
    generator, bias = 12 * (hidden + out("q", "v", "up")), out("q", "v", "up")
    expected = {
        "lora": layers * sum(low_rank(module, 4) for module in MODULES),
        "fanlora": fanlora,
        # P of 16 x D_out and z of 16, for each of Q, K, Up.
        "ia3": layers * (16 * out("q", "k", "up") + 3 * 16),
        "ia3-original": layers * (out("k", "v") + LLAMA_2_7B.features("down")[0]),
        "para": layers * (generator + bias),
    }
    assert {method: count.exact for method, count in PARAMETERS.items()} == expected
    assert PARAMETERS["para"].paper_counts == layers * generator


def test_the_printed_counts_are_the_exact_ones_rounded() -> None:
    for method, count in PARAMETERS.items():
        printed = float(count.printed.split("-")[0].removesuffix("M"))
        assert abs((count.paper_counts or count.exact) / 1e6 - printed) <= 0.051, method


def test_para_table_4_as_ratios_to_lora() -> None:
    paper = PAPERS["para_table4"]
    assert paper.versus_lora("lora", 1) == 1.0
    assert paper.versus_lora("ia3", 1) == pytest.approx(33.1 / 25.1)
    assert paper.versus_lora("para", 3) == pytest.approx(27.6 / 21.9)
    assert paper.versus_lora("fanlora", 1) is None
    assert paper.versus_lora("para", 2) is None


def test_fanlora_table_3_has_memory_and_no_speed() -> None:
    paper = PAPERS["fanlora_table3"]
    row = paper.row("fanlora", 3, {"rank": 12})
    assert row is not None
    assert (row.tokens_per_s, row.mib) == (None, 16054)
    assert paper.speeds == "illegible"
    assert paper.versus_lora("fanlora", 3) is None


@pytest.mark.parametrize(
    ("method", "beams", "options", "there"),
    [
        ("lora", 1, {"rank": 4}, True),
        ("lora", 1, {}, True),
        ("lora", 1, {"rank": 4, "modules": MODULES}, True),
        ("lora", 1, {"rank": 4, "modules": list(MODULES)}, True),
        ("lora", 1, {"rank": 4, "modules": ["q", "v"]}, False),
        ("lora", 1, {"rank": 8}, False),  # the paper ran rank 4: its number says nothing about rank 8
        ("lora", 2, {"rank": 4}, False),
        ("fanlora", 1, {"rank": 12}, False),
        ("none", 1, {}, False),
    ],
)
def test_numbers_only_beside_arms_that_the_paper_ran(
    method: str, beams: int, options: dict[str, Any], there: bool
) -> None:
    assert (PAPERS["para_table4"].row(method, beams, options) is not None) == there


def test_an_ablation_has_the_numbers_of_the_tables_that_it_repeats() -> None:
    assert dict(STUDIES["fanlora_table7"].values) == {
        "AdaLoRA, LLaMA-2 7B": (84.9,),
        "FanLoRA, LLaMA-2 7B": (86.4,),
        "AdaLoRA, Qwen1.5 7B": (85.7,),
        "FanLoRA, Qwen1.5 7B": (87.1,),
    }
    default = STUDIES["fanlora_table6"].values["FanLoRA"]
    assert STUDIES["fanlora_figure3"].values == {"K_max 2": default}
    assert STUDIES["fanlora_figure4"].values["FanLoRA 12"] == default
    assert all(study.values and study.title and study.finding for study in STUDIES.values())


def test_an_unknown_table_is_answered_with_the_nearest() -> None:
    assert find_paper("para_table4") is PAPERS["para_table4"]
    with pytest.raises(ScenarioError, match="did you mean 'para_table4'"):
        find_paper("para_table5")

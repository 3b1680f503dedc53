"""The roof: bytes and operations counted by hand, the table of devices, and the command."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from perfbench.commands.roof_table import Question, bounds, table
from perfbench.errors import PerfbenchError
from perfbench.figures.roof import (
    DEVICES,
    Device,
    Work,
    decode_step,
    find_device,
    impossible,
    known_device,
    least_ms,
    least_s_of_step,
)
from perfbench.methods import parameters
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone
from perfbench.spec.backbone_config import NAMED_CONFIGS, shape_of

QUESTION = Question("llama2-7b", "bf16", (1, 64), None, 274, 32, 1)


def test_the_papers_roof_on_an_a40_is_52_tokens_per_s() -> None:
    """DIGEST: 696 GB/s over the bf16 weights that one step reads."""
    _, work = bounds(QUESTION, 1)["none"]
    assert 1 / work.least_s(DEVICES["a40"], "bf16") == pytest.approx(52, abs=1)
    assert work.bound_by(DEVICES["a40"], "bf16") == "memory"


def test_what_is_kept_at_64_requests_is_what_the_bytes_allow() -> None:
    work = bounds(QUESTION, 64)
    least_s = {name: last.least_s(DEVICES["a40"], "bf16") for name, (_, last) in work.items()}
    kept = {name: least_s["none"] / seconds for name, seconds in least_s.items()}
    assert kept["none"] == 1.0
    assert kept["lora"] == pytest.approx(0.947, abs=0.01)
    assert kept["fanlora"] == pytest.approx(0.953, abs=0.01)
    assert kept["para"] == pytest.approx(0.993, abs=0.006)
    assert kept["ia3"] == pytest.approx(0.993, abs=0.006)


def test_the_work_of_a_rank_is_its_share_and_the_whole_head() -> None:
    shape, config = shape_of("llama-tiny"), NAMED_CONFIGS["llama-tiny"]
    one, rank = (
        decode_step(config, "fp32", prompt_tokens=[7] * 4, generated_tokens=2, beams=1, ranks=ranks) for ranks in (1, 2)
    )
    whole = (shape.vocab * shape.hidden + (2 * shape.layers + 1) * shape.hidden) * 4
    assert 2 * (rank.weight_bytes - whole) == one.weight_bytes - whole
    assert 2 * rank.cache_bytes == one.cache_bytes
    head = 2 * 4 * shape.vocab * shape.hidden
    assert 2 * (rank.flops - head) == one.flops - head


def test_kinds_of_adapters_add_up_and_what_all_share_is_read_once() -> None:
    shape = shape_of("llama-tiny")
    plans = {name: parameters.meta_plan(name, shape, METHODS[name].options()) for name in ("lora", "para", "vera")}

    def work(*adapters: tuple[Any, list[int]]) -> Work:
        config = NAMED_CONFIGS["llama-tiny"]
        return decode_step(config, "bf16", prompt_tokens=[7] * 4, generated_tokens=2, beams=1, adapters=adapters)

    bare, lora, para = work(), work((plans["lora"], [0, 1])), work((plans["para"], [2, 2]))
    both = work((plans["lora"], [0, 1]), (plans["para"], [2, 2]))
    assert both.adapter_bytes == lora.adapter_bytes + para.adapter_bytes
    assert both.flops - bare.flops == (lora.flops - bare.flops) + (para.flops - bare.flops)
    # Two tenants of VeRA, told as two kinds of one tenant: their matrices are the same.
    assert work((plans["vera"], [0]), (plans["vera"], [1])) == work((plans["vera"], [0, 1]))


@pytest.mark.parametrize("name", ["llama-tiny", "llama-256x8"])
def test_weights_are_those_of_the_model_that_is_loaded(name: str) -> None:
    model = backbone.load(name, "fp32", "cpu", seed=0).model
    read = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    work = decode_step(NAMED_CONFIGS[name], "fp32", prompt_tokens=[5], generated_tokens=3, beams=1)
    assert work.weight_bytes == read * 4
    shape = shape_of(name)
    assert work.cache_bytes == 2 * shape.layers * shape.kv_heads * shape.head_dim * 8 * 4


def test_a_prompt_is_read_once_for_its_beams_and_an_adapter_once_for_its_tenant() -> None:
    config, shape = NAMED_CONFIGS["llama-tiny"], shape_of("llama-tiny")
    plans = {name: parameters.meta_plan(name, shape, METHODS[name].options()) for name in ("lora", "para")}
    plans["lora-bias"] = parameters.meta_plan("lora", shape, METHODS["lora"].options(lora_bias=True))

    def work(method: str, served: list[int], beams: int = 1) -> Work:
        return decode_step(
            config, "bf16", prompt_tokens=[7] * 4, generated_tokens=2, beams=beams, adapters=[(plans[method], served)]
        )

    token = 2 * shape.layers * shape.kv_heads * shape.head_dim * 2
    assert work("lora", [0], beams=3).cache_bytes - work("lora", [0]).cache_bytes == 4 * 2 * 2 * token
    one = work("lora", [5]).adapter_bytes
    assert one == sum(t.numel() for layer in plans["lora"] for t in layer.tensors()) * 2
    assert work("lora", [5, 5, 5]).adapter_bytes == one
    assert work("lora", [5, 6, 5]).adapter_bytes == 2 * one
    added = sum(bias.numel() for layer in plans["lora-bias"] for bias in layer.bias.values())
    assert work("lora-bias", [5, 5]).adapter_bytes == one + added * 2
    assert work("lora-bias", [5, 5]).flops == work("lora", [5, 5]).flops + 2 * added, "an addition for each number"
    vectors = sum(layer.generator.bias_minus_one.numel() for layer in plans["para"]) * 2
    assert work("para", [5, 5, 5]).adapter_bytes == 3 * vectors
    assert work("lora", []).adapter_bytes == 0


@pytest.mark.parametrize(
    ("fields", "sliding"),
    [
        ({"model_type": "mistral", "sliding_window": 5}, 3),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, 1),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5,
          "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, 2),
        ({"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 5, "max_window_layers": 0}, 0),
        ({"model_type": "mistral", "sliding_window": None}, 0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("beams", [1, 3])
def test_what_a_window_has_left_behind_is_not_read(fields: dict[str, Any], sliding: int, beams: int) -> None:
    """Counted by hand: prompts of 7 and 3 tokens, and 2 more of each row. With a window of 5 a new token sees itself,
    the two before it, and the last two of the prompt."""
    config, shape = NAMED_CONFIGS["llama-tiny"] | fields, shape_of("llama-tiny")

    def work(config: dict[str, Any]) -> Work:
        return decode_step(config, "fp32", prompt_tokens=[7, 3], generated_tokens=2, beams=beams)

    whole, slides = 7 + 3 + 2 * 2 * beams, 2 + 2 + 2 * 2 * beams
    token = 2 * shape.kv_heads * shape.head_dim * 4
    found = work(config)
    assert found.cache_bytes == token * ((3 - sliding) * whole + sliding * slides)
    unseen = sliding * ((7 + 2 + 1 - 5) + (3 + 2 + 1 - 5)) * beams
    plain = work(config | {"sliding_window": None, "use_sliding_window": False, "layer_types": None})
    assert plain.flops - found.flops == 2 * 2 * shape.heads * shape.head_dim * unseen


def test_where_a_window_fills_no_step_is_below_the_line_between_the_first_and_the_last() -> None:
    config = NAMED_CONFIGS["llama-tiny"] | {"model_type": "mistral", "sliding_window": 9}
    steps = [decode_step(config, "fp32", prompt_tokens=[7, 3, 12], generated_tokens=g, beams=2) for g in range(14)]
    for part in ("bytes", "flops"):
        counts = [getattr(step, part) for step in steps]
        assert counts == sorted(counts)
        for g, count in enumerate(counts):
            assert count >= counts[0] + (counts[-1] - counts[0]) * g / 13
        assert counts[-1] == counts[-2] > counts[0]


def test_the_windows_are_those_of_the_model_that_is_loaded() -> None:
    from transformers import MistralConfig, Qwen2Config

    from perfbench.spec.backbone_config import windows

    for made in (
        MistralConfig(num_hidden_layers=3),
        MistralConfig(num_hidden_layers=3, sliding_window=None),
        Qwen2Config(num_hidden_layers=4, use_sliding_window=True, max_window_layers=1),
        Qwen2Config(num_hidden_layers=30, use_sliding_window=True),
        Qwen2Config(num_hidden_layers=30),
    ):
        whole = made.to_dict()
        kinds = whole.get("layer_types") or ["sliding_attention"] * made.num_hidden_layers
        own = tuple(made.sliding_window if kind == "sliding_attention" else None for kind in kinds)
        assert windows(whole) == own
        assert windows(made.to_diff_dict() | {"num_hidden_layers": made.num_hidden_layers}) == own


def test_flops_are_two_for_each_weight_and_row() -> None:
    config, shape = NAMED_CONFIGS["llama-tiny"], shape_of("llama-tiny")
    work = decode_step(config, "fp32", prompt_tokens=[7, 3], generated_tokens=2, beams=1)
    model = backbone.load("llama-tiny", "fp32", "cpu", seed=0).model
    linears = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    head = shape.vocab * shape.hidden
    seen = 7 + 3 + 2 * 3  # each row sees its prompt, two generated tokens and itself
    assert work.flops == 2 * (2 * (linears + head) + 2 * shape.layers * shape.heads * shape.head_dim * seen)


def test_the_slower_of_bytes_and_operations_counts() -> None:
    device = Device("d", 100.0, {"fp32": 10.0}, None, "made up")
    assert Work(100, 50, 50, 30).least_s(device, "fp32") == 3.0
    assert Work(100, 50, 50, 30).bound_by(device, "fp32") == "arithmetic"
    assert Work(100, 50, 250, 30).least_s(device, "fp32") == 4.0


def test_devices_are_known_by_the_driver_s_name_and_by_no_other() -> None:
    assert known_device("NVIDIA A40") is DEVICES["a40"]
    assert known_device("NVIDIA H200") is DEVICES["h200"]
    assert known_device("NVIDIA A100-PCIE-40GB") is None
    assert known_device("NVIDIA A4000") is None
    with pytest.raises(PerfbenchError, match=r"unknown device 'h20'.*h200"):
        find_device("h20")


def test_this_machine_is_measured() -> None:
    from perfbench.measure.on_device.measured_roof import device_roof

    found = device_roof(torch.device("cpu"), "fp32")
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s["fp32"] < 1e15
    assert found.source.startswith("measured")


def test_the_table_names_the_device_and_every_method() -> None:
    out = io.StringIO()
    table(QUESTION, DEVICES["a40"]).print(Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text, "a terminal of 80 columns shows every figure"
    for word in ("NVIDIA A40", "datasheet", "requests 64", "fanlora", "kept", "memory"):
        assert word in text


def test_what_can_t_be_asked_is_refused() -> None:
    with pytest.raises(PerfbenchError, match="--tenants: expected at most the 1 requests, got 5"):
        bounds(Question("llama2-7b", "bf16", (1,), 5, 274, 32, 1), 1)
    with pytest.raises(PerfbenchError, match="--prompt-tokens: expected at most 4096 tokens"):
        bounds(Question("llama2-7b", "bf16", (1,), None, 4090, 32, 1), 1)


def measured(itl_ms: float, memory_bytes: int | None, **load: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """A comparison and a case of it whose last step reads 1 GB on a device of 1 TB/s: 1 ms at least."""
    roof: dict[str, Any] = {"name": "d", "bytes_per_s": 1e12, "flops_per_s": {"bf16": 1e15}, "source": "made up"}
    roof["memory_bytes"] = memory_bytes
    workload = {"prompt_tokens": 96, "new_tokens": 32, "beams": 1} | load
    exact = {"bytes_per_decode_step": 10**9, "least_flops_per_decode_step": 1}
    case = {"exact": exact, "summary": {"itl_ms": {"median": itl_ms}}}
    return {"roof": roof, "dtype": "bf16", "workload": workload}, case


@pytest.mark.parametrize(
    ("itl_ms", "memory_bytes", "load", "fails"),
    [
        # The first step may have needed 96 / 128 of the last one's, the middle one 112 / 128.
        (0.88, 2**30, {}, False),
        (0.87, 2**30, {}, True),
        (0.76, 2**30, {"beams": 3}, False),  # each beam adds its own
        (0.74, 2**30, {"beams": 3}, True),
        (0.6, 2**30, {"prompts": "f.txt"}, False),  # of unknown length
        (0.3, None, {}, False),  # a measured roof may be a bad moment's
        (0.28, None, {}, True),
    ],
)
def test_a_step_faster_than_what_it_reads_is_impossible(
    itl_ms: float, memory_bytes: int | None, load: dict[str, Any], fails: bool
) -> None:
    found = impossible(*measured(itl_ms, memory_bytes, **load))
    assert (found is not None) is fails
    assert found is None or found.startswith(f"a step took {itl_ms:.3g} ms, and what it must read takes")


def test_the_bound_of_a_run_is_that_of_all_its_steps() -> None:
    """The last step's bound was printed as one that nothing can beat, and the mean of a run beat it by x 1.56 at 64
    requests of 16 + 1,024 tokens: a device that takes each step's least time exactly reaches 100% and no more."""
    question = Question("llama2-7b", "bf16", (64,), None, 16, 1024, 1)
    first, last = bounds(question, 64)["none"]
    device, steps = DEVICES["a40"], question.new_tokens - 1
    ideal_s = [
        decode_step(
            NAMED_CONFIGS["llama2-7b"], "bf16",
            prompt_tokens=[16] * 64, generated_tokens=step, beams=1,
        ).least_s(device, "bf16")
        for step in range(steps)
    ]  # fmt: skip
    found_s = [least_s_of_step(first, last, step, steps, device, "bf16") for step in range(steps)]
    assert found_s == pytest.approx(ideal_s)
    assert last.least_s(device, "bf16") / (sum(ideal_s) / steps) == pytest.approx(1.56, abs=0.01), "the old bound"
    out = io.StringIO()
    table(question, device).print(Console(file=out, width=80))
    none = next(line for line in out.getvalue().splitlines() if line.strip().startswith("none"))
    assert f"{64 * steps / sum(ideal_s):,.0f}" in none.split()
    exact = {
        "bytes_per_first_decode_step": first.bytes,
        "least_flops_per_first_decode_step": first.flops,
        "bytes_per_decode_step": last.bytes,
        "least_flops_per_decode_step": last.flops,
    }
    load = {"prompts": "f.txt", "new_tokens": question.new_tokens, "beams": 1}
    comparison = {"roof": vars(device), "dtype": "bf16", "workload": load}
    median_ms = sorted(ideal_s)[steps // 2] * 1e3
    assert least_ms(comparison, {"exact": exact}) == pytest.approx(median_ms)
    for slower, fails in ((1.0001, False), (0.9999, True)):
        case = {"exact": exact, "summary": {"itl_ms": {"median": median_ms * slower}}}
        assert (impossible(comparison, case) is not None) is fails


def test_of_an_older_run_only_the_cache_can_have_been_smaller() -> None:
    comparison, case = measured(0.6, 2**30)
    assert least_ms(comparison, case) == pytest.approx(1 - 0.25 / 2)
    assert least_ms(comparison, case | {"memory": {"kv_cache_bytes": 10**8}}) == pytest.approx(1 - 0.025 / 2)


def test_what_was_not_measured_is_not_impossible() -> None:
    comparison, case = measured(0.1, 2**30)
    assert impossible(comparison, case | {"summary": None}) is None
    assert impossible(comparison | {"roof": None}, case) is None

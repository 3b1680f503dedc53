"""Cases: the product of the axes, ids that stay what they are, selection, and the round trip through JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from perfbench.errors import ScenarioError
from perfbench.spec.cases import Comparison, expand, from_json, select, to_json
from perfbench.spec.scenario import load, resolve

VALID = """\
backbone: llama-tiny
dtype: fp32
methods: [lora, para]
workload:
  prompt_tokens: 8
  new_tokens: 4
  requests: 3
  tenants: 2
"""
PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def expanded(*sets, text=VALID, kind="cpu"):
    Path("x.yaml").write_text(text)
    return expand(resolve(load("x.yaml", sets), kind))


def case_ids(comparisons):
    return [case.id for comparison in comparisons for case in comparison.cases]


def test_ids_are_readable():
    sets = ["backbone=llama2-7b", "dtype=bf16", "workload.prompt_tokens=274", "workload.new_tokens=32",
            "workload.beams=3", "workload.requests=8", "workload.tenants=8"]  # fmt: skip
    prefix = "llama2-7b-bf16-cuda/transformers/p274-n32-b3-q8-t8-r8-distinct"
    (comparison,) = expanded(*sets, kind="cuda")
    assert comparison.id == prefix
    assert case_ids([comparison]) == [f"{prefix}/{arm}-eager" for arm in ("none", "lora", "para")]


@pytest.mark.parametrize(
    ("sets", "tail"),
    [
        (["workload.resident=5"], "p8-n4-b1-q3-t2-r5-distinct"),
        (["workload.tenant_mix=zipf"], "p8-n4-b1-q3-t2-r2-zipf1.1"),
        (["workload.tenant_mix=zipf", "workload.zipf_exponent=2"], "p8-n4-b1-q3-t2-r2-zipf2"),
        (["workload.without_adapter=0.25"], "p8-n4-b1-q3-t2-r2-distinct-w0.25"),
        (["workload.without_adapter=1"], "p8-n4-b1-q3-t2-r2-distinct-w1"),
        (["workload.own_tokens=0"], "p8-n4-b1-q3-t2-r2-distinct"),
        (["workload.own_tokens=3"], "p8-n4-b1-q3-t2-r2-distinct-own3"),
        (["workload.follow_up_tokens=0"], "p8-n4-b1-q3-t2-r2-distinct"),
        (["workload.prompts=mt bench.txt"], "mt-bench-p8-n4-b1-q3-t2-r2-distinct"),
    ],
)
def test_workload_part_of_an_id(sets, tail):
    Path("mt bench.txt").write_text("Hello\n")
    (comparison,) = expanded(*sets)
    assert comparison.id == f"llama-tiny-fp32-cpu/transformers/{tail}"


def test_a_second_turn_is_in_the_id():
    (comparison,) = expanded("runtime=static", "workload.follow_up_tokens=6")
    assert comparison.id == "llama-tiny-fp32-cpu/static/p8-n4-b1-q3-t2-r2-distinct-f6"
    assert comparison.workload.follow_up_tokens == 6


def test_real_prompts_at_their_own_length():
    Path("p.jsonl").write_text('{"prompt": "Hello"}\n')
    (comparison,) = expanded(text=VALID.replace("prompt_tokens: 8", "prompts: p.jsonl"))
    assert comparison.id == "llama-tiny-fp32-cpu/transformers/p-n4-b1-q3-t2-r2-distinct"
    assert comparison.workload.prompt_tokens is None


def test_the_product_of_all_axes_has_unique_ids_that_are_safe_in_paths():
    sets = ["backbone=[llama-tiny, llama-256x8, owner/model]", "dtype=[fp32, bf16]",
            "workload={prompt_tokens: [8, 16], new_tokens: [4, 5], beams: [1, 3], requests: [3, 6],"
            " tenants: [1, 2],"
            " resident: [2, 4], tenant_mix: [distinct, zipf], zipf_exponent: [1, 1.5],"
            " without_adapter: [0, 0.5]}"]  # fmt: skip
    comparisons = expanded(*sets)
    # The exponent multiplies only the points whose mix is zipf: 1 + 2 of them.
    assert len(comparisons) == 3 * 2 * 2**6 * 3 * 2
    ids = case_ids(comparisons)
    assert len(set(ids)) == len(ids) == 3 * len(comparisons)
    assert all(PART.fullmatch(part) for case_id in ids for part in case_id.split("/"))
    assert all(len(case_id.split("/")) == 4 for case_id in ids)
    assert all(case_id.startswith(f"{c.id}/") for c in comparisons for case_id in case_ids([c]))


def test_an_id_does_not_depend_on_what_else_is_on_the_axes():
    alone = expanded("methods=[para]")
    among = expanded("methods=[lora, para]", "dtype=[bf16, fp32]", "workload.beams=[3, 1]", "workload.tenants=[1, 2]")
    assert set(case_ids(alone)) < set(case_ids(among))


def test_two_folders_of_one_name_have_different_ids():
    for folder in ("a/model", "b/model"):
        Path(folder).mkdir(parents=True)
    (a,), (b,) = expanded("backbone=a/model"), expanded("backbone=b/model")
    assert a.id.startswith("model-")
    assert b.id.startswith("model-")
    assert a.id != b.id
    both = expanded("backbone=[a/model, b/model]")
    assert [comparison.id for comparison in both] == [a.id, b.id]


def test_weights_of_8_bits_are_an_axis_and_in_the_id():
    alone, *others = expanded("quantisation=[none, int8]", "dtype=[fp32, bf16]")
    assert alone == expanded()[0], "without them an id is as it was"
    assert [(one.id.split("/")[0], one.quantisation) for one in (alone, *others)] == [
        ("llama-tiny-fp32-cpu", "none"),
        ("llama-tiny-fp32-int8-cpu", "int8"),
        ("llama-tiny-bf16-cpu", "none"),
        ("llama-tiny-bf16-int8-cpu", "int8"),
    ]
    assert from_json(to_json(others[0])) == others[0]
    older = {key: value for key, value in to_json(alone).items() if key != "quantisation"}
    assert from_json(older) == alone


def test_a_hub_id_keeps_its_owner():
    assert expanded("backbone=meta-llama/Llama-2-7b-hf")[0].id.startswith("meta-llama--Llama-2-7b-hf-fp32-cpu/")


def test_one_folder_spelt_in_two_ways_is_refused():
    Path("model").mkdir()
    with pytest.raises(ScenarioError, match=r"^x.yaml:1: backbone 'model' and './model' have one id, model-"):
        expanded("backbone=[model, ./model]")


def test_two_files_of_prompts_with_one_stem_are_refused():
    for folder in ("a", "b"):
        Path(folder).mkdir()
        Path(folder, "p.txt").write_text("Hello\n")
    point = "prompt_tokens: 8, new_tokens: 4, requests: 1, tenants: 1"
    with pytest.raises(ScenarioError, match=r"prompts 'a/p.txt' and 'b/p.txt' have one id, .*; rename one of them"):
        expanded(f"workload=[{{prompts: a/p.txt, {point}}}, {{prompts: b/p.txt, {point}}}]")


def test_a_point_that_two_workloads_share_is_there_once():
    point = "prompt_tokens: 8, new_tokens: 4, requests: 4"
    sets = f"workload=[{{{point}, tenants: 2, resident: [2, 4]}}, {{{point}, tenants: [1, 2], resident: 4}}]"
    residents = [(c.workload.tenants, c.workload.resident) for c in expanded(sets)]
    assert residents == [(2, 2), (2, 4), (1, 4)]


def test_resident_defaults_to_the_tenants_of_the_same_point():
    points = [comparison.workload for comparison in expanded("workload.tenants=[1, 2, 3]")]
    assert [(point.tenants, point.resident) for point in points] == [(1, 1), (2, 2), (3, 3)]


def test_select_keeps_none_beside_what_it_keeps():
    comparisons = expanded("workload.beams=[1, 3]")
    kept = select(comparisons, "*-b3-*/lora-*")
    assert [case.arm for comparison in kept for case in comparison.cases] == ["none", "lora"]
    assert [comparison.workload.beams for comparison in kept] == [3]
    assert select(comparisons, "*") == comparisons
    assert [case.arm for case in select(comparisons, "*b1*/none-*")[0].cases] == ["none"]


def test_select_without_a_match_names_what_is_there():
    comparisons = expanded()
    prefix = "llama-tiny-fp32-cpu/transformers/p8-n4-b1-q3-t2-r2-distinct"
    with pytest.raises(ScenarioError) as caught:
        select(comparisons, f"{prefix}/lorra-eager")
    assert str(caught.value) == (
        f"--case {prefix}/lorra-eager: no case matches; there are {prefix}/lora-eager and 2 more (--dry-run lists all)"
    )
    with pytest.raises(ScenarioError) as caught:
        select(comparisons, "zzz")
    assert str(caught.value) == (
        f"--case zzz: no case matches; there are {prefix}/none-eager, {prefix}/lora-eager, "
        f"{prefix}/para-eager (--dry-run lists all)"
    )


def test_json_round_trip_is_exact():
    methods = (
        "methods=[{lora: {rank: 8, alpha: 16, modules: [q, v], label: small}}, fanlora, {ia3: {dim: 8}}, "
        "{ia3-original: {modules: [q, o], inputs: [o]}}, {road: {variant: road_2}}, para, peft, peft-single, "
        "{fanlora: {setting: [[q], [], [o, v]], label: found}}]"
    )
    for comparison in expanded(methods, "workload.tenant_mix=zipf", "workload.without_adapter=0.1"):
        again = from_json(json.loads(json.dumps(to_json(comparison))))
        assert isinstance(again, Comparison)
        assert again == comparison
        assert hash(again) == hash(comparison), "every list is a tuple again"
        assert [type(case.options) for case in again.cases] == [type(case.options) for case in comparison.cases]


def test_from_json_refuses_a_method_of_another_version():
    data = to_json(expanded()[0])
    data["cases"][1]["method"] = "lorra"
    with pytest.raises(ScenarioError, match="unknown method 'lorra'; did you mean 'lora'"):
        from_json(data)

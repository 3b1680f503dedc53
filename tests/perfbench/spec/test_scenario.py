"""Scenario files: what is accepted, what is refused and in which words, overrides, `--set`, the schema."""

# Messages are tested whole, one to a line.
# ruff: noqa: E501

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from perfbench.errors import BackboneError, ScenarioError
from perfbench.files.yaml_source import read
from perfbench.methods.dtypes import QUANTISATIONS
from perfbench.methods.registry import METHODS
from perfbench.spec.backbone_config import is_named
from perfbench.spec.cases import expand
from perfbench.spec.scenario import check_against_backbone, load, resolve
from perfbench.spec.scenario_schema import KERNELS, RUNTIMES, schema
from perfbench.spec.traffic import is_traffic

# But those of traffic, which tests/perfbench/spec/test_traffic.py reads.
SHIPPED = [
    path
    for path in sorted((Path(__file__).parents[3] / "scenarios").glob("*.yaml"))
    if not is_traffic(read(path).values)
]

# Line 3 has the methods, line 4 the workload, lines 5 to 8 its fields; what a test appends starts at line 9.
VALID = """\
backbone: llama-tiny
dtype: fp32
methods: [lora]
workload:
  prompt_tokens: 8
  new_tokens: 4
  requests: 3
  tenants: 2
"""


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def resolved(text, *sets, kind="cpu"):
    """The scenario of a file x.yaml with this text, checked against its backbone."""
    Path("x.yaml").write_text(text)
    scenario = resolve(load("x.yaml", sets), kind)
    check_against_backbone(scenario)
    return scenario


def refusal(text, *sets, kind="cpu"):
    """The message with which it is refused, which is one line."""
    with pytest.raises(ScenarioError) as caught:
        resolved(text, *sets, kind=kind)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    return message


# The shipped files.


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_scenario_is_valid_on_every_device_it_is_for(path):
    text = path.read_text()
    assert text.startswith("# ")
    assert f"#   perfbench run scenarios/{path.name}\n" in text, "the head comment shows the command"
    document = load(path)
    for kind in document.device_kinds:
        scenario = resolve(document, kind)
        if is_named(scenario.backbone):  # the sizes of a model of the hub are not known without it
            check_against_backbone(scenario)
        assert scenario.name == path.stem
        assert scenario.question.endswith("?")
        ids = [case.id for comparison in expand(scenario) for case in comparison.cases]
        assert ids
        assert len(set(ids)) == len(ids)


def test_these_scenarios_are_shipped():
    assert [path.stem for path in SHIPPED] == [
        "chat_turns",
        "compiled",
        "cpu_110m",
        "eager_vs_triton",
        "fanlora_table3",
        "gate",
        "mixed_methods",
        "multitenant",
        "para_table4",
        "quantised",
        "real_135m",
        "rivals",
        "shared_context",
        "smoke",
        "tenant_sweep",
        "verify_7b",
        "verify_corners",
        "verify_full",
    ]


def test_main_job_is_small_on_a_cpu_and_says_so():
    document = load(next(path for path in SHIPPED if path.stem == "multitenant"))
    gpu, cpu = resolve(document, "cuda"), resolve(document, "cpu", why="no CUDA device")
    assert (gpu.backbone, gpu.dtype, gpu.workload[0].beams) == (("llama2-7b",), ("bf16",), (1, 3))
    assert (cpu.backbone, cpu.dtype, cpu.workload[0].beams) == (("llama-256x8",), ("fp32",), (1,))
    assert gpu.repetitions == cpu.repetitions == 100
    left_out = "runtime static: without peft, peft-single, which it can't serve"
    assert gpu.notes == ("device auto -> cuda", left_out)
    assert cpu.notes[0] == "device auto -> cpu (no CUDA device)"
    assert cpu.notes[1].startswith("overrides.cpu: backbone llama2-7b -> llama-256x8, dtype bf16 -> fp32, ")


def test_cpu_110m_is_refused_on_a_gpu():
    document = load(next(path for path in SHIPPED if path.stem == "cpu_110m"))
    assert document.device_kinds == ("cpu",)
    with pytest.raises(ScenarioError, match="device: asks for cpu, but the device here is cuda"):
        resolve(document, "cuda")


# Defaults, axes and what a resolved scenario holds.


def test_defaults():
    scenario = resolved(VALID)
    assert (scenario.name, scenario.warmup, scenario.repetitions, scenario.seed) == ("x", 3, 100, 0)
    assert (scenario.isolation, scenario.paper, scenario.runtime) == ("shared", None, ("transformers",))
    assert scenario.kernels == ("eager",)
    assert [arm.label for arm in scenario.methods] == ["none", "lora"]
    (axes,) = scenario.workload
    assert (axes.beams, axes.resident, axes.tenant_mix) == ((1,), (None,), ("distinct",))
    assert axes.without_adapter == (0.0,)


def test_none_comes_first_wherever_it_is_listed():
    assert [arm.label for arm in resolved(VALID.replace("[lora]", "[lora, none]")).methods] == [
        "none",
        "lora",
    ]


def test_options_and_labels():
    methods = "[{lora: {rank: 8, alpha: 16, modules: [q, v], label: small}}, lora]"
    _, small, lora = resolved(VALID.replace("[lora]", methods)).methods
    assert (small.label, small.method) == ("small", "lora")
    assert small.options == METHODS["lora"].options(rank=8, alpha=16.0, modules=("q", "v"))
    assert type(small.options.alpha) is float
    assert lora.options == METHODS["lora"].options()


def test_to_json_is_plain_data_without_where_it_was_written():
    scenario = resolved(VALID.replace("[lora]", "[{fanlora: {setting: [[q], [], [o, v]]}}]"))
    data = scenario.to_json()
    assert json.loads(json.dumps(data)) == data
    assert "source" not in data
    assert data["methods"][1]["options"]["setting"] == [["q"], [], ["o", "v"]]
    assert data["workload"][0]["requests"] == [3]


# YAML that is not a scenario.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "x.yaml: is empty; expected YAML"),
        ("# only a comment\n", "x.yaml: is empty; expected YAML"),
        ("- 1\n", "x.yaml:1: expected a mapping, got [1]"),
        ("seed: 1\nseed: 2\n", "x.yaml:2: malformed YAML: duplicate key 'seed', first at x.yaml:1; keep one of them"),
        ("a: &x [1]\nb: *x\n", "x.yaml:2: malformed YAML: alias *x is not supported; write the value out"),
        ("on: 1\n", "x.yaml:1: malformed YAML: expected a string as key, got 'on'; put it between quotes"),
        ("\nseed: .inf\n", "x.yaml:2: malformed YAML: expected a finite number, got .inf"),
        ("a: [1\nb: 2\n", "x.yaml:2: malformed YAML: while parsing a flow sequence expected ',' or ']', but got ':'"),
        ("[" * 5000, "x.yaml: malformed YAML: nested too deeply"),
    ],
)  # fmt: skip
def test_malformed_yaml(text, message):
    assert refusal(text) == message


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.getcwd []\n",
        "a: !!python/name:os.getcwd\n",
        "a: !!set {b}\n",
        "a: !mine {b: 1}\n",
        'a: "\x07"\n',
        f"a: {'9' * 5000}\n",
        "a: 2026-01-01\n",
        "--- 1\n--- 2\n",
        "? [a]\n: 1\n",
    ],
)
def test_more_malformed_yaml_is_refused_in_one_line(text):
    assert "malformed YAML" in refusal(text)


def test_billion_laughs_is_refused_before_it_grows():
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    assert "alias *a0 is not supported" in refusal("\n".join(lines))


def test_not_utf8():
    Path("x.yaml").write_bytes(b"# first\nname: \xff\n")
    with pytest.raises(ScenarioError, match=r"^x.yaml:2: expected UTF-8 text, got another byte at offset 14; save it"):
        load("x.yaml")


def test_a_character_that_yaml_forbids_has_its_line():
    Path("x.yaml").write_bytes(b"# first\r\nname: \x1b[31m\n")
    with pytest.raises(ScenarioError, match=r"^x.yaml:2: malformed YAML: unacceptable character #x001b"):
        load("x.yaml")


def test_not_a_file():
    Path("folder").mkdir()
    Path("multitenant.yaml").write_text(VALID)
    for path, message in {
        "folder": "folder: expected a scenario file, got a directory; name a .yaml file in it",
        "multitenent.yaml": "multitenent.yaml: no such file; did you mean 'multitenant.yaml'?",
        "folder/x.yaml": "folder/x.yaml: no such file; give the path of a .yaml file",
        "/dev/null": "/dev/null: expected a scenario file, got a device or pipe; name a .yaml file",
    }.items():
        with pytest.raises(ScenarioError) as caught:
            load(path)
        assert str(caught.value) == message


# Keys, names and types.


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("tenants: 2", "tenants: 0", "x.yaml:8: workload.tenants: expected an integer >= 1, got 0"),
        ("tenants: 2", "tenants: true", "x.yaml:8: workload.tenants: expected an integer >= 1, or a list of them, got true"),
        ("tenants: 2", "tenants: 2.0", "x.yaml:8: workload.tenants: expected an integer >= 1, or a list of them, got 2.0"),
        ("tenants: 2", "tenants: [1, x]", "x.yaml:8: workload.tenants.1: expected an integer >= 1, got 'x'"),
        ("tenants: 2", "tenants: [1, 1]", "x.yaml:8: workload.tenants: expected each value once, got [1, 1]"),
        ("tenants: 2", "tenants: []", "x.yaml:8: workload.tenants: expected at least one value, got []"),
        ("tenants: 2", "tennants: 2", "x.yaml:8: workload.tennants: unknown key 'tennants'; did you mean 'tenants'?"),
        ("  tenants: 2\n", "", "x.yaml:4: workload.tenants: is missing; expected an integer >= 1, or a list of them"),
        ("new_tokens: 4", "new_tokens: 1", "x.yaml:6: workload.new_tokens: expected an integer >= 2, got 1"),
        ("workload:", "worklod:", "x.yaml:4: worklod: unknown key 'worklod'; did you mean 'workload'?"),
        ("fp32", "fp23", "x.yaml:2: dtype: unknown dtype 'fp23'; did you mean 'fp32'?"),
        ("fp32", "3", "x.yaml:2: dtype: expected one of fp32, bf16, fp16, or a list of them, got 3"),
        ("[lora]", "[lorra]", "x.yaml:3: methods.0: unknown method 'lorra'; did you mean 'lora'?"),
        ("[lora]", "[{lorra: {}}]", "x.yaml:3: methods.0.lorra: unknown method 'lorra'; did you mean 'lora'?"),
        ("[lora]", "[]", "x.yaml:3: methods: expected at least one value, got []"),
        ("[lora]", "[mixed: {of: [lora]}]", 'x.yaml:3: methods.0.mixed.of: expected at least 2 values, got ["lora"]'),
        (
            "[lora]",
            "[mixed: {of: [lora, parra]}]",
            "x.yaml:3: methods.0.mixed: of: expected methods that a bank serves, got 'parra'; did you mean 'para'?",
        ),
        (
            "[lora]",
            "[mixed: {of: [lora, peft]}]",
            "x.yaml:3: methods.0.mixed: of: expected methods that a bank serves, got 'peft'; known: "
            "alora, dora, fanlora, ia3, ia3-original, lora, miss, para, road, vera",
        ),
        (
            "[lora]",
            "[converted: {of: rod}]",
            "x.yaml:3: methods.0.converted: of: expected a method that changes weights, got 'rod'; did you mean 'road'?",
        ),
        ("[lora]", "lora", "x.yaml:3: methods: expected a list, got 'lora'"),
        ("[lora]", "\n  - lora\n  - ia3: {dim: 0}", "x.yaml:5: methods.1.ia3.dim: expected an integer from 1 to 1024, got 0"),
        ("[lora]", "[{lora: {rnk: 4}}]", "x.yaml:3: methods.0.lora.rnk: unknown key 'rnk'; did you mean 'rank'?"),
        ("[lora]", "[{lora: {rank: 1025}}]", "x.yaml:3: methods.0.lora.rank: expected an integer from 1 to 1024, got 1025"),
        ("[lora]", "[{lora: {alpha: 0}}]", "x.yaml:3: methods.0.lora.alpha: expected a number > 0 or null, got 0"),
        ("[lora]", "[{lora: {modules: [gat]}}]", "x.yaml:3: methods.0.lora.modules.0: unknown module 'gat'; did you mean 'gate'?"),
        ("[lora]", "[{lora: {}, ia3: {}}]", 'x.yaml:3: methods.0: expected exactly one method, got {"lora": {}, "ia3": {}}; give each its own item'),
        ("[lora]", "[lora, lora]", "x.yaml:3: methods.1: the label 'lora' is that of methods.0 already; give it another, such as {lora: {label: lora-2}}"),
        ("[lora]", "[{lora: {label: none}}]", "x.yaml:3: methods.0: the label 'none' is the bare backbone's; choose another"),
        ("[lora]", "[{para: {pool: residul}}]", "x.yaml:3: methods.0.para.pool: unknown pool 'residul'; did you mean 'residual'?"),
    ],
)  # fmt: skip
def test_wrong_key_name_or_type(old, new, message):
    assert old in VALID
    assert refusal(VALID.replace(old, new)) == message


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("quesion: why", "x.yaml:9: quesion: unknown key 'quesion'; did you mean 'question'?"),
        ("isolation: share", "x.yaml:9: isolation: unknown isolation 'share'; did you mean 'shared'?"),
        ("runtime: transformer", "x.yaml:9: runtime: unknown runtime 'transformer'; did you mean 'transformers'?"),
        ("quantisation: int4", "x.yaml:9: quantisation: unknown quantisation 'int4'; did you mean 'int8'?"),
        ("kernels: eagre", "x.yaml:9: kernels: unknown kernels 'eagre'; did you mean 'eager'?"),
        ("paper: para_table3", "x.yaml:9: paper: unknown paper 'para_table3'; did you mean 'para_table4'?"),
        ("warmup: 0", "x.yaml:9: warmup: expected an integer >= 1, got 0"),
        ("repetitions: 0", "x.yaml:9: repetitions: expected an integer >= 1, got 0"),
        ("seed: -1", "x.yaml:9: seed: expected an integer from 0 to 4294967295, got -1"),
        ("overrides: {gpu: {}}", "x.yaml:9: overrides.gpu: unknown key 'gpu'; did you mean 'cpu'?"),
        ("overrides: {cuda: {workload: {beams: 0}}}", "x.yaml:9: overrides.cuda.workload.beams: expected an integer >= 1, got 0"),
    ],
)  # fmt: skip
def test_wrong_field_at_the_end(line, message):
    """The last of them: an override is checked on every machine, not only where it is used."""
    assert refusal(f"{VALID}{line}\n") == message


def test_a_key_with_a_line_break_still_makes_one_line():
    assert refusal(f'{VALID}"a\\nb": 1\n').startswith("x.yaml:9: a b: unknown key 'a\\nb'; known: ")


# Combinations.


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("  resident: 1", "x.yaml:9: workload.resident: more tenants than the bank's capacity: resident 1 with tenants 2; raise resident or lower tenants"),
        ("  resident: [4, 1]", "x.yaml:9: workload.resident: more tenants than the bank's capacity: resident 1 with tenants 2; raise resident or lower tenants"),
        ("  zipf_exponent: 1.5", "x.yaml:9: workload.zipf_exponent: expected only with tenant_mix zipf, got distinct; remove it, or choose zipf"),
        ("  without_adapter: 1.5", "x.yaml:9: workload.without_adapter: expected a number from 0 to 1, got 1.5"),
        ("  beams: 129", "x.yaml:9: workload.beams: expected at most 128, half the vocabulary of llama-tiny, got 129; lower it"),
        ("  beams: 0", "x.yaml:9: workload.beams: expected an integer >= 1, got 0"),
        ("  prompts: nope.txt", "x.yaml:9: workload.prompts: no such file 'nope.txt', neither in the current folder nor in ."),
        ("  prompts: nope.csv", "x.yaml:9: workload.prompts: expected the path of a .txt or .jsonl file, got 'nope.csv'"),
        ("  follow_up_tokens: 4", "x.yaml:9: workload.follow_up_tokens: a second turn needs runtime static, the others read everything again; choose runtime static alone"),
        ("  follow_up_tokens: 4\n  beams: 2\nruntime: static", "x.yaml:9: workload.follow_up_tokens: a second turn follows greedy search only; choose beams 1"),
        ("  follow_up_tokens: 4\nruntime: [static, continuous]", "x.yaml:9: workload.follow_up_tokens: a second turn needs runtime static, the others read everything again; choose runtime static alone"),
        ("  beams: [1, 3]\nruntime: [static, continuous]", "x.yaml:9: workload.beams: runtime continuous has no beams; choose beams 1, or leave that runtime out"),
        ("  own_tokens: 8", "x.yaml:9: workload.own_tokens: expected fewer than the 8 prompt_tokens, the others being shared, got 8; lower it"),
        ("  own_tokens: 4\nruntime: continuous", "x.yaml:9: workload.own_tokens: runtime continuous reads every prompt by itself; choose static or transformers"),
        ("  own_tokens: 4\n  follow_up_tokens: 4\nruntime: static", "x.yaml:9: workload.own_tokens: a shared context has one turn; leave follow_up_tokens out"),
        ("  own_tokens: 4\n  prompts: p.txt", "x.yaml:9: workload.own_tokens: prompts of a file share nothing; leave own_tokens out, or choose random prompts by prompt_tokens"),
        ("device: cuda", "x.yaml:9: device: asks for cuda, but the device here is cpu; choose auto or cpu"),
    ],
)  # fmt: skip
def test_impossible_combination(lines, message):
    assert refusal(f"{VALID}{lines}\n") == message


def test_a_second_turn_counts_for_the_context():
    text = VALID + "  follow_up_tokens: 600\nruntime: static\n"
    assert "8 of the prompt + 4 new ones + 604 of the second turn; lower one of them" in refusal(text)


def test_the_pair_of_lists_that_does_not_fit_is_named():
    text = VALID.replace("tenants: 2", "tenants: [2, 8]") + "  resident: [16, 4]\n"
    assert "resident 4 with tenants 8" in refusal(text)
    (axes,) = resolved(text.replace("[16, 4]", "[16, 8]")).workload
    assert axes.resident == (16, 8)


def test_neither_random_nor_real_prompts():
    assert refusal(VALID.replace("  prompt_tokens: 8\n", "")) == (
        "x.yaml:4: workload: expected prompt_tokens (random prompts) or prompts (a file of real ones), got neither"
    )


def test_fp16_only_on_a_gpu():
    text = VALID.replace("fp32", "fp16")
    assert refusal(text) == (
        "x.yaml:2: dtype: fp16 on the CPU is slow and partly unsupported by torch; choose bf16 or fp32"
    )
    assert resolved(text, kind="cuda").dtype == ("fp16",)


def test_context_is_the_exact_bound():
    assert resolved(VALID.replace("prompt_tokens: 8", "prompt_tokens: 508")).workload[0].prompt_tokens == (508,)
    assert refusal(VALID.replace("prompt_tokens: 8", "prompt_tokens: [8, 509]")) == (
        "x.yaml:5: workload.prompt_tokens: expected at most 512 tokens, the context of llama-tiny, "
        "got 509 of the prompt + 4 new ones; lower one of them"
    )


def test_every_backbone_of_the_axis_and_every_workload_of_the_list_is_checked():
    text = VALID.replace("backbone: llama-tiny", "backbone: [llama-256x8, llama-tiny]")
    assert "the context of llama-tiny" in refusal(text.replace("prompt_tokens: 8", "prompt_tokens: 600"))
    assert resolved(text, "workload.prompt_tokens=600", "backbone=llama-256x8").backbone == ("llama-256x8",)
    listed = VALID[: VALID.index("workload:")] + (
        "workload:\n"
        "  - {prompt_tokens: 8, new_tokens: 4, requests: 1, tenants: 1}\n"
        "  - {prompt_tokens: 8, new_tokens: 505, requests: 1, tenants: 1}\n"
    )
    assert refusal(listed).startswith("x.yaml:6: workload.1.prompt_tokens: expected at most 512 tokens")


def test_unknown_backbone_is_refused_by_the_backbone_check():
    with pytest.raises(BackboneError, match="did you mean 'llama-tiny'"):
        resolved(VALID.replace("llama-tiny", "llama-tinny"))


def test_real_prompts_need_a_tokenizer():
    Path("p.txt").write_text("Once upon a time\n")
    assert refusal(VALID + "  prompts: p.txt\n") == (
        "x.yaml:9: workload.prompts: llama-tiny is a named shape, which has no tokenizer; "
        "use prompt_tokens alone, or a backbone with real weights"
    )


def test_real_prompts_on_a_real_checkpoint(stories260k):
    Path("p.txt").write_text("Once upon a time\n")
    text = VALID.replace("llama-tiny", json.dumps(str(stories260k))).replace("prompt_tokens: 8", "prompts: p.txt")
    (axes,) = resolved(text).workload
    assert (axes.prompts, axes.prompt_tokens) == ("p.txt", (None,))


def test_files_are_found_beside_the_scenario_unless_the_current_folder_has_them(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "p.txt").write_text("a\n")
    (tmp_path / "deep" / "x.yaml").write_text(VALID + "  prompts: p.txt\n")
    assert resolve(load("deep/x.yaml"), "cpu").workload[0].prompts == "deep/p.txt"
    Path("p.txt").write_text("b\n")
    assert resolve(load("deep/x.yaml"), "cpu").workload[0].prompts == "p.txt"


def test_zipf_default_and_mixed_axis():
    assert resolved(VALID + "  tenant_mix: zipf\n").workload[0].zipf_exponent == (1.1,)
    (axes,) = resolved(VALID + "  tenant_mix: [uniform, zipf]\n  zipf_exponent: [1, 1.5]\n").workload
    assert axes.zipf_exponent == (1.0, 1.5)


# FanLoRA's setting.


def test_setting_is_read_from_a_json_file():
    Path("found.json").write_text('{"layers": [["q", "v"], [], ["up"]], "score": 1}')
    _, arm = resolved(VALID.replace("[lora]", "[{fanlora: {setting: found.json}}]")).methods
    assert arm.options.setting == (("q", "v"), (), ("up",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"layers": [["q"], ["qq"], []]}', "found.json: layers.1.0: unknown module 'qq'; did you mean 'q'?"),
        ('{"layers": 3}', "found.json: layers: expected a list, got 3"),
        (
            '{"layers": [["q", "q"], [], []]}',
            'found.json: layers.0: expected each value once, got ["q", "q"]',
        ),
        ('{"layers": [[], [], []]}', "expected at least one module in some layer, got none"),
        ('{"layer": []}', "found.json: expected a JSON object with the key 'layers'"),
        ("[", "found.json: expected a JSON file, can't read it: Expecting value: line 1 column 2 (char 1)"),
    ],
)
def test_bad_setting_file(content, message):
    Path("found.json").write_text(content)
    said = refusal(VALID.replace("[lora]", "[{fanlora: {setting: found.json}}]"))
    assert said == f"x.yaml:3: methods.0.fanlora.setting: {message}"


def test_setting_has_a_list_for_each_layer():
    assert refusal(VALID.replace("[lora]", "[{fanlora: {setting: [[q], []]}}]")) == (
        "x.yaml:3: methods: llama-tiny: arm 'fanlora': the setting has 2 layers, the backbone 3"
    )


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("miss: {rank: 1000}", "arm 'miss': rank 1000: q has 64 inputs, expected at least as many"),
        ("converted: {rank: 65}", "arm 'converted': rank 65: expected at most 64, the smaller side of q's weight"),
        ("road: {group_size: 10}", "arm 'road': group_size 10: q has 64 outputs, no multiple of it"),
    ],
)
def test_options_that_the_backbone_excludes_are_refused(arm: str, message: str) -> None:
    """They were found on the device only, and reported as a fault of perfbench."""
    assert refusal(VALID.replace("[lora]", f"[{{{arm}}}]")) == f"x.yaml:3: methods: llama-tiny: {message}"


def test_adapters_must_be_a_folder():
    text = VALID.replace("[lora]", "[{lora: {adapters: tenants}}]")
    assert refusal(text) == (
        "x.yaml:3: methods.0.lora.adapters: no such folder 'tenants', neither in the current folder nor in ."
    )
    Path("tenants").mkdir()
    assert resolved(text).methods[1].options.adapters == "tenants"


# Overrides and --set.

OVERRIDDEN = VALID + "overrides:\n  cpu:\n    seed: 7\n    workload:\n      tenants: 9\n  cuda: {dtype: bf16}\n"


def test_overrides_merge_mappings_and_replace_the_rest():
    cpu, cuda = resolved(OVERRIDDEN), resolved(OVERRIDDEN, kind="cuda")
    assert (cpu.seed, cpu.workload[0].tenants, cpu.workload[0].requests, cpu.dtype) == (
        7,
        (9,),
        (3,),
        ("fp32",),
    )
    assert (cuda.seed, cuda.workload[0].tenants, cuda.dtype) == (0, (2,), ("bf16",))
    assert cpu.notes == ("device auto -> cpu", "overrides.cpu: seed -> 7, workload.tenants 2 -> 9")
    listed = VALID + "overrides: {cpu: {methods: [ia3]}}\n"
    assert [arm.label for arm in resolved(listed).methods] == ["none", "ia3"]


def test_an_error_that_an_override_makes_has_the_line_of_the_override():
    text = OVERRIDDEN.replace("      tenants: 9\n", "      tenants: 9\n      resident: 3\n")
    assert refusal(text).startswith("x.yaml:14: workload.resident: more tenants than the bank's capacity")


def test_set_wins_over_file_and_override_and_says_so():
    scenario = resolved(OVERRIDDEN, "workload.tenants=4", "methods=[para]", "workload.beams=[1, 3]")
    assert scenario.workload[0].tenants == (4,)
    assert scenario.workload[0].beams == (1, 3)
    assert [arm.label for arm in scenario.methods] == ["none", "para"]
    assert scenario.notes[2] == "--set workload.tenants=4: workload.tenants 9 -> 4"


def test_resolving_twice_gives_the_same():
    Path("x.yaml").write_text(OVERRIDDEN)
    document = load("x.yaml", ["workload.tenants=4"])
    assert resolve(document, "cpu") == resolve(document, "cpu")
    assert resolve(document, "cuda").dtype == ("bf16",)


def test_set_device_decides_which_override_applies():
    Path("x.yaml").write_text(OVERRIDDEN)
    document = load("x.yaml", ["device=cuda"])
    assert (document.device, document.device_kinds) == ("cuda", ("cuda",))
    scenario = resolve(document, "cuda")
    assert (scenario.device, scenario.dtype) == ("cuda", ("bf16",))
    assert scenario.notes[0] == "--set device=cuda: device -> cuda"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("workload.tenants=0", "expected an integer >= 1, got 0"),
        ("workload.tenants=true", "expected an integer >= 1, or a list of them, got true"),
        ("worklod.tenants=3", "worklod: unknown key 'worklod'; did you mean 'workload'?"),
        ("workload.tenant=3", "unknown key 'tenant'; did you mean 'tenants'?"),
        ("workload.resident=1", "more tenants than the bank's capacity: resident 1 with tenants 2; raise resident or lower tenants"),
        ("workload", "expected key=value, such as workload.tenants=4"),
        ("=3", "expected key=value, such as workload.tenants=4"),
        ("seed=", "expected key=value, such as workload.tenants=4"),
        ("workload..tenants=1", "expected key=value, such as workload.tenants=4"),
        ("seed=[", "malformed YAML: while parsing a flow node expected the node content, but found '<stream end>'"),
        ("methods.0={lora: {rank: 0}}", "methods.0.lora.rank: expected an integer from 1 to 1024, got 0"),
        ("methods.1=lora", "methods is a list of 1: expected methods.0 to methods.0, got methods.1"),
        ("methods.0.lora.rank=2", "methods.0 is 'lora', which has no 'lora'; set methods.0 whole"),
        ("overrides.cpu.seed=3", "can't be set; set the field itself, which wins over every override"),
        ("device=gpu", "unknown device 'gpu'; did you mean 'cpu'?"),
        ("repetitions=1e3", "expected an integer >= 1, got '1e3'"),
    ],
)  # fmt: skip
def test_bad_set(text, message):
    assert refusal(VALID, text) == f"--set {text}: {message}"


def test_a_set_that_contradicts_the_file_is_the_one_that_is_named():
    said = refusal(VALID + "  resident: 4\n", "workload.tenants=8")
    assert said.startswith("--set workload.tenants=8: more tenants than the bank's capacity: resident 4 with tenants 8")


def test_set_reaches_into_lists():
    scenario = resolved(VALID.replace("[lora]", "[{lora: {rank: 8}}, ia3]"), "methods.0.lora.rank=2")
    assert scenario.methods[1].options.rank == 2


# The schema itself.


def test_schema_is_a_valid_schema_and_plain_json():
    Draft202012Validator.check_schema(schema())
    assert json.loads(json.dumps(schema())) == schema()


def test_every_field_is_described():
    def undescribed(properties):
        return [name for name, schema in properties.items() if not schema.get("description")]

    workload = schema()["properties"]["workload"]["anyOf"][0]["properties"]
    assert undescribed(schema()["properties"]) == []
    assert undescribed(workload) == []


@pytest.mark.parametrize("method", METHODS)
def test_the_registrys_defaults_pass_the_schema(method):
    default = json.loads(json.dumps(vars(METHODS[method].options())))
    text = VALID.replace("[lora]", json.dumps([{method: default}]))
    assert resolved(text).methods[-1].options == METHODS[method].options()


def test_axes_of_the_schema_are_the_tables():
    for name, table in {"runtime": RUNTIMES, "kernels": KERNELS, "quantisation": QUANTISATIONS}.items():
        assert schema()["properties"][name]["anyOf"][0]["enum"] == list(table)


def test_no_torch_is_imported():
    code = "import sys, perfbench.spec.scenario, perfbench.spec.cases; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

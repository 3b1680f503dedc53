"""A method that a stranger adds, in one file, is everywhere: and a bad one is told of in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from perfbench import exit_codes
from perfbench.cli import main
from perfbench.errors import PerfbenchError
from perfbench.methods.registry import METHODS
from perfbench.spec import method_plugins

pytestmark = pytest.mark.usefixtures("own_methods")

PLUGIN = Path(__file__).parent / "plugins" / "qv_pairs.py"
SCENARIO = """
backbone: llama-tiny
dtype: fp32
device: cpu
methods: [{qv-pairs: {rank: 3, where: v}}]
workload: {prompt_tokens: 8, new_tokens: 4, requests: 3, tenants: 2}
warmup: 1
repetitions: 1
"""


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    path = tmp_path / "qv.yaml"
    path.write_text(SCENARIO)
    return path


def say(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What the command prints, which has to end well, with the plugin."""
    code = main([*map(str, arguments), "--plugin", str(PLUGIN)])
    said = capsys.readouterr()
    assert code == exit_codes.OK, said.err
    return said.out


def test_it_is_in_validate_list_params_and_the_schema(
    capsys: pytest.CaptureFixture[str], scenario: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    assert say(capsys, "validate", scenario).strip().endswith("ok, 2 cases on cpu")
    listed = say(capsys, "list", "qv-pairs")
    assert listed.count("low-rank pairs on Q and V") == 2, "as a method, and as one that can be trained"
    (row,) = [line for line in say(capsys, "params", "llama2-7b").splitlines() if "qv-pairs" in line]
    count = 32 * 2 * 2 * (4096 + 4096)
    assert f"{count:,}" in row
    assert f"{count * 2 / 2**20:.2f}" in row
    schema = json.loads(say(capsys, "validate", "--schema"))
    options = schema["properties"]["methods"]["items"]["anyOf"][1]["properties"]["qv-pairs"]["properties"]
    assert options["rank"] == {"type": "integer", "minimum": 1, "description": "rank of the pairs", "default": 2}
    assert options["where"]["enum"] == ["both", "q", "v"]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("{rank: 0}", "methods.0.qv-pairs.rank: expected an integer >= 1, got 0"),
        ("{rank: two}", "methods.0.qv-pairs.rank: expected an integer >= 1, got 'two'"),
        ("{where: w}", "methods.0.qv-pairs.where: unknown where 'w'; known: both, q, v"),
        ("{ranks: 1}", "unknown key 'ranks'; did you mean 'rank'?"),
    ],
)
def test_its_options_are_checked_by_its_dataclass(
    capsys: pytest.CaptureFixture[str], scenario: Path, options: str, told: str
) -> None:
    scenario.write_text(SCENARIO.replace("{rank: 3, where: v}", options))
    assert main(["validate", str(scenario), "--plugin", str(PLUGIN)]) == exit_codes.BAD_INPUT
    assert told in capsys.readouterr().err


def test_it_is_measured_and_recorded(capsys: pytest.CaptureFixture[str], scenario: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "qv-pairs" in say(capsys, "run", scenario, "--out", out)
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["plugins"] == [
        {"source": str(PLUGIN), "methods": ["qv-pairs"], "sha256": method_plugins.as_json()[0]["sha256"]}
    ]
    assert {case["method"]: case["status"] for case in manifest["cases"].values()} == {"none": "ok", "qv-pairs": "ok"}
    # A run goes on with the same plugin only.
    assert say(capsys, "run", scenario, "--out", out, "--resume")
    manifest["plugins"][0]["sha256"] = "0" * 64
    (out / "run.json").write_text(json.dumps(manifest))
    assert main(["run", str(scenario), "--plugin", str(PLUGIN), "--out", str(out), "--resume"]) == exit_codes.BAD_INPUT
    assert "holds a run of other plugins" in capsys.readouterr().err


def test_a_child_refuses_a_plugin_that_was_changed(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(PLUGIN.read_text())
    method_plugins.load([file])
    told = method_plugins.as_json()
    told[0]["sha256"] = "0" * 64
    with pytest.raises(PerfbenchError, match=r"mine\.py: it was changed while the command ran"):
        method_plugins.load_again(told)


def test_a_child_of_a_command_without_plugins_reads_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(method_plugins, "entry_points", lambda group: [EntryPoint("mine", "no_such:X", group)])
    method_plugins.load_again([])
    assert method_plugins.as_json() == []


def test_it_keeps_the_contract_and_a_fault_in_it_is_seen(tmp_path: Path) -> None:
    from perfbench import testing

    testing.check_method("qv-pairs", plugin=PLUGIN)
    for name, planted, told in FAULTS:
        file = tmp_path / f"{name}.py"
        file.write_text(f"{PLUGIN.read_text()}\n{planted}\nMETHODS = {{'{name}': METHODS['qv-pairs']}}\n")
        with pytest.raises(AssertionError, match=told):
            testing.check_method(name, plugin=file)


# Name -> what is appended to the plugin, and what the contract says of it.
FAULTS = (
    ("empty", "def shapes(shape, options): return {}", "expected parameters, got none"),
    (
        "grows",
        "from perfbench.methods.sizes import Sized\n"
        "def plan(parameters, shape, options):\n"
        "    real = not isinstance(next(iter(parameters.values())), Sized)\n"
        "    return lora.plan(parameters, shape, LoraOptions())[real:]",
        "served_count gives .* numbers, the plan holds",
    ),
    ("default", "Options.__dataclass_fields__['rank'].metadata = {'minimum': 3}", "a default is refused"),
    ("seedless", "def randomise(name, tensor, generator): tensor.fill_(0.5)", "two seeds gave one adapter"),
    ("start", "def initialise(name, tensor, generator): tensor.fill_(0.1)", "initial values change"),
    (
        "unread",
        "def load(folder, shape, options): return plan(dict.fromkeys(()), shape, options)",
        "layer 0 read from a folder is not what was saved",
    ),
    (
        "untrained",
        "def shapes(shape, options): return lora.shapes_of((('q',),) * shape.layers, options.rank, shape)",
        "parameters are trained, shapes give",
    ),
)


def test_a_method_without_trained_by_says_so(tmp_path: Path) -> None:
    from perfbench.errors import FinetuneError
    from perfbench.finetune import trained

    file = tmp_path / "untrained.py"
    file.write_text(PLUGIN.read_text().replace(", trained_by=LOW_RANK", ""))
    method_plugins.load([file])
    with pytest.raises(FinetuneError, match="qv-pairs can't be trained: its line in the table of methods has no"):
        trained.find("qv-pairs")


METHOD = "from perfbench.methods.registry import METHODS as OWN, Method\n"
BAD = {
    "a folder": (None, "no such file"),
    "nothing": ("x = 1\n", "expected METHODS, a dict of name -> Method, in the file, got none"),
    "a list": ("METHODS = [1]\n", "got list"),
    "perfbench's own table": ("from perfbench.methods.registry import METHODS\n", "got perfbench's own table"),
    "no Method": ("METHODS = {'mine': 3}\n", "method 'mine': expected a perfbench.methods.registry.Method, got int"),
    "taken": (f"{METHOD}METHODS = {{'lora': Method(__name__, 'x')}}\n", "method 'lora': the name is taken"),
    "no name": (f"{METHOD}METHODS = {{'a b': Method(__name__, 'x')}}\n", "method 'a b': expected a name of at most 40"),
    "no function": (f"{METHOD}METHODS = {{'mine': Method(__name__, 'x')}}\n", "expected the function shapes, got none"),
    "no module": (f"{METHOD}METHODS = {{'mine': Method('no.such', 'x')}}\n", "raised ModuleNotFoundError: No module"),
    "raises": ("raise RuntimeError('two\\nlines')\n", "raised RuntimeError: two lines"),
    "leaves": ("import sys\nsys.exit(0)\n", "raised SystemExit: 0"),
    "no Python": ("METHODS = {\n", "raised SyntaxError"),
    "no options": (
        f"{METHOD}from perfbench.methods.lora import shapes, initialise, randomise, plan, save, load\n"
        "METHODS = {'mine': Method(__name__, 'x')}\n",
        "expected Options, a dataclass that extends MethodOptions, got None",
    ),
    "an option of no type": (
        PLUGIN.read_text().replace("alpha: float | None = None", "alpha: object = None"),
        "raised TypeError: Options.alpha: expected int, float, bool, str, None",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_bad_plugin_is_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, fault: str) -> None:
    text, told = BAD[fault]
    file = tmp_path / "bad.py"
    if text is not None:
        file.write_text(text)
    before = dict(METHODS)
    assert main(["list", "--plugin", str(file)]) == exit_codes.BAD_INPUT
    said = capsys.readouterr().err
    assert told in said
    assert str(file) in said
    assert said.count("\n") == 1
    assert before == METHODS
    assert not [name for name in sys.modules if name.startswith("perfbench_plugin_bad")]


def test_an_installed_package_adds_one(tmp_path: Path) -> None:
    """As pip installs it: a module, and a folder of metadata with the entry point."""
    (tmp_path / "their_method.py").write_text(f"{PLUGIN.read_text()}\nTHEIRS = METHODS['qv-pairs']\n")
    info = tmp_path / "their_package-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[perfbench.methods]\ntheirs = their_method:THEIRS\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}

    def listed() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "perfbench", "list", "theirs"]
        return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)

    assert "low-rank pairs on Q and V" in listed().stdout
    (info / "entry_points.txt").write_text("[perfbench.methods]\nlora = their_method:THEIRS\n")
    assert listed().returncode == exit_codes.BAD_INPUT
    assert "plugin their_method:THEIRS (entry point 'lora' of perfbench.methods): method 'lora'" in listed().stderr


def test_an_entry_point_that_can_t_be_read_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("mine", "no_such_module:X", method_plugins.GROUP)
    monkeypatch.setattr(method_plugins, "entry_points", lambda group: [point])
    with pytest.raises(PerfbenchError, match=r"plugin no_such_module:X .* raised ModuleNotFoundError"):
        method_plugins.load()

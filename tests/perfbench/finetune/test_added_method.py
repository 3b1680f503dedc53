"""A method that a stranger adds in one file is trained by PEFT where its line says how, and then served."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from perfbench import exit_codes
from perfbench.cli import main
from tests.perfbench.test_added_method import PLUGIN, SCENARIO


@pytest.mark.usefixtures("own_methods")
def test_it_is_trained_and_served(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny_llama: Path, sums: Path
) -> None:
    config, scenario, out = tmp_path / "train.yaml", tmp_path / "serve.yaml", tmp_path / "trained"
    config.write_text(
        f"backbone: {tiny_llama}\nmethod: {{qv-pairs: {{rank: 2}}}}\ntask: {{name: own, source: {sums}}}\n"
        "seeds: [0]\nepochs: 1\nmax_tokens: 64\ndevice: cpu\n"
    )
    code = main(["finetune", str(config), "--out", str(out), "--plugin", str(PLUGIN)])
    said = capsys.readouterr()
    assert code == exit_codes.OK, said.err
    manifest = json.loads((out / "run.json").read_text())
    assert manifest["seeds"]["0"]["trainable_parameters"] == 2 * 2 * ((32 + 32) + (32 + 16))
    assert [plugin["source"] for plugin in manifest["plugins"]] == [str(PLUGIN)]
    (adapter,) = {path.parent for path in out.rglob("adapter_model.safetensors") if "checkpoint" not in str(path)}
    scenario.write_text(
        SCENARIO.replace("llama-tiny", str(tiny_llama))
        .replace("{rank: 3, where: v}", f"{{adapters: {adapter}}}")
        .replace("tenants: 2", "tenants: 1")
    )
    code = main(["run", str(scenario), "--out", str(tmp_path / "served"), "--plugin", str(PLUGIN)])
    said = capsys.readouterr()
    assert code == exit_codes.OK, said.err
    assert "qv-pairs" in said.out

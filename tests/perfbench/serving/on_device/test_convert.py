"""One adapter's folder as LoRA of a rank."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from perfbench.cli import main
from perfbench.measure.on_device import conversion
from perfbench.methods import lora, parameters
from perfbench.methods.lora import LoraOptions
from perfbench.methods.registry import METHODS
from perfbench.runtimes import backbone as backbones
from tests.perfbench.serving.running import VALUES


def exported(folder: Path, method: str) -> Path:
    """A random adapter of llama-tiny."""
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump({**VALUES, "methods": [method]}))
    assert main(["export", str(file), "--tenants", "1", "--out", str(folder / "of")]) == 0
    return folder / "of" / "tenant-0"


@pytest.mark.parametrize(("method", "rank", "most"), [("miss", 16, 0.001), ("lora", 4, 0.001), ("road", 16, 1.0)])
def test_the_folder_is_the_nearest_lora(
    method: str, rank: int, most: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MiSS and LoRA lose nothing at their own rank, rotations most; what is said is what the folder has lost."""
    adapter, out = exported(tmp_path, method), tmp_path / "as-lora"
    assert main(["convert", str(adapter), "--rank", str(rank), "--out", str(out)]) == 0
    said = float(re.search(r"lost ([\d.]+)%", capsys.readouterr().err)[1]) / 100  # type: ignore[index]
    base = backbones.load("llama-tiny", "fp32", "cpu", 0)
    source = parameters.implementation(method).load(adapter, base.shape, METHODS[method].options())
    found = lora.load(out, base.shape, LoraOptions())
    lost = conversion.lost(source, found, base)
    assert sum(lost.values()) / len(lost) == pytest.approx(said, abs=6e-4)
    assert max(lost.values()) <= most
    assert (said > 0.3) == (method == "road")
    assert {pair.a.shape[0] for layer in found for pair in layer.low_rank.values()} == {rank}
    assert all(torch.isfinite(pair.b).all() for layer in found for pair in layer.low_rank.values())


def test_what_can_not_be_converted_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    para = exported(tmp_path, "para")
    assert main(["convert", str(para), "--rank", "4", "--out", str(tmp_path / "out")]) == 2
    assert "expected an adapter that changes weights, the same for all tokens, got method para" in said(capsys)
    (tmp_path / "other").mkdir()
    adapter = exported(tmp_path / "other", "road")
    assert main(["convert", str(adapter), "--rank", "4", "--out", str(adapter)]) == 2
    assert "expected a new or empty folder" in said(capsys)
    assert main(["convert", str(adapter), "--rank", "4000", "--out", str(tmp_path / "out")]) == 2
    assert "rank 4000: expected at most" in said(capsys)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    assert main(["convert", str(adapter), "--rank", "4", "--out", str(tmp_path / "out")]) == 2
    assert "names no backbone; say it with --backbone" in said(capsys)
    assert not (tmp_path / "out").exists()


def said(capsys: pytest.CaptureFixture[str]) -> str:
    return capsys.readouterr().err.splitlines()[-1]

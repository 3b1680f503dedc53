"""A scenario's adapters as folders: the very ones that its tenants have."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from perfbench.cli import main
from perfbench.measure.on_device import arms
from perfbench.methods import parameters
from perfbench.runtimes import backbone as backbones
from perfbench.serving.choice import chosen
from tests.perfbench.serving.running import VALUES, scenario


@pytest.mark.parametrize("method", ["lora", "converted"])
def test_what_is_exported_is_what_is_served(method: str, tmp_path: Path) -> None:
    file, out = tmp_path / "tiny.yaml", tmp_path / "adapters"
    file.write_text(yaml.safe_dump({**VALUES, "methods": [method]}))
    assert main(["export", str(file), "--method", method, "--tenants", "3", "--out", str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["tenant-0", "tenant-1", "tenant-2"]
    given = scenario(methods=[method])
    case = chosen(given, method)
    base = backbones.load("llama-tiny", "fp32", "cpu", given.common.seed)
    tokens = []
    for tenant in range(3):
        read = parameters.implementation(method).load(out / f"tenant-{tenant}", base.shape, case.options)
        own = arms.plan_of_tenant(case, base, 3, given.common.seed, tenant)
        pairs = [(a, b) for a, b in zip(tensors(read), tensors(own), strict=True)]
        assert all(torch.equal(a, b) for a, b in pairs)
        tokens.append(pairs[0][0])
    assert not torch.equal(tokens[0], tokens[1])


def tensors(plan: object) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    for layer in plan:  # type: ignore[attr-defined]
        layer.map(lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--method", "none"], "the bare backbone has no adapters"),
        (["--method", "lorra"], "the scenario has no 'lorra'; did you mean 'lora'?"),
    ],
)
def test_what_can_not_be_exported_is_one_line(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    assert main(["export", str(file), *arguments, "--out", str(tmp_path / "adapters")]) == 2
    assert says in capsys.readouterr().err


def test_a_folder_with_files_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(VALUES))
    assert main(["export", str(file), "--out", str(tmp_path)]) == 2
    assert "expected a new or empty folder" in capsys.readouterr().err

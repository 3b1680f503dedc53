"""The papers' (IA)3 as it is trained, with z and P in the folder: served alike, and refused where it is not whole."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from perfbench.errors import AdapterError
from perfbench.methods import ia3, parameters
from perfbench.methods.checkpoints import adapter_folder
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.ia3 import Ia3Options
from perfbench.methods.shape import BackboneShape
from perfbench.spec.backbone_config import find_config

TINY = BackboneShape.of_config(find_config("llama-tiny"))
OPTIONS = Ia3Options(dim=5)


def write(folder: Path) -> parameters.Parameters:
    values = parameters.make("ia3", TINY, OPTIONS, seed=3)
    tensors = {}
    for name, tensor in values.items():
        _, layer, module, kind = name.split(".")
        place = adapter_folder.module_name(int(layer), module)
        tensors[f"{adapter_folder.PEFT_PREFIX}{place}.projected_ia3_{kind}"] = tensor
    adapter_folder.write(folder, {"peft_type": "PROJECTED_IA3", "dim": OPTIONS.dim}, tensors)
    return values


def test_its_plan_is_that_of_its_parameters(tmp_path: Path) -> None:
    expected = ia3.plan(write(tmp_path), TINY, OPTIONS)
    # The folder's own dimension counts, not that of the options.
    for new, old in zip(ia3.load(tmp_path, TINY, Ia3Options()), expected, strict=True):
        assert new.scale_minus_one.keys() == old.scale_minus_one.keys()
        for module, scale in old.scale_minus_one.items():
            assert torch.equal(new.scale_minus_one[module], scale)


def _edit(edit: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS)

    return plant


def _config(**values: object) -> Callable[[Path], None]:
    def plant(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        (folder / CONFIG).write_text(json.dumps(config | values), encoding="utf-8")

    return plant


FAULTS: dict[str, tuple[Callable[[Path], None], str]] = {
    "a tensor less": (_edit(lambda t: t.pop(min(t))), "got no such tensor; the file is not whole"),
    "another width": (_edit(lambda t: t.update({min(t): t[min(t)][:, :-1].contiguous()})), "expected size"),
    "another module": (
        _edit(lambda t: t.update({min(t).replace("up_proj", "gate_proj"): torch.ones(5)})), "expected projected_ia3_z"
    ),
    "another name": (_edit(lambda t: t.update({min(t) + "x": torch.ones(5)})), "expected projected_ia3_z"),
    "dim": (_config(dim=0), "dim: expected an integer >= 1, got 0"),
    "another dim": (_config(dim=6), "expected size"),
    "type": (_config(peft_type="LORA"), "got 'LORA'"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_faulty_folder_is_refused_in_one_line_that_names_it(fault: str, tmp_path: Path) -> None:
    plant, message = FAULTS[fault]
    write(tmp_path)
    plant(tmp_path)
    with pytest.raises(AdapterError, match=message) as raised:
        ia3.load(tmp_path, TINY, OPTIONS)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)

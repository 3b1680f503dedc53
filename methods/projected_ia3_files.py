"""The papers' (IA)3 adapters as they are trained: PEFT's folder format with `peft_type` PROJECTED_IA3, z and P kept."""

from __future__ import annotations

from pathlib import Path

import torch

from perfbench.errors import AdapterError
from perfbench.methods import adapter_folder
from perfbench.methods.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.shape import BackboneShape

PEFT_TYPE = "PROJECTED_IA3"
TENSORS = ("z", "p")
_PREFIX = "projected_ia3_"


def load(folder: Path, shape: BackboneShape, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """`layers.<i>.<module>.z` [dim] and `.p` [dim, D_out] of every layer and each of `modules`. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, PEFT_TYPE)
    dim, path = config.get("dim"), folder / WEIGHTS
    if not isinstance(dim, int) or dim < 1:
        raise AdapterError(f"{folder / CONFIG}: dim: expected an integer >= 1, got {dim!r}")
    parameters = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        kind = rest.removeprefix(_PREFIX)
        if module not in modules or kind == rest or kind not in TENSORS:
            raise AdapterError(f"{path}: {name}: expected {_PREFIX}z and {_PREFIX}p on {', '.join(modules)}")
        adapter_folder.expect_size(path, name, tensor, (dim,) if kind == "z" else (dim, shape.features(module)[1]))
        parameters[f"layers.{layer}.{module}.{kind}"] = tensor
    for layer in range(shape.layers):
        for module in modules:
            for kind in TENSORS:
                if f"layers.{layer}.{module}.{kind}" not in parameters:
                    place = adapter_folder.module_name(layer, module)
                    raise AdapterError(
                        f"{path}: {place}.{_PREFIX}{kind} is missing; the adapter was made for another backbone"
                    )
    return parameters

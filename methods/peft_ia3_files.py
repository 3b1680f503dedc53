"""(IA)3 adapters as PEFT (IA)3 checkpoint folders: one `ia3_l` for each adapted linear."""

from __future__ import annotations

from pathlib import Path

import torch

from perfbench.errors import AdapterError
from perfbench.methods import adapter_folder
from perfbench.methods.adapter_folder import PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

# (layer, module) -> l
Scales = dict[tuple[int, str], torch.Tensor]


def save(scales: Scales, folder: Path, backbone: str) -> None:
    """Writes vectors l: [D_out], or [D_in] for down, which becomes PEFT's feedforward module."""
    tensors, targets, feedforward = {}, [], []
    for (layer, module), scale in scales.items():
        target = module_name(layer, module)
        targets.append(target)
        if module == "down":
            feedforward.append(target)
        # PEFT keeps the vector as a row for a feedforward module and as a column for any other.
        tensors[f"{PEFT_PREFIX}{target}.ia3_l"] = scale.view(1, -1) if module == "down" else scale.view(-1, 1)
    config = {
        "peft_type": "IA3",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "target_modules": targets,
        "feedforward_modules": feedforward,
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape, modules: tuple[str, ...]) -> Scales:
    """The vectors of a PEFT (IA)3 checkpoint that adapts `modules` (or some of them). Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, "IA3")
    path = folder / WEIGHTS
    if config.get("modules_to_save"):
        raise AdapterError(f"{folder}: modules_to_save: {config['modules_to_save']!r} can't be served as scales")
    scales: Scales = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest != "ia3_l" or module not in modules:
            raise AdapterError(f"{path}: {name}: expected ia3_l on {', '.join(modules)}")
        d_in, d_out = shape.features(module)
        size = (1, d_in) if module == "down" else (d_out, 1)
        adapter_folder.expect_size(path, name, tensor, size)
        scales[layer, module] = tensor.flatten()
    return scales

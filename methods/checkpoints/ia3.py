"""(IA)3 adapters as PEFT (IA)3 checkpoint folders: one `ia3_l` for each adapted linear."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

# (layer, module) -> l
if TYPE_CHECKING:
    import torch

Scales: TypeAlias = "dict[tuple[int, str], torch.Tensor]"


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
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.IA3)
    scales: Scales = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest != "ia3_l" or module not in modules:
            raise AdapterError(f"{path}: {name}: expected ia3_l on {', '.join(modules)}")
        scales[layer, module] = tensor
    _check_feedforward(config, described, scales)
    for (layer, module), tensor in scales.items():
        d_in, d_out = shape.features(module)
        size = (1, d_in) if module == "down" else (d_out, 1)
        peers = [other for (_, m), other in scales.items() if m == module]
        adapter_folder.expect_size(path, f"{module_name(layer, module)}.ia3_l", tensor, size, peers)
    _check_targets(config, described, path, scales, shape)
    return {place: tensor.flatten() for place, tensor in scales.items()}


def _check_feedforward(config: Mapping[str, Any], described: Path, scales: Scales) -> None:
    """AdapterError unless down, and nothing else, is scaled on its input: PEFT's other choices are not served."""
    feedforward = peft_targets.feedforward(config, described, [module_name(*place) for place in scales])
    for layer, module in scales:
        name = module_name(layer, module)
        if (name in feedforward) != (module == "down"):
            expected = "to name" if module == "down" else "not to name"
            side = "input" if module == "down" else "output"
            raise AdapterError(
                f"{described}: feedforward_modules: expected it {expected} {name}, whose {side} is what can be scaled, "
                f"got {peft_fields.shown(config.get('feedforward_modules'))}"
            )


def _check_targets(
    config: Mapping[str, Any], described: Path, path: Path, scales: Scales, shape: BackboneShape
) -> None:
    """AdapterError unless the modules that the configuration adapts are those that the file has vectors for."""
    # PEFT's default depends on the model's type: without the field, the file's modules on every layer.
    default = sorted({module_name(*place).split(".", 3)[3] for place in scales})
    targets = peft_targets.targets(config, described, shape, default=default, among=peft_targets.linears(shape))
    peft_targets.compare(targets, described, path, list(scales), shape, "ia3_l")

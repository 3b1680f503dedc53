"""(IA)3 adapters as PEFT (IA)3 checkpoint folders: one `ia3_l` for each adapted linear."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def save(scales: Scales, folder: Path, backbone: str, inputs: Collection[str] = ("down",)) -> None:
    """Writes vectors l: [D_out], or [D_in] for the modules of `inputs`, which become PEFT's feedforward modules."""
    tensors, targets, feedforward = {}, [], []
    for (layer, module), scale in scales.items():
        target = module_name(layer, module)
        targets.append(target)
        if module in inputs:
            feedforward.append(target)
        # PEFT keeps the vector as a row for a feedforward module and as a column for any other.
        tensors[f"{PEFT_PREFIX}{target}.ia3_l"] = scale.view(1, -1) if module in inputs else scale.view(-1, 1)
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
    """The vectors [D_out] of a PEFT (IA)3 checkpoint that scales outputs of `modules` (or of some of them).
    AdapterError, also where it scales an input."""
    scales, inputs = load_both(folder, shape, modules)
    for place in sorted(inputs):
        raise AdapterError(
            f"{folder / CONFIG}: feedforward_modules: expected it not to name {module_name(*place)}, whose output is "
            f"what can be scaled; serve the adapter with ia3-original"
        )
    return scales


def load_both(folder: Path, shape: BackboneShape, modules: tuple[str, ...]) -> tuple[Scales, set[tuple[int, str]]]:
    """The vectors of a PEFT (IA)3 checkpoint that adapts `modules` (or some of them), and those of their places where
    the vector [D_in] is the input's; elsewhere it is the output's [D_out]. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, "IA3")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.IA3)
    scales: Scales = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest != "ia3_l" or module not in modules:
            raise AdapterError(f"{path}: {name}: expected ia3_l on {', '.join(modules)}")
        scales[layer, module] = tensor
    feedforward = peft_targets.feedforward(config, described, [module_name(*place) for place in scales])
    inputs = {place for place in scales if module_name(*place) in feedforward}
    for (layer, module), tensor in scales.items():
        name, (d_in, d_out) = module_name(layer, module), shape.features(module)
        size, other = ((1, d_in), (d_out, 1)) if (layer, module) in inputs else ((d_out, 1), (1, d_in))
        if tuple(tensor.shape) == other and size != other:
            side, own = ("not to name", "output") if (layer, module) in inputs else ("to name", "input")
            raise AdapterError(
                f"{described}: feedforward_modules: expected it {side} {name}, whose {own} the vector in {WEIGHTS} "
                f"scales, got {peft_fields.shown(config.get('feedforward_modules'))}"
            )
        peers = [one for (_, m), one in scales.items() if m == module]
        adapter_folder.expect_size(path, f"{name}.ia3_l", tensor, size, peers)
    _check_targets(config, described, path, scales, shape)
    return {place: tensor.flatten() for place, tensor in scales.items()}, inputs


def _check_targets(
    config: Mapping[str, Any], described: Path, path: Path, scales: Scales, shape: BackboneShape
) -> None:
    """AdapterError unless the modules that the configuration adapts are those that the file has vectors for."""
    # PEFT's default depends on the model's type: without the field, the file's modules on every layer.
    default = sorted({module_name(*place).split(".", 3)[3] for place in scales})
    targets = peft_targets.targets(config, described, shape, default=default, among=peft_targets.linears(shape))
    peft_targets.compare(targets, described, path, list(scales), shape, "ia3_l")

"""RoAd adapters as PEFT RoAd checkpoint folders: `road_theta` and `road_alpha` of each adapted linear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

TENSORS = ("theta", "alpha")
# PEFT's own for a field that is absent.
DEFAULT_VARIANT, DEFAULT_GROUP = "road_1", 64
DEFAULT_TARGETS = ("q_proj", "v_proj")
# Of each variant, for a pair of outputs.
ANGLES: dict[str, int] = {"road_1": 1, "road_2": 2, "road_4": 4}


def save(parameters: dict[str, torch.Tensor], variant: str, group_size: int, folder: Path, backbone: str) -> None:
    """Writes `layers.<i>.<module>.theta|alpha`; every adapted linear is named in full."""
    tensors, targets = {}, []
    for name, tensor in parameters.items():
        _, layer, module, kind = name.split(".")
        target = module_name(int(layer), module)
        tensors[f"{PEFT_PREFIX}{target}.road_{kind}"] = tensor
        if kind == "theta":
            targets.append(target)
    config = {
        "peft_type": "ROAD",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "variant": variant,
        "group_size": group_size,
        "target_modules": targets,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape) -> tuple[dict[str, torch.Tensor], Any, int]:
    """(`layers.<i>.<module>.theta|alpha`, the variant, the size of a group) of a PEFT checkpoint. AdapterError."""
    config, tensors = adapter_folder.read(folder, "ROAD")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.ROAD)
    named = config.get("variant", DEFAULT_VARIANT)
    if not isinstance(named, str) or named not in ANGLES:
        raise AdapterError(f"{described}: variant: expected one of {', '.join(ANGLES)}, got {peft_fields.shown(named)}")
    size = peft_fields.expect_count(config.get("group_size", DEFAULT_GROUP), described, "group_size")
    if size % 2:
        raise AdapterError(f"{described}: group_size: expected an even number, got {size}")
    found: dict[tuple[int, str, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        kind = rest.removeprefix("road_")
        if kind == rest or kind not in TENSORS:
            raise AdapterError(f"{path}: {name}: expected road_theta or road_alpha, got {rest}")
        found[layer, module, kind] = tensor
    places = list(dict.fromkeys((layer, module) for layer, module, _ in found))
    missing = [
        (place[0], f"{module_name(*place)}.road_{kind}")
        for place in places
        for kind in TENSORS
        if (*place, kind) not in found
    ]
    adapter_folder.expect_places(path, missing, [layer for layer, _ in places], shape)
    targets = peft_targets.targets(
        config, described, shape, default=DEFAULT_TARGETS, among=peft_targets.linears(shape)
    )  # fmt: skip
    peft_targets.compare(targets, described, path, places, shape, "road_theta")
    for (layer, module, kind), tensor in found.items():
        columns = shape.features(module)[1]
        if columns % size:
            raise AdapterError(
                f"{described}: group_size: expected a divisor of the {columns} outputs of "
                f"{module_name(layer, module)}, got {size}"
            )
        peers = [other for (_, *key), other in found.items() if key == [module, kind]]
        name = f"{module_name(layer, module)}.road_{kind}"
        adapter_folder.expect_size(path, name, tensor, (columns * ANGLES[named] // 2,), peers)
    return {f"layers.{i}.{module}.{kind}": t for (i, module, kind), t in found.items()}, named, size

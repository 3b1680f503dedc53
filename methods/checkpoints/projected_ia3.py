"""The papers' (IA)3 adapters as they are trained: PEFT's folder format with `peft_type` PROJECTED_IA3, z and P kept."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS
from perfbench.methods.shape import MODULE_PATHS, BackboneShape

if TYPE_CHECKING:
    import torch

PEFT_TYPE = "PROJECTED_IA3"
TENSORS = ("z", "p")
_PREFIX = "projected_ia3_"


def load(folder: Path, shape: BackboneShape, modules: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """`layers.<i>.<module>.z` [dim] and `.p` [dim, D_out] of every layer and each of `modules`. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, PEFT_TYPE)
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.PROJECTED_IA3)
    dim = peft_fields.expect_count(config.get("dim"), described, "dim")
    expected = {adapter_folder.module_name(layer, m): (layer, m) for layer in range(shape.layers) for m in modules}
    default = [MODULE_PATHS[module] for module in modules]
    targets = peft_targets.targets(config, described, shape, default=default, among=list(expected))
    if targets != expected.keys():
        raise AdapterError(
            f"{described}: target_modules: expected {', '.join(modules)} of every layer, "
            f"got {peft_fields.shown(config.get('target_modules'))}"
        )
    found: dict[tuple[int, str, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        kind = rest.removeprefix(_PREFIX)
        if module not in modules or kind == rest or kind not in TENSORS:
            raise AdapterError(f"{path}: {name}: expected {_PREFIX}z and {_PREFIX}p on {', '.join(modules)}")
        found[layer, module, kind] = tensor
    places = {(*place, kind): f"{name}.{_PREFIX}{kind}" for name, place in expected.items() for kind in TENSORS}
    missing = [(place[0], name) for place, name in places.items() if place not in found]
    adapter_folder.expect_places(path, missing, {layer for layer, _, _ in found}, shape)
    for (layer, module, kind), tensor in found.items():
        size = (dim,) if kind == "z" else (dim, shape.features(module)[1])
        peers = [other for (_, *key), other in found.items() if key == [module, kind]]
        adapter_folder.expect_size(path, places[layer, module, kind], tensor, size, peers)
    return {f"layers.{layer}.{module}.{kind}": tensor for (layer, module, kind), tensor in found.items()}

"""PARA adapters on disk: PEFT's folder format with `peft_type` PARA."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, LAYERS, PEFT_PREFIX, WEIGHTS
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

TENSORS = ("w_down", "w_up", "bias")
POOLS = ("residual", "normalised")


def save(parameters: dict[str, torch.Tensor], rank: int, pool: str, folder: Path, backbone: str) -> None:
    """Writes `layers.<i>.w_down|w_up|bias` as `base_model.model.model.layers.<i>.para_<name>`."""
    tensors = {}
    for name, tensor in parameters.items():
        _, layer, kind = name.split(".")
        tensors[f"{PEFT_PREFIX}{LAYERS}{layer}.para_{kind}"] = tensor
    config = {
        "peft_type": "PARA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "rank": rank,
        "pool": pool,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape) -> tuple[dict[str, torch.Tensor], int, str]:
    """The parameters of every layer, and the rank and the pooling that they were trained with. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, "PARA")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.PARA)
    rank, pool = peft_fields.expect_count(config.get("rank"), described, "rank"), config.get("pool")
    if pool not in POOLS:
        raise AdapterError(f"{described}: pool: expected one of {', '.join(POOLS)}, got {peft_fields.shown(pool)}")
    layers = peft_targets.layers(shape)
    if peft_targets.targets(config, described, shape, default=layers, among=layers) != set(layers):
        raise AdapterError(
            f"{described}: target_modules: expected all {shape.layers} layers of the backbone, "
            f"got {peft_fields.shown(config.get('target_modules'))}"
        )
    d = sum(shape.features(module)[1] for module in ("q", "v", "up"))
    sizes = {"w_down": (shape.hidden, rank), "w_up": (rank, d), "bias": (d,)}
    found: dict[tuple[int, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, kind = adapter_folder.layer_of(name, path, shape)
        if kind.removeprefix("para_") not in TENSORS or not kind.startswith("para_"):
            raise AdapterError(f"{path}: {name}: expected para_{', para_'.join(TENSORS)} of a layer")
        found[layer, kind.removeprefix("para_")] = tensor
    places = {(i, kind): f"{layers[i]}.para_{kind}" for i in range(shape.layers) for kind in TENSORS}
    missing = [(place[0], name) for place, name in places.items() if place not in found]
    adapter_folder.expect_places(path, missing, {layer for layer, _ in found}, shape)
    for (layer, kind), tensor in found.items():
        peers = [other for (_, k), other in found.items() if k == kind]
        adapter_folder.expect_size(path, places[layer, kind], tensor, sizes[kind], peers)
    parameters = {f"layers.{i}.{kind}": found[i, kind] for i, kind in places}
    return parameters, rank, pool

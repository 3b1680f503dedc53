"""PARA adapters on disk: PEFT's folder format with `peft_type` PARA."""

from __future__ import annotations

from pathlib import Path

import torch

from perfbench.errors import AdapterError
from perfbench.methods import adapter_folder
from perfbench.methods.adapter_folder import CONFIG, LAYERS, PEFT_PREFIX, WEIGHTS
from perfbench.methods.registry import ParaOptions
from perfbench.methods.shape import BackboneShape

TENSORS = ("w_down", "w_up", "bias")
POOLS = ("residual", "normalised")


def save(parameters: dict[str, torch.Tensor], options: ParaOptions, folder: Path, backbone: str) -> None:
    """Writes `layers.<i>.w_down|w_up|bias` as `base_model.model.model.layers.<i>.para_<name>`."""
    tensors = {}
    for name, tensor in parameters.items():
        _, layer, kind = name.split(".")
        tensors[f"{PEFT_PREFIX}{LAYERS}{layer}.para_{kind}"] = tensor
    config = {
        "peft_type": "PARA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "rank": options.rank,
        "pool": options.pool,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape) -> tuple[dict[str, torch.Tensor], ParaOptions]:
    """The parameters of every layer and the options they were trained with. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, "PARA")
    rank, pool = config.get("rank"), config.get("pool")
    if not isinstance(rank, int) or rank < 1:
        raise AdapterError(f"{folder / CONFIG}: rank: expected an integer >= 1, got {rank!r}")
    if pool not in POOLS:
        raise AdapterError(f"{folder / CONFIG}: pool: expected one of {', '.join(POOLS)}, got {pool!r}")
    path = folder / WEIGHTS
    d = sum(shape.features(module)[1] for module in ("q", "v", "up"))
    sizes = {"w_down": (shape.hidden, rank), "w_up": (rank, d), "bias": (d,)}
    parameters = {}
    for layer in range(shape.layers):
        for kind in TENSORS:
            name = f"{PEFT_PREFIX}{LAYERS}{layer}.para_{kind}"
            if name not in tensors:
                raise AdapterError(f"{path}: {name} is missing; the adapter was made for another backbone")
            adapter_folder.expect_size(path, name, tensors[name], sizes[kind])
            parameters[f"layers.{layer}.{kind}"] = tensors.pop(name)
    if tensors:
        raise AdapterError(f"{path}: {min(tensors)}: the backbone has no place for it; it was made for another one")
    return parameters, ParaOptions(rank=rank, pool=pool)

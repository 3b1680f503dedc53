"""MiSS adapters as PEFT MiSS checkpoint folders: one `miss_block` for each adapted linear."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

# PEFT's own for a field that is absent.
DEFAULT_RANK, DEFAULT_MINI_RANK = 64, 1
DEFAULT_TARGETS = ("q_proj", "v_proj")


def save(parameters: dict[str, torch.Tensor], folder: Path, backbone: str) -> None:
    """Writes `layers.<i>.<module>.block`; every adapted linear is named in full. AdapterError on unlike ranks."""
    tensors, targets = {}, []
    for name, tensor in parameters.items():
        _, layer, module, _ = name.split(".")
        targets.append(module_name(int(layer), module))
        tensors[f"{PEFT_PREFIX}{targets[-1]}.miss_block"] = tensor
    ranks = {tensor.shape[0] for tensor in tensors.values()}
    if len(ranks) != 1:
        raise AdapterError(f"{folder}: expected one rank over all modules, got {sorted(ranks)}")
    config = {
        "peft_type": "MISS",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "r": ranks.pop(),
        "init_weights": True,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape) -> dict[str, torch.Tensor]:
    """`layers.<i>.<module>.block` [R, D_out] of a PEFT MiSS checkpoint; a small block of `mini` is written out over
    all outputs. AdapterError, also on `bat`, whose product is one with the backbone's weights."""
    config, tensors = adapter_folder.read(folder, "MISS")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.MISS)
    kind = config.get("init_weights", True)
    if kind not in (True, False, "mini"):
        raise AdapterError(
            f"{described}: init_weights: expected true, false or 'mini', got {peft_fields.shown(kind)}; what it adds "
            f"is made of the backbone's weights, which is not served"
        )
    rank = peft_fields.expect_count(config.get("r", DEFAULT_RANK), described, "r")
    mini = peft_fields.expect_count(config.get("mini_r", DEFAULT_MINI_RANK), described, "mini_r")
    blocks: dict[tuple[int, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest != "miss_block":
            raise AdapterError(f"{path}: {name}: expected miss_block, got {rest}")
        blocks[layer, module] = tensor
    targets = peft_targets.targets(
        config, described, shape, default=DEFAULT_TARGETS, among=peft_targets.linears(shape)
    )  # fmt: skip
    peft_targets.compare(targets, described, path, list(blocks), shape, "miss_block")
    for (layer, module), tensor in blocks.items():
        d_in, d_out = shape.features(module)
        if rank > d_in or (kind == "mini" and d_out % mini):
            field, value = ("r", rank) if rank > d_in else ("mini_r", mini)
            raise AdapterError(
                f"{described}: {field}: expected what {module_name(layer, module)} of size {[d_out, d_in]} allows, "
                f"got {value}"
            )
        peers = [other for (_, m), other in blocks.items() if m == module]
        size = (rank, mini if kind == "mini" else d_out)
        adapter_folder.expect_size(path, f"{module_name(layer, module)}.miss_block", tensor, size, peers)
        if kind == "mini":
            blocks[layer, module] = tensor.repeat(1, d_out // mini)
    return {f"layers.{layer}.{module}.block": tensor for (layer, module), tensor in blocks.items()}

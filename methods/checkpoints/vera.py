"""VeRA adapters as PEFT VeRA checkpoint folders: `vera_lambda_d` and `vera_lambda_b` of each adapted linear, and the
two matrices that they all share, or the key that these are drawn from."""

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
DEFAULT_RANK, DEFAULT_KEY = 256, 0
DEFAULT_TARGETS = ("q_proj", "v_proj")
A, B = "base_model.vera_A", "base_model.vera_B"
_PREFIX = "vera_lambda_"
TENSORS = ("d", "b")


def save(
    parameters: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor, key: int, folder: Path, backbone: str
) -> None:
    """Writes `layers.<i>.<module>.d|b`, A [R, largest D_in] and B [largest D_out, R]; every adapted linear is named in
    full."""
    tensors, targets = {A: a, B: b}, []
    for name, tensor in parameters.items():
        _, layer, module, kind = name.split(".")
        target = module_name(int(layer), module)
        tensors[f"{PEFT_PREFIX}{target}.{_PREFIX}{kind}"] = tensor
        if kind == "d":
            targets.append(target)
    config = {
        "peft_type": "VERA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "r": len(a),
        "projection_prng_key": key,
        "save_projection": True,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(
    folder: Path, shape: BackboneShape
) -> tuple[dict[str, torch.Tensor], tuple[torch.Tensor, torch.Tensor] | None, int, int]:
    """(`layers.<i>.<module>.d|b`, A and B or None where they are not in the file, the rank, the key). AdapterError."""
    config, tensors = adapter_folder.read(folder, "VERA")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.VERA)
    rank = peft_fields.expect_count(config.get("r", DEFAULT_RANK), described, "r")
    key = config.get("projection_prng_key", DEFAULT_KEY)
    if isinstance(key, bool) or not isinstance(key, int) or not 0 <= key < 2**63:
        raise AdapterError(
            f"{described}: projection_prng_key: expected an integer from 0 to 2^63 - 1, got {peft_fields.shown(key)}"
        )
    saved = config.get("save_projection", True)
    if not isinstance(saved, bool):
        raise AdapterError(f"{described}: save_projection: expected true or false, got {peft_fields.shown(saved)}")
    projections = _projections(tensors, path) if saved else None
    found: dict[tuple[int, str, str], torch.Tensor] = {}
    for name, tensor in tensors.items():
        if name in (A, B):
            continue
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        kind = rest.removeprefix(_PREFIX)
        if kind == rest or kind not in TENSORS:
            raise AdapterError(f"{path}: {name}: expected {_PREFIX}d or {_PREFIX}b, got {rest}")
        found[layer, module, kind] = tensor
    places = list(dict.fromkeys((layer, module) for layer, module, _ in found))
    names = {(*place, kind): f"{module_name(*place)}.{_PREFIX}{kind}" for place in places for kind in TENSORS}
    missing = [(place[0], name) for place, name in names.items() if place not in found]
    adapter_folder.expect_places(path, missing, [layer for layer, _ in places], shape)
    targets = peft_targets.targets(
        config, described, shape, default=DEFAULT_TARGETS, among=peft_targets.linears(shape)
    )  # fmt: skip
    peft_targets.compare(targets, described, path, places, shape, f"{_PREFIX}d")
    for (layer, module, kind), tensor in found.items():
        peers = [other for (_, *own), other in found.items() if own == [module, kind]]
        size = (rank,) if kind == "d" else (shape.features(module)[1],)
        adapter_folder.expect_size(path, names[layer, module, kind], tensor, size, peers)
    if projections is not None:
        largest = [max(shape.features(module)[side] for _, module in places) for side in (0, 1)]
        for name, tensor, wanted in ((A, projections[0], [rank, largest[0]]), (B, projections[1], [largest[1], rank])):
            if tensor.dim() != 2 or any(own < least for own, least in zip(tensor.shape, wanted, strict=True)):
                raise AdapterError(f"{path}: {name}: expected at least size {wanted}, got {list(tensor.shape)}")
        projections = projections[0][:rank], projections[1][:, :rank]
    parameters = {f"layers.{layer}.{module}.{kind}": tensor for (layer, module, kind), tensor in found.items()}
    return parameters, projections, rank, key


def _projections(tensors: dict[str, torch.Tensor], path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    for name in (A, B):
        if name not in tensors:
            raise AdapterError(f"{path}: {name}: expected by save_projection in {CONFIG}, got no such tensor")
    return tensors[A], tensors[B]

"""LoRA and FanLoRA adapters as PEFT LoRA checkpoint folders."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch

from perfbench.errors import AdapterError
from perfbench.methods import adapter_folder
from perfbench.methods.adapter_folder import PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

# What a PEFT LoRA checkpoint may ask for that a plain low-rank pair can't give.
_UNSUPPORTED = ("use_dora", "lora_bias", "modules_to_save", "layer_replication", "fan_in_fan_out", "use_qalora")

Parameters = dict[str, torch.Tensor]


def save(parameters: Parameters, alpha: float | None, folder: Path, backbone: str) -> None:
    """Writes `layers.<i>.<module>.a|b` as a PEFT LoRA checkpoint; every adapted linear is named in full."""
    tensors, targets, ranks = {}, [], set()
    for name, tensor in parameters.items():
        _, layer, module, matrix = name.split(".")
        target = module_name(int(layer), module)
        tensors[f"{PEFT_PREFIX}{target}.lora_{matrix.upper()}.weight"] = tensor
        if matrix == "a":
            targets.append(target)
            ranks.add(tensor.shape[0])
    if len(ranks) != 1:
        raise AdapterError(f"{folder}: expected one rank over all modules, got {sorted(ranks)}")
    rank = ranks.pop()
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    adapter_folder.write(folder, config, tensors)


def load(folder: Path, shape: BackboneShape) -> Parameters:
    """`layers.<i>.<module>.a` [R, D_in] and `.b` [D_out, R], with PEFT's scale folded into b. Raises AdapterError."""
    config, tensors = adapter_folder.read(folder, "LORA")
    path = folder / WEIGHTS
    for key in _UNSUPPORTED:
        if config.get(key):
            raise AdapterError(f"{folder}: {key}: {config[key]!r} can't be served as a plain low-rank pair")
    if config.get("bias", "none") != "none":
        raise AdapterError(f"{folder}: bias: expected 'none', got {config['bias']!r}")
    parameters: Parameters = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        matrix = {"lora_A.weight": "a", "lora_B.weight": "b"}.get(rest)
        if matrix is None:
            raise AdapterError(f"{path}: {name}: expected lora_A.weight or lora_B.weight, got {rest}")
        parameters[f"layers.{layer}.{module}.{matrix}"] = tensor
    for name in [n for n in parameters if n.endswith((".a", ".b"))]:
        _check_and_scale(parameters, name, config, path, shape)
    return parameters


def _check_and_scale(
    parameters: Parameters, name: str, config: dict[str, Any], path: Path, shape: BackboneShape
) -> None:
    """Checks one matrix against its partner and the backbone; folds alpha / rank into b."""
    place, matrix = name.rsplit(".", 1)
    partner = parameters.get(f"{place}.{'b' if matrix == 'a' else 'a'}")
    if partner is None:
        raise AdapterError(f"{path}: {name}: its partner is missing; the file is not a whole LoRA adapter")
    _, layer, module = place.split(".")
    d_in, d_out = shape.features(module)
    rank = partner.shape[1] if matrix == "a" else partner.shape[0]
    adapter_folder.expect_size(path, name, parameters[name], (rank, d_in) if matrix == "a" else (d_out, rank))
    if matrix == "b":
        target = module_name(int(layer), module)
        alpha = _pattern(config.get("alpha_pattern"), target, config.get("lora_alpha", rank))
        scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
        parameters[name] = parameters[name] * scale


def _pattern(patterns: dict[str, float] | None, target: str, default: float) -> float:
    """PEFT's rule: the first pattern that matches the end of the module's name, at a dot, counts."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", target):
            return value
    return default

"""AdaLoRA adapters as PEFT's checkpoint folders: low-rank pairs, each of the rank that the training has left it.

PEFT computes x (A * E)^T B^T * alpha / (init_r + 1e-5), with a singular value E for each rank. E and the scale are
folded into A and B here, so that the adapter is an ordinary LoRA of uneven ranks.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

if TYPE_CHECKING:
    import torch

PEFT_TYPE = "ADALORA"
DEFAULT_INITIAL_RANK, DEFAULT_ALPHA = 12, 8  # PEFT's own for a field that is absent
DEFAULT_TARGETS = ("q_proj", "v_proj")
_EPSILON = 1e-5  # that PEFT adds to the rank that it divides by

Parameters: TypeAlias = "dict[str, torch.Tensor]"


def load(folder: Path, shape: BackboneShape) -> Parameters:
    """`layers.<i>.<module>.a` [R, D_in] and `.b` [D_out, R] of every module that has a rank left. AdapterError."""
    config, tensors = adapter_folder.read(folder, PEFT_TYPE)
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.ADALORA)
    parts: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest not in ("lora_A", "lora_B", "lora_E"):
            raise AdapterError(f"{path}: {name}: expected lora_A, lora_B or lora_E, got {rest}")
        parts.setdefault((layer, module), {})[rest] = tensor
    targets = peft_targets.targets(
        config, described, shape, default=DEFAULT_TARGETS, among=peft_targets.linears(shape)
    )  # fmt: skip
    peft_targets.compare(targets, described, path, list(parts), shape, "lora_A")
    initial = peft_fields.expect_count(config.get("init_r", DEFAULT_INITIAL_RANK), described, "init_r")
    alpha = peft_fields.expect_number(config.get("lora_alpha", DEFAULT_ALPHA), described, "lora_alpha")
    if alpha <= 0:
        raise AdapterError(f"{described}: lora_alpha: expected more than 0, got {alpha}")
    ranks = _ranks(config, described, [module_name(*place) for place in parts], initial)
    parameters: Parameters = {}
    for place, own in parts.items():
        rank = ranks[module_name(*place)]
        _check_sizes(place, own, rank, path, shape)
        if rank:
            name = f"layers.{place[0]}.{place[1]}"
            parameters[f"{name}.a"] = own["lora_A"] * own["lora_E"]
            parameters[f"{name}.b"] = own["lora_B"] * (alpha / (initial + _EPSILON))
            for matrix in ("a", "b"):
                if not parameters[f"{name}.{matrix}"].isfinite().all():
                    raise AdapterError(f"{described}: expected a finite adapter, got another product for {name}")
    return parameters


def _ranks(config: Mapping[str, Any], described: Path, names: list[str], initial: int) -> dict[str, int]:
    """How many ranks each of `names` has left: those that `rank_pattern` marks as kept, or all of them."""
    patterns = config.get("rank_pattern")
    if patterns is not None and not isinstance(patterns, dict):
        got = peft_fields.shown(patterns)
        raise AdapterError(f"{described}: rank_pattern: expected null or an object, module to ranks kept, got {got}")
    ranks = dict.fromkeys(names, initial)
    for key, kept in (patterns or {}).items():
        name, found, _ = key.partition(".lora_E")
        field = f"{described}: rank_pattern[{peft_fields.shown(key)}]"
        if not found or name not in ranks:
            raise AdapterError(f"{field}: expected a module of {WEIGHTS} and `.lora_E`")
        if not isinstance(kept, list) or len(kept) != initial or not all(isinstance(one, bool) for one in kept):
            got = peft_fields.shown(kept)
            raise AdapterError(f"{field}: expected init_r {initial} times true or false, got {got}")
        ranks[name] = sum(kept)
    return ranks


def _check_sizes(
    place: tuple[int, str], own: Mapping[str, torch.Tensor], rank: int, path: Path, shape: BackboneShape
) -> None:
    """AdapterError unless all three tensors of a module are there, for this backbone and of the same rank."""
    d_in, d_out = shape.features(place[1])
    for part, size in (("lora_A", (rank, d_in)), ("lora_B", (d_out, rank)), ("lora_E", (rank, 1))):
        name = f"{module_name(*place)}.{part}"
        if part not in own:
            raise AdapterError(f"{path}: {name}: expected beside its partners, got no such tensor; the file is damaged")
        if own[part].dim() == 2 and own[part].shape[0 if part != "lora_B" else 1] != rank:
            raise AdapterError(
                f"{path}: {name}: expected {rank} ranks, which rank_pattern or init_r in {CONFIG} leave it, got size "
                f"{list(own[part].shape)}"
            )
        adapter_folder.expect_size(path, name, own[part], size)

"""LoRA and FanLoRA adapters as PEFT LoRA checkpoint folders.

What is read is held against the configuration, field by field: a folder that PEFT would serve as something else, or
not at all, is refused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from perfbench.errors import AdapterError
from perfbench.methods.checkpoints import adalora, adapter_folder, peft_fields, peft_targets
from perfbench.methods.checkpoints.adapter_folder import CONFIG, PEFT_PREFIX, WEIGHTS, module_name
from perfbench.methods.shape import BackboneShape

# PEFT's own for a field that is absent.
DEFAULT_RANK = DEFAULT_ALPHA = 8
DEFAULT_TARGETS = ("q_proj", "v_proj")

# Ours -> PEFT's name.
_STORED = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "bias": "lora_B.bias"}
# What a pair has besides, [D_out] -> the field of the configuration that says so.
_VECTORS = {"magnitude": "use_dora", "bias": "lora_bias"}
_INVOCATION = "alora_invocation_tokens"

if TYPE_CHECKING:
    import torch

Parameters: TypeAlias = "dict[str, torch.Tensor]"


def save(
    parameters: Parameters, alpha: float | None, folder: Path, backbone: str, invocation: Sequence[int] = ()
) -> None:
    """Writes `layers.<i>.<module>.a|b|magnitude|bias` as a PEFT LoRA checkpoint; every linear is named in full;
    with `invocation` tokens one of an activated LoRA."""
    tensors, targets, ranks = {}, [], set()
    for name, tensor in parameters.items():
        _, layer, module, matrix = name.split(".")
        target = module_name(int(layer), module)
        tensors[f"{PEFT_PREFIX}{target}.{_STORED[matrix]}"] = tensor
        if matrix == "a":
            targets.append(target)
            ranks.add(tensor.shape[0])
    if len(ranks) != 1:
        raise AdapterError(f"{folder}: expected one rank over all modules, got {sorted(ranks)}")
    rank = ranks.pop()
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": backbone,
        "r": rank,
        "lora_alpha": rank if alpha is None else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        **{field: any(name.endswith(f".{kind}") for name in parameters) for kind, field in _VECTORS.items()},
        "inference_mode": True,
    }
    if invocation:
        config[_INVOCATION] = list(invocation)
    adapter_folder.write(folder, config, tensors)


def invocation(folder: Path, shape: BackboneShape) -> tuple[int, ...]:
    """The tokens that invoke the activated LoRA in `folder`, () where it is none. Raises AdapterError."""
    tokens = adapter_folder.describe(folder).get(_INVOCATION)
    if tokens is None:
        return ()
    whole = isinstance(tokens, list) and all(isinstance(one, int) and not isinstance(one, bool) for one in tokens)
    if not whole or not tokens or not all(0 <= token < shape.vocab for token in tokens):
        raise AdapterError(
            f"{folder / CONFIG}: {_INVOCATION}: expected null or a list of tokens from 0 to {shape.vocab - 1}, got "
            f"{peft_fields.shown(tokens)}"
        )
    return tuple(tokens)


def load(folder: Path, shape: BackboneShape, *, activated: bool = False) -> Parameters:
    """`layers.<i>.<module>.a` [R, D_in] and `.b` [D_out, R], with PEFT's scale folded into b; of DoRA `.magnitude`
    [D_out] too, and with `lora_bias` `.bias` [D_out], which the scale multiplies as well. Raises AdapterError.

    A checkpoint of AdaLoRA is read as well: its pairs are of uneven rank, and modules without a rank are not there. One
    that tokens invoke is refused, unless it is to be read as `activated`.
    """
    if adapter_folder.peft_type(folder) == adalora.PEFT_TYPE:
        return adalora.load(folder, shape)
    config, tensors = adapter_folder.read(folder, "LORA")
    path, described = folder / WEIGHTS, folder / CONFIG
    peft_fields.check(config, described, peft_fields.LORA)
    peft_fields.check_initialisation(config, described)
    if (tokens := config.get(_INVOCATION)) is not None and not activated:
        got = peft_fields.shown(tokens)
        raise AdapterError(f"{described}: {_INVOCATION}: expected null, got {got}; method alora serves it")
    vectors: dict[str, Parameters] = {
        kind: {} for kind, field in _VECTORS.items() if peft_fields.flag(config, described, field)
    }
    if len(vectors) > 1:
        raise AdapterError(f"{described}: lora_bias: expected false, since PEFT has none with use_dora, got true")
    kinds = {stored: own for own, stored in _STORED.items() if own in ("a", "b", *vectors)}
    parameters: Parameters = {}
    for name, tensor in tensors.items():
        layer, module, rest = adapter_folder.place_of(name, path, shape)
        if rest not in kinds:
            raise AdapterError(f"{path}: {name}: expected {' or '.join(kinds)}, got {rest}")
        kind = kinds[rest]
        vectors.get(kind, parameters)[f"layers.{layer}.{module}.{kind}"] = tensor
    places = list(_places(parameters, path))
    for layer, module in places:
        _check_sizes(parameters, layer, module, path, shape)
    for kind, found in vectors.items():
        _check_vectors(kind, found, places, path, shape)
    biases = vectors.get("bias", {})
    scales = _scales(config, described, path, places, parameters, shape)
    for (layer, module), scale in scales.items():
        for own, name in ((parameters, f"layers.{layer}.{module}.b"), (biases, f"layers.{layer}.{module}.bias")):
            if name in own:
                own[name] = own[name] * scale
                if not own[name].isfinite().all():
                    raise AdapterError(
                        f"{described}: lora_alpha: expected a finite adapter, got {scale:g} times {name}"
                    )
    for found in vectors.values():
        parameters |= found
    return parameters


def _places(parameters: Parameters, path: Path) -> Iterator[tuple[int, str]]:
    """(layer, module) of each pair. AdapterError on half a pair."""
    for name in parameters:
        place, matrix = name.rsplit(".", 1)
        if f"{place}.{'b' if matrix == 'a' else 'a'}" not in parameters:
            raise AdapterError(f"{path}: {name}: its partner is missing; the file is not a whole LoRA adapter")
        if matrix == "a":
            _, layer, module = place.split(".")
            yield int(layer), module


def _check_sizes(parameters: Parameters, layer: int, module: str, path: Path, shape: BackboneShape) -> None:
    """AdapterError unless a pair fits the backbone and its halves fit each other."""
    a, b = (parameters[f"layers.{layer}.{module}.{matrix}"] for matrix in "ab")
    d_in, d_out = shape.features(module)
    for matrix, tensor in (("A", a), ("B", b)):
        name = f"{module_name(layer, module)}.lora_{matrix}.weight"
        if tensor.dim() != 2:
            raise AdapterError(f"{path}: {name}: expected two dimensions, got size {list(tensor.shape)}")
        inner, width = (0, d_in) if matrix == "A" else (1, d_out)
        transposed = tensor.shape[inner] == width != tensor.shape[1 - inner]
        rank = tensor.shape[1 - inner if transposed else inner]
        if rank == 0:
            raise AdapterError(f"{path}: {name}: expected a rank of at least 1, got size {list(tensor.shape)}")
        size = (rank, d_in) if matrix == "A" else (d_out, rank)
        peers = [t for n, t in parameters.items() if n.endswith(f".{module}.{matrix.lower()}") and t.dim() == 2]
        adapter_folder.expect_size(path, name, tensor, size, peers)
    if a.shape[0] != b.shape[1]:
        raise AdapterError(
            f"{path}: {module_name(layer, module)}.lora_B.weight: expected size {[d_out, a.shape[0]]}, which its "
            f"lora_A.weight has, got {list(b.shape)}; the file is damaged"
        )


def _check_vectors(
    kind: str, vectors: Parameters, places: list[tuple[int, str]], path: Path, shape: BackboneShape
) -> None:
    """AdapterError unless there is one of the right size for each pair, and none besides."""
    named = {f"layers.{layer}.{module}.{kind}": (layer, module) for layer, module in places}
    missing = [(layer, f"{module_name(layer, module)}.{_STORED[kind]}") for layer, module in places
               if f"layers.{layer}.{module}.{kind}" not in vectors]  # fmt: skip
    adapter_folder.expect_places(path, missing, [layer for layer, _ in places], shape)
    for name, tensor in vectors.items():
        if name not in named:
            raise AdapterError(f"{path}: {name}: expected the pair that belongs to it, got none")
        layer, module = named[name]
        stored = f"{module_name(layer, module)}.{_STORED[kind]}"
        adapter_folder.expect_size(path, stored, tensor, (shape.features(module)[1],), vectors.values())


def _scales(
    config: Mapping[str, Any],
    described: Path,
    path: Path,
    places: list[tuple[int, str]],
    parameters: Parameters,
    shape: BackboneShape,
) -> dict[tuple[int, str], float]:
    """PEFT's scale of each pair: alpha / rank, or alpha / sqrt(rank). AdapterError where the configuration adapts other
    modules than the file has, or gives them other ranks."""
    linears = peft_targets.linears(shape)
    by_weight = peft_targets.target_parameters(config, described, shape)
    default = () if by_weight else DEFAULT_TARGETS
    targets = by_weight | peft_targets.targets(config, described, shape, default=default, among=linears)
    peft_targets.compare(targets, described, path, places, shape, "lora_A.weight")
    # PEFT goes by the name of what it wraps: of a module, or of a parameter.
    names = {place: _wrapped(module_name(*place), by_weight) for place in places}
    rank = peft_fields.expect_count(config.get("r", DEFAULT_RANK), described, "r")
    alpha = peft_fields.expect_number(config.get("lora_alpha", DEFAULT_ALPHA), described, "lora_alpha")
    peft_fields.expect_number(config.get("lora_dropout", 0.0), described, "lora_dropout")
    root = peft_fields.flag(config, described, "use_rslora")
    ranks = peft_targets.values_of(config, described, "rank_pattern", list(names.values()), rank)
    alphas = peft_targets.values_of(config, described, "alpha_pattern", list(names.values()), alpha)
    scales = {}
    for place, name in names.items():
        value, key = ranks[name]
        field = f"rank_pattern[{key!r}]" if key else "r"
        peft_fields.expect_count(value, described, field)
        found = parameters[f"layers.{place[0]}.{place[1]}.a"].shape[0]
        if found != value:
            raise AdapterError(f"{described}: {field}: expected {found}, the rank of {name} in {WEIGHTS}, got {value}")
        own, key = alphas[name]
        peft_fields.expect_number(own, described, f"alpha_pattern[{key!r}]" if key else "lora_alpha")
        scales[place] = own / (math.sqrt(found) if root else found)
    return scales


def _wrapped(name: str, by_weight: set[str]) -> str:
    return f"{name}.weight" if name in by_weight else name

"""An adapter on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT has it.

Reading refuses a pickle, a truncated file, a value that is not finite, a tensor that the backbone has no place for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from perfbench.errors import AdapterError
from perfbench.methods.shape import MODULE_PATHS, BackboneShape

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LAYERS = "model.layers."

_MODULE_OF_PATH = {path: module for module, path in MODULE_PATHS.items()}
_PLACE = re.compile(rf"{re.escape(PEFT_PREFIX + LAYERS)}(\d+)\.([a-z_]+\.[a-z_]+)\.(.+)")


def module_name(layer: int, module: str) -> str:
    """The name of a linear inside the Hugging Face model: `model.layers.3.self_attn.q_proj`."""
    return f"{LAYERS}{layer}.{MODULE_PATHS[module]}"


def peft_type(folder: Path) -> Any:
    """What the configuration of an adapter folder says that it is. Raises AdapterError."""
    _expect_folder(folder)
    return _read_config(folder / CONFIG).get("peft_type")


def read(folder: Path, peft_type: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors (fp32, on the CPU) of an adapter folder. Raises AdapterError."""
    _expect_folder(folder)
    config = _read_config(folder / CONFIG)
    found = config.get("peft_type")
    if found != peft_type:
        raise AdapterError(f"{folder / CONFIG}: peft_type: expected {peft_type!r}, got {found!r}")
    path = folder / WEIGHTS
    if not path.is_file():
        pickles = sorted(p.name for p in folder.glob("*.bin"))
        if pickles:
            raise AdapterError(
                f"{folder / pickles[0]}: a pickle can run code when it is loaded and is refused; "
                f"save the adapter with safe_serialization=True, which writes {WEIGHTS}"
            )
        raise AdapterError(f"{folder}: no {WEIGHTS}")
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise AdapterError(f"{path}: not a whole safetensors file ({error}); copy or save it again") from None
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise AdapterError(f"{path}: {name}: expected finite values, got NaN or infinity; train it again")
    return config, {name: tensor.float() for name, tensor in tensors.items()}


def _expect_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder; expected one with {CONFIG} and {WEIGHTS}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; expected a folder as PEFT's save_pretrained writes it") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def place_of(name: str, path: Path, shape: BackboneShape) -> tuple[int, str, str]:
    """(layer, module, rest) of a PEFT tensor name. AdapterError where this backbone has no such place."""
    match = _PLACE.fullmatch(name)
    if match is None or match[2] not in _MODULE_OF_PATH:
        raise AdapterError(f"{path}: {name}: expected a tensor of one of the seven linears of a Llama-family layer")
    layer = int(match[1])
    if layer >= shape.layers:
        raise AdapterError(
            f"{path}: {name}: the backbone has {shape.layers} layers; the adapter was made for another backbone"
        )
    return layer, _MODULE_OF_PATH[match[2]], match[3]


def expect_size(path: Path, name: str, tensor: torch.Tensor, size: tuple[int, ...]) -> None:
    """AdapterError where a tensor has another size than this backbone wants."""
    if tuple(tensor.shape) != size:
        raise AdapterError(
            f"{path}: {name}: expected size {list(size)}, got {list(tensor.shape)}; "
            f"the adapter was made for another backbone"
        )


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter folder; each file appears whole or not at all. AdapterError where it can't be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        whole = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
        _replace(folder / WEIGHTS, lambda temporary: save_file(whole, temporary, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        _replace(folder / CONFIG, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    except (OSError, SafetensorError) as error:
        raise AdapterError(f"{folder}: can't write the adapter ({error})") from None


def _replace(path: Path, write_to: Callable[[Path], object]) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write_to(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)

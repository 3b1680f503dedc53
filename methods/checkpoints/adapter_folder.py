"""An adapter on disk: a folder with `adapter_config.json` and `adapter_model.safetensors`, as PEFT has it.

Reading refuses a pickle, a truncated file, a number format that is not one of FILE_DTYPES, a value that is not
finite, a tensor that the backbone has no place for.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from perfbench.errors import AdapterError
from perfbench.methods.dtypes import FILE_DTYPES
from perfbench.methods.shape import MODULE_PATHS, BackboneShape

if TYPE_CHECKING:
    import torch

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
PEFT_PREFIX = "base_model.model."
LAYERS = "model.layers."

_MODULE_OF_PATH = {path: module for module, path in MODULE_PATHS.items()}
_PLACE = re.compile(rf"{re.escape(PEFT_PREFIX + LAYERS)}(0|[1-9][0-9]*)\.([a-z_]+\.[a-z_]+)\.(.+)")
_OF_LAYER = re.compile(rf"{re.escape(PEFT_PREFIX + LAYERS)}(0|[1-9][0-9]*)\.([^.]+)")


def module_name(layer: int, module: str) -> str:
    """The name of a linear inside the Hugging Face model: `model.layers.3.self_attn.q_proj`."""
    return f"{LAYERS}{layer}.{MODULE_PATHS[module]}"


def describe(folder: Path) -> dict[str, Any]:
    """The configuration of an adapter folder, as it stands there. Raises AdapterError."""
    _expect_folder(folder)
    return _read_config(folder / CONFIG)


def peft_type(folder: Path) -> Any:
    """What the configuration of an adapter folder says that it is. Raises AdapterError."""
    return describe(folder).get("peft_type")


def note_on_backbone(folder: Path, backbone: str) -> str | None:
    """What to tell the user of an adapter whose configuration names another backbone than `backbone`; a copy under
    another path has the same last name. Raises AdapterError."""
    trained_on = describe(folder).get("base_model_name_or_path")
    if not isinstance(trained_on, str) or not trained_on or _last_name(trained_on) == _last_name(backbone):
        return None
    return f"{folder}: trained on {trained_on!r}, served on {backbone}: the sizes fit, but nothing else was compared"


def _last_name(backbone: str) -> str:
    return backbone.rstrip("/").rsplit("/", 1)[-1].lower()


def read(folder: Path, peft_type: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """The configuration and the tensors (fp32, on the CPU) of an adapter folder. Raises AdapterError."""
    # In the functions that touch a file, so that a method's options and sizes are known without torch.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

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
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise AdapterError(f"{path}: not a whole safetensors file ({why}); copy or save it again") from None
    return config, {name: _as_fp32(name, tensor, path) for name, tensor in tensors.items()}


def _as_fp32(name: str, tensor: torch.Tensor, path: Path) -> torch.Tensor:
    found = str(tensor.dtype).removeprefix("torch.")
    if found not in {dtype.torch_name for dtype in FILE_DTYPES.values()}:
        raise AdapterError(f"{path}: {name}: expected one of {', '.join(FILE_DTYPES)}, got {found}")
    numbers = tensor.float()
    if not numbers.isfinite().all():
        raise AdapterError(f"{path}: {name}: expected finite values, got NaN or infinity; train it again")
    return numbers


def _expect_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise AdapterError(f"{folder}: no such adapter folder; expected one with {CONFIG} and {WEIGHTS}")


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"{path}: no such file; expected a folder as PEFT's save_pretrained writes it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise AdapterError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise AdapterError(f"{path}: expected a JSON object, got {type(config).__name__}")
    return config


def place_of(name: str, path: Path, shape: BackboneShape) -> tuple[int, str, str]:
    """(layer, module, rest) of a PEFT tensor name. AdapterError where this backbone has no such place."""
    match = _PLACE.fullmatch(name)
    if match is None or match[2] not in _MODULE_OF_PATH:
        raise AdapterError(f"{path}: {name}: expected a tensor of one of the seven linears of a Llama-family layer")
    return _layer(match[1], name, path, shape), _MODULE_OF_PATH[match[2]], match[3]


def layer_of(name: str, path: Path, shape: BackboneShape) -> tuple[int, str]:
    """(layer, rest) of the name of a tensor that belongs to a whole layer. AdapterError as `place_of` does."""
    match = _OF_LAYER.fullmatch(name)
    if match is None:
        raise AdapterError(f"{path}: {name}: expected a tensor of a Llama-family layer")
    return _layer(match[1], name, path, shape), match[2]


def _layer(digits: str, name: str, path: Path, shape: BackboneShape) -> int:
    # Compared as text first: a number of thousands of digits is none that Python reads.
    if len(digits) > 9 or int(digits) >= shape.layers:
        raise AdapterError(
            f"{path}: {name[:200]}: the backbone has {shape.layers} layers; the adapter was made for another backbone"
        )
    return int(digits)


def expect_size(
    path: Path, name: str, tensor: torch.Tensor, size: tuple[int, ...], peers: Iterable[torch.Tensor] = ()
) -> None:
    """AdapterError where a tensor has another size than this backbone wants. `peers`: the same tensor of other layers,
    which tell a damaged file from one that was made for another backbone."""
    found = tuple(tensor.shape)
    if found == size:
        return
    why = "the adapter was made for another backbone"
    if len(found) == len(size) == 2 and found == size[::-1]:
        why = "it is transposed"
    elif any(tuple(peer.shape) == size for peer in peers):
        why = "in other layers it has that size, so the file is damaged"
    raise AdapterError(f"{path}: {name}: expected size {list(size)}, got {list(found)}; {why}")


def expect_places(path: Path, missing: Iterable[tuple[int, str]], present: Iterable[int], shape: BackboneShape) -> None:
    """AdapterError where tensors are `missing`: (layer, name) of each. `present`: the layers that have some."""
    missing, layers = sorted(missing), set(present)
    if not missing:
        return
    more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
    shallow = layers and layers == set(range(len(layers))) and {layer for layer, _ in missing}.isdisjoint(layers)
    why = "the file is not whole"
    if shallow and len(layers) < shape.layers:
        why = f"it has the first {len(layers)} layers only: it is not whole, or was made for another backbone"
    raise AdapterError(f"{path}: {missing[0][1]}{more}: expected by {CONFIG}, got no such tensor; {why}")


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes an adapter folder; each file appears whole or not at all. AdapterError where it can't be written."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

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

"""What a killed training goes on from, without pickle: tensors as safetensors, everything else as JSON.

A checkpoint is whole when its manifest, which is written last and names the sha256 of every file, says so; a file that
was cut, changed or taken away since makes it torn, and the one before it is gone on from.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from perfbench.files import strict_json

MANIFEST = "complete.json"
TRAINER_STATE = "trainer_state.json"
WEIGHTS = "trainable.safetensors"
_OPTIMISER, _OPTIMISER_JSON = "optimiser.safetensors", "optimiser.json"


def seal(folder: Path, step: int) -> None:
    """Declares the files of `folder` to be the whole checkpoint of `step`."""
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
    temporary = folder / f".{MANIFEST}.tmp"
    with temporary.open("w", encoding="utf-8") as out:
        json.dump({"step": step, "files": files}, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    temporary.replace(folder / MANIFEST)


def fault_of(folder: Path) -> str | None:
    """Why the checkpoint can't be gone on from, in a line; None where it is as it was sealed."""
    try:
        content = strict_json.parse((folder / MANIFEST).read_bytes())
        step, files = content["step"], dict(content["files"])
        for name in (TRAINER_STATE, WEIGHTS, _OPTIMISER, _OPTIMISER_JSON):
            if name not in files:
                return f"{MANIFEST} does not name {name}"
        for name, expected in files.items():
            if _sha256(folder / Path(name).name) != expected:
                return f"{name} is not the file that was written"
        if step != step_of(folder):
            return f"{MANIFEST} is that of step {step}"
    except OSError as error:
        return f"{Path(error.filename).name} can't be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def step_of(folder: Path) -> int:
    """The step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("checkpoint-"))


def all_in(folder: Path) -> Sequence[Path]:
    """Every checkpoint in `folder`, torn ones too, by step."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted((path for path in found if path.is_dir()), key=step_of)


def last_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint in `folder`, None where there is none; and why each newer one is not, in a line."""
    torn: list[str] = []
    for path in reversed(all_in(folder)):
        fault = fault_of(path)
        if fault is None:
            return path, torn
        torn.append(f"{path}: torn: {fault}")
    return None, torn


def keep_two(newest: Path) -> None:
    """Deletes what is in the folder of `newest`, but for it and the one before it."""
    before = [path for path in all_in(newest.parent) if step_of(path) < step_of(newest)][-1:]
    for path in all_in(newest.parent):
        if path != newest and path not in before:
            shutil.rmtree(path)


# --- what is in it ----------------------------------------------------------------------------------------------------


def write_optimiser(folder: Path, optimiser: Any, scheduler: Any) -> None:
    """The state of both: tensors by the parameter's number and their name, the rest as JSON."""
    state = optimiser.state_dict()
    tensors = {
        f"{number}.{name}": value.contiguous()
        for number, entries in state["state"].items()
        for name, value in entries.items()
    }
    save_file(tensors, folder / _OPTIMISER)
    rest = {"groups": state["param_groups"], "scheduler": scheduler.state_dict()}
    (folder / _OPTIMISER_JSON).write_text(json.dumps(rest), encoding="utf-8")


def read_optimiser(folder: Path, optimiser: Any, scheduler: Any) -> None:
    """Puts back what `write_optimiser` wrote."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(folder / _OPTIMISER).items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    rest = strict_json.parse((folder / _OPTIMISER_JSON).read_bytes())
    optimiser.load_state_dict({"state": state, "param_groups": rest["groups"]})
    scheduler.load_state_dict(rest["scheduler"])


def write_random(folder: Path, process: int) -> None:
    """The states of this process's generators: torch's as tensors, Python's and NumPy's as JSON."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    tensors_file, json_file = _random_files(folder, process)
    save_file(tensors, tensors_file)
    name, keys, *rest = np.random.get_state()
    others = {"python": random.getstate(), "numpy": [name, np.asarray(keys).tolist(), *rest]}
    json_file.write_text(json.dumps(others), encoding="utf-8")


def read_random(folder: Path, process: int) -> None:
    """Puts back what `write_random` wrote."""
    tensors_file, json_file = _random_files(folder, process)
    tensors, others = load_file(tensors_file), strict_json.parse(json_file.read_bytes())
    version, internal, gauss = others["python"]
    random.setstate((version, tuple(internal), gauss))
    np.random.set_state(tuple(others["numpy"]))
    torch.set_rng_state(tensors["cpu"])
    if "cuda" in tensors:
        torch.cuda.set_rng_state(tensors["cuda"])


def _random_files(folder: Path, process: int) -> tuple[Path, Path]:
    return folder / f"random_{process}.safetensors", folder / f"random_{process}.json"


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

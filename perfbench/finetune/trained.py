"""The methods that are trained: how one is put on a model, saved, loaded, and how many parameters it has.

    module = trained.attach(model, "para", None, seed=0)    # a module to train; `model` is changed in place
    trained.begin(module, steps=1000)                       # before the first optimiser step
    ...; trained.after_step(module, step)                   # after each, before the gradients are zeroed
    trained.save(module, folder)                            # what `perfbench.methods` serves, where it is served
    module = trained.load(another_model, folder)

A method of PEFT's, or one that perfbench adds to PEFT's types, also works with `peft.get_peft_model`,
`save_pretrained` and `from_pretrained` alone.
"""

from __future__ import annotations

import dataclasses
import importlib
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from peft.utils.peft_types import PeftType
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.errors import AdapterError, FinetuneError, nearest
from perfbench.finetune.baselines import peft_own, ssp
from perfbench.finetune.trained_table import BASELINES, trainable, unknown_method
from perfbench.methods import parameters
from perfbench.methods.checkpoints import adapter_folder
from perfbench.methods.registry import METHODS, reader_of
from perfbench.methods.shape import BackboneShape

# Their configurations are types of PEFT's once these are imported, which `load` needs for a folder of theirs.
from perfbench.peft import known_warnings, para, projected_ia3  # noqa: F401

# (model, shape, options) -> the module to train
Attach = Callable[[Any, BackboneShape, Any], Any]


@dataclass(frozen=True)
class TrainedMethod:
    """How one method is trained, and with which options."""

    options: type[Any]
    attach: Attach


def find(name: str) -> TrainedMethod:
    """The method called `name`. FinetuneError with the nearest name on one that is unknown or can't be trained."""
    if name in BASELINES:
        baseline = BASELINES[name]
        file = importlib.import_module(f"perfbench.finetune.baselines.{baseline.file}")
        made = getattr(file, baseline.attach)
        return TrainedMethod(getattr(file, baseline.options), _peft(made) if baseline.by_peft else made)
    if name not in trainable():
        raise FinetuneError(f"method: {unknown_method(name)}")
    method = METHODS[name]
    module, function = str(method.trained_by).split(":")
    config = getattr(importlib.import_module(module), function)
    return TrainedMethod(method.options, _peft(partial(config, parameters.implementation(name))))


def _peft(config: Callable[[BackboneShape, Any], peft.PeftConfig]) -> Attach:
    """A method that PEFT puts on the model, by its configuration."""

    def attach(model: Any, shape: BackboneShape, options: Any) -> Any:
        with known_warnings.unsaid():
            return peft.get_peft_model(model, config(shape, options))

    return attach


def options_of(name: str, options: Any) -> Any:
    """The options of method `name`: `options` itself, or made of a mapping, or the default ones of None.

    FinetuneError on an unknown key, on values that exclude each other, and on `adapters`, which is for serving.
    """
    made_of = find(name).options
    if options is None:
        return made_of()
    if isinstance(options, Mapping):
        known = [field.name for field in dataclasses.fields(made_of) if field.name != "adapters"]
        for key in options:
            if key not in known:
                raise FinetuneError(f"method.{name}: unknown option {key!r}; {nearest(str(key), known)}")
        try:
            options = made_of(**options)
        except ValueError as error:
            raise FinetuneError(f"method.{name}: {error}") from None
    if not isinstance(options, made_of):
        raise TypeError(f"{name}: expected {made_of.__name__}, got {type(options).__name__}")
    if getattr(options, "adapters", None) is not None:
        raise FinetuneError(f"method.{name}: adapters are for serving; training starts from the initial values")
    return options


def attach(model: Any, name: str, options: Any, seed: int) -> Any:
    """Puts method `name` on a Hugging Face model and returns the module to train; only its parameters want gradients.

    The same seed gives the same initial values; the global random state stays as it is. FinetuneError on an unknown
    method or option, and on one that does not fit the model.
    """
    method, options = find(name), options_of(name, options)
    shape = BackboneShape.of_config(model.config.to_dict())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            module = method.attach(model, shape, options)
        except ValueError as error:
            raise FinetuneError(f"method.{name}: {str(error).splitlines()[0]}") from None
    if not isinstance(module, peft.PeftModel):
        module.perfbench_method = (name, options)  # what `save` writes
    return module


def begin(module: Any, steps: int) -> None:
    """To be called before the first optimiser step, of `steps` in all: when AdaLoRA prunes, how long SSP searches."""
    peft_own.begin(module, steps)
    ssp.begin(module, steps)


def after_step(module: Any, step: int) -> None:
    """To be called after optimiser step `step` (from 1 on) and before the gradients are zeroed."""
    peft_own.after_step(module, step)
    ssp.after_step(module, step)


def settled_at(module: Any, steps: int) -> int:
    """After which of `steps` optimiser steps the method is as large as it will be served; 0 where it always is.

    Before, AdaLoRA has more ranks than its budget and SSP is still searching: no adapter to choose.
    """
    return max(peft_own.settled_at(module, steps), ssp.settled_at(module, steps))


def penalty(module: Any, share: float) -> AbstractContextManager[None]:
    """Within it what a method adds to the loss of the answer (AdaLoRA's orthogonality) counts `share` of its weight."""
    return peft_own.penalty(module, share)


def kept_parameters(module: Any) -> int:
    """Trainable parameters that are saved: without those that a method has given up in training."""
    return sum(p.numel() for p in _trainable(module).values()) - peft_own.given_up(module)


def training_state(module: Any) -> dict[str, torch.Tensor]:
    """All that must be kept of the module, beside the optimiser's state, to go on later as if nothing had happened."""
    return {**_trainable(module), **peft_own.extra_state(module), **ssp.extra_state(module)}


def restore_training_state(module: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Puts back what `training_state` gave, into a module that was attached alike and after `begin`.

    FinetuneError where it does not fit.
    """
    ssp.fit(module, tensors)
    for name, parameter in _trainable(module).items():
        if name not in tensors or tensors[name].shape != parameter.shape:
            raise FinetuneError(f"checkpoint: {name}: missing or of another size; start the run anew")
        parameter.copy_(tensors[name])
    peft_own.restore_extra_state(module, dict(tensors))
    ssp.restore_extra_state(module, dict(tensors))


def _trainable(module: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def save(module: Any, folder: Path) -> None:
    """Writes the adapter; each file appears whole or not at all. AdapterError where it can't be written.

    A baseline that PEFT does not know is saved from a module that is trained, not from one loaded to be used.
    """
    folder = Path(folder)
    if not isinstance(module, peft.PeftModel):
        name, options = module.perfbench_method
        if not _trainable(module):
            raise AdapterError(f"{folder}: nothing of the module is trainable; load it with trainable=True to save it")
        config = {
            "peft_type": OURS,
            "method": name,
            "options": dataclasses.asdict(options),
            "base_model_name_or_path": module.config.name_or_path,
        }
        adapter_folder.write(folder, config, _trainable(module))
        return
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            # PEFT takes a module that AdaLoRA has left no rank for one whose weights were not gathered, and a bias too.
            saved = module.active_peft_config
            if saved.peft_type == PeftType.ADALORA or getattr(saved, "lora_bias", False):
                warnings.filterwarnings("ignore", message=r"Adapter .* LoRA tensor\(s\) have invalid shape")
            # Without being told PEFT would ask the hub whether the vocabulary has grown.
            module.save_pretrained(str(temporary), save_embedding_layers=False)
        for file in (adapter_folder.WEIGHTS, adapter_folder.CONFIG):
            (temporary / file).replace(folder / file)
    except OSError as error:
        raise AdapterError(f"{folder}: can't write the adapter ({error})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load(model: Any, folder: Path, *, trainable: bool = False) -> Any:
    """The module that `save` wrote, on a model of the same backbone, which is changed in place.

    AdapterError where the folder is malformed or made for another backbone; the model is then as it was.
    """
    folder = Path(folder)
    kind = adapter_folder.peft_type(folder)
    if kind == OURS:
        return _load_ours(model, folder, trainable)
    _check(folder, BackboneShape.of_config(model.config.to_dict()))
    if trainable and kind in _SOFT_TOKENS:
        raise FinetuneError(f"{folder}: PEFT can't go on training soft tokens from a folder; resume the run instead")
    with known_warnings.unsaid():
        module = peft.PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)
    return module if trainable else module.requires_grad_(False)


def is_soft(module: Any) -> bool:
    """Whether PEFT puts trained tokens, or their keys and values, before the prompt: the other soft tokens here leave a
    row's length, padding and logits as they are."""
    return isinstance(module, peft.PeftModel) and module.active_peft_config.is_prompt_learning


_SOFT_TOKENS = (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.PREFIX_TUNING)

# `peft_type` of the baselines that PEFT does not know.
OURS = "PERFBENCH"


def _load_ours(model: Any, folder: Path, trainable: bool) -> Any:
    config, tensors = adapter_folder.read(folder, OURS)
    path = folder / adapter_folder.WEIGHTS
    if config.get("method") not in BASELINES:
        raise AdapterError(f"{folder / adapter_folder.CONFIG}: method: got {config.get('method')!r}, which is unknown")
    name, options = config["method"], config.get("options")
    with torch.device("meta"):
        expected = attach(AutoModelForCausalLM.from_config(model.config), name, options, seed=0)
        ssp.fit(expected, tensors)
    sizes = {name: tuple(t.shape) for name, t in _trainable(expected).items()}
    for tensor in sorted(sizes.keys() ^ tensors.keys()):
        raise AdapterError(f"{path}: {tensor}: expected on one side only; the adapter was made for another backbone")
    for tensor, size in sizes.items():
        adapter_folder.expect_size(path, tensor, tensors[tensor], size)
    loaded_in = {weight: parameter.dtype for weight, parameter in model.named_parameters()}
    module = attach(model, name, options, seed=0)
    restore_training_state(module, tensors)
    if trainable:
        return module
    for weight, parameter in module.named_parameters():  # full fine-tuning's are in fp32 as long as they are trained
        parameter.data = parameter.data.to(loaded_in.get(weight, parameter.dtype))
    return module.requires_grad_(False)


def _check(folder: Path, shape: BackboneShape) -> None:
    """AdapterError unless the folder holds a whole adapter of a known type for a backbone of this shape."""
    described = adapter_folder.describe(folder)
    kind = described.get("peft_type")
    if (name := reader_of(described)) is not None:
        parameters.implementation(name).load(folder, shape, METHODS[name].options())
        return
    if kind not in _SOFT_TOKENS:
        raise AdapterError(f"{folder / adapter_folder.CONFIG}: peft_type: got {kind!r}, which can't be loaded")
    config, tensors = adapter_folder.read(folder, kind)
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim
    size = (int(config.get("num_virtual_tokens") or 0), kv if kind == PeftType.PREFIX_TUNING else shape.hidden)
    for name, tensor in tensors.items():
        adapter_folder.expect_size(folder / adapter_folder.WEIGHTS, name, tensor, size)


def parameter_count(name: str, config: Mapping[str, Any], options: Any = None) -> int:
    """Trainable parameters of method `name` on the backbone of a Hugging Face `config.json`; allocates no weights."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **fields))
        module = attach(model, name, options, seed=0)
    return kept_parameters(module)

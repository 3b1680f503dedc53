"""What every method file offers, and what follows from it for all of them alike.

A method file is a module with

- `Options`: the frozen dataclass of what it can be told (`perfbench.methods.options`);
- `shapes(shape, options) -> {name: size}`: the trainable parameters of one adapter, nothing allocated;
- `initialise(name, tensor, generator)`: fills one of them with the papers' initial values, `generator` being on the
  tensor's device;
- `randomise(name, tensor, generator)`: fills one with values as a trained adapter might have, likewise;
- `measure_by(parameters, linear_of)`, only where the method counts in lengths of the backbone's weights: turns both
  kinds of values into ones for the backbone that has these linears;
- `fit(parameters, options, input_rms)`, only where the method reads the residual stream: changes random parameters
  so that they suit a backbone whose layers' inputs have these root mean squares;
- `plan(parameters, shape, options) -> AdapterPlan`;
- `save(parameters, shape, options, folder, backbone)` and `load(folder, shape, options) -> AdapterPlan`.

`parameters` is a dict from name to tensor, fp32 on one device; `load` reads to the CPU. The files here import torch
inside functions alone, so that options and sizes are known without it; `perfbench.testing.check_method` checks a file.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from perfbench.methods.plan import AdapterPlan, LinearOf
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.methods.sizes import Sized

if TYPE_CHECKING:
    import torch

Parameters: TypeAlias = "dict[str, torch.Tensor]"


def implementation(method: str) -> Any:
    """The module that implements `method` (a key of METHODS other than `none`)."""
    module = METHODS[method].module
    if module is None:
        raise ValueError(f"{method} has no adapters")
    return importlib.import_module(module)


def parameter_count(method: str, shape: BackboneShape, options: Any) -> int:
    """Trainable parameters of one adapter, of a converted one before its conversion; exact, allocates nothing."""
    if METHODS[method].module is None:
        return 0
    if (source := getattr(options, "source", None)) is not None:
        method, options = source
    sizes = implementation(method).shapes(shape, options)
    return sum(map(math.prod, sizes.values()))


def served_count(method: str, shape: BackboneShape, options: Any) -> int:
    """Numbers that one adapter's plan holds; times the bytes of each it is what a tenant takes. Without torch where
    `sized_plan` is."""
    return sum(tensor.numel() for layer in sized_plan(method, shape, options) for tensor in layer.tensors())


def sized_plan(method: str, shape: BackboneShape, options: Any) -> AdapterPlan:
    """The plan of one adapter, its sizes alone: by the method's own `plan` on stand-ins, without torch; on torch's meta
    device where `plan` needs more of a tensor."""
    module = implementation(method)
    sizes: Any = {name: Sized(*size) for name, size in module.shapes(shape, options).items()}
    try:
        plan: AdapterPlan = module.plan(sizes, shape, options)
    except (AttributeError, TypeError):
        plan = meta_plan(method, shape, options)
    return plan


def make(
    method: str,
    shape: BackboneShape,
    options: Any,
    seed: int,
    *,
    initial: bool = False,
    input_rms: Sequence[float] | None = None,
    device: torch.device | str = "cpu",
    linear_of: LinearOf | None = None,
) -> Parameters:
    """One adapter's parameters, fp32 on `device`: the papers' initial values, or random ones as after training.

    The same seed gives the same adapter on every machine with the same kind of device, and another one on another
    kind, since each has a generator of its own; different seeds differ. input_rms: root mean square of each layer's
    input in the backbone that random ones are for (`Backbone.input_rms`); None: 1. linear_of: that backbone's linears;
    None: rows of length 1.
    """
    import torch

    module = implementation(method)
    generator = torch.Generator(device).manual_seed(seed)
    fill = module.initialise if initial else module.randomise
    parameters = {}
    for name, size in module.shapes(shape, options).items():
        parameters[name] = torch.empty(size, device=device)
        fill(name, parameters[name], generator)
    if linear_of is not None and hasattr(module, "measure_by"):
        module.measure_by(parameters, linear_of)
    if input_rms is not None and not initial and hasattr(module, "fit"):
        module.fit(parameters, options, input_rms)
    return parameters


def meta_plan(method: str, shape: BackboneShape, options: Any) -> AdapterPlan:
    """The plan of one adapter on the meta device: every size, no memory."""
    import torch

    module = implementation(method)
    with torch.device("meta"):
        parameters = {name: torch.empty(size) for name, size in module.shapes(shape, options).items()}
        plan: AdapterPlan = module.plan(parameters, shape, options)
    return plan

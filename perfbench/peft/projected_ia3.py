"""The papers' (IA)3 as a PEFT type: `peft.get_peft_model(model, ProjectedIa3Config(dim=16))`.

y = (x W) * (1 + z P) on Q, K and Up. z and P themselves are kept in the saved folder, so that training can go on from
it; `perfbench.methods.ia3.load` makes one vector of them to serve. PEFT's own type IA3 is the original, which has
other modules and no P.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn

from perfbench.kernels import row_scale
from perfbench.methods import ia3
from perfbench.methods.checkpoints.projected_ia3 import TENSORS
from perfbench.methods.shape import MODULE_PATHS, BackboneShape
from perfbench.peft.register import register


@dataclass
class ProjectedIa3Config(PeftConfig):
    """`dim` of z; `target_modules`: by default Q, K and Up, the only ones that can be served."""

    dim: int = field(default=16)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["PROJECTED_IA3"]
        if self.dim < 1:
            raise ValueError(f"dim: expected an integer >= 1, got {self.dim}")
        if self.target_modules is None:
            self.target_modules = [MODULE_PATHS[module] for module in ia3.IA3_MODULES]


def config(method: Any, shape: BackboneShape, options: ia3.Ia3Options) -> ProjectedIa3Config:
    """The configuration for `peft.get_peft_model`."""
    return ProjectedIa3Config(task_type="CAUSAL_LM", dim=options.dim)


class ProjectedIa3Linear(nn.Module, BaseTunerLayer):
    """A linear with z [dim] and P [dim, D_out] of each adapter."""

    adapter_layer_names = tuple(f"projected_ia3_{kind}" for kind in TENSORS)

    def __init__(self, base_layer: nn.Linear):
        super().__init__()
        self.base_layer = base_layer
        self.projected_ia3_z, self.projected_ia3_p = nn.ParameterDict(), nn.ParameterDict()

    def add(self, adapter: str, config: ProjectedIa3Config) -> None:
        """z and P with the papers' initial values, on the device and in the dtype of the linear."""
        sizes = {"z": (config.dim,), "p": (config.dim, self.base_layer.out_features)}
        for kind in TENSORS:
            tensor = torch.empty(sizes[kind], dtype=torch.float32, device="cpu")
            ia3.initialise(f".{kind}", tensor, torch.default_generator)
            getattr(self, f"projected_ia3_{kind}")[adapter] = nn.Parameter(tensor)
        self._move_adapter_to_device_of_base_layer(adapter)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The linear's own forward, scaled."""
        y = self.base_layer(x, *args, **kwargs)
        for name in () if self.disable_adapters else self.active_adapters:
            if name not in self.projected_ia3_z:
                continue
            minus_one = ia3.scale_minus_one(self.projected_ia3_z[name], self.projected_ia3_p[name])
            y = row_scale.scaled(y, minus_one[None].to(y.dtype))
        return y


class ProjectedIa3Model(BaseTuner):
    """What `peft.get_peft_model` puts around the backbone."""

    prefix = "projected_ia3_"
    tuner_layer_cls = ProjectedIa3Linear

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        if isinstance(target, ProjectedIa3Linear):
            layer = target
        elif isinstance(target, nn.Linear):
            layer = ProjectedIa3Linear(target)
            layer._active_adapter = adapter_name
            self._replace_module(parent, target_name, layer, target)
        else:
            raise ValueError(f"{current_key}: expected a torch Linear, got {type(target).__name__}")
        layer.add(adapter_name, peft_config)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT would ignore the names of a mixed batch without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("the papers' (IA)3 in PEFT has no mixed batches; serve the adapters with perfbench")
        yield


register("projected_ia3", ProjectedIa3Config, ProjectedIa3Model)

"""PARA as a PEFT type: `peft.get_peft_model(model, ParaConfig(rank=12))`.

A decoder layer is wrapped. Before it sees a prompt its generator makes the vectors from the last prompt token, and
they stay while tokens are generated. Sizes, initial values and arithmetic are those that serve the adapter; the saved
folder is what `perfbench.methods.para.load` reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn

from perfbench.kernels import row_scale, vector_generator
from perfbench.methods import para
from perfbench.methods.checkpoints.para import POOLS, TENSORS
from perfbench.methods.para import ParaOptions
from perfbench.methods.shape import LLAMA_FAMILY, MODULE_PATHS, BackboneShape
from perfbench.peft.register import register

# What the loss does not count, in Hugging Face's models.
IGNORED = -100


@dataclass
class ParaConfig(PeftConfig):
    """`rank` of the generator's bottleneck; `pool`: `residual` (the paper) or `normalised` (the layer's normalised
    input). `target_modules`: the decoder layers, as a regular expression; only all of them can be served."""

    rank: int = field(default=12)
    pool: str = field(default="residual")
    target_modules: str = field(default=r"model\.layers\.\d+")
    exclude_modules: str | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["PARA"]
        if self.rank < 1:
            raise ValueError(f"rank: expected an integer >= 1, got {self.rank}")
        if self.pool not in POOLS:
            raise ValueError(f"pool: expected one of {', '.join(POOLS)}, got {self.pool!r}")


def config(method: Any, shape: BackboneShape, options: ParaOptions) -> ParaConfig:
    """The configuration for `peft.get_peft_model`."""
    return ParaConfig(task_type="CAUSAL_LM", rank=options.rank, pool=options.pool)


def last_prompt_token(
    inputs: torch.Tensor, labels: torch.Tensor | None, attention_mask: torch.Tensor | None
) -> torch.Tensor:
    """int64 [B]: where the prompt of each row ends, for inputs [B, S] or [B, S, hidden], padded on either side.

    With labels it is the token before the first one that counts (a label on the very first token never does);
    without, or where none counts, the last token that is attended. ValueError where the mask is not [B, S].
    """
    rows, length = inputs.shape[:2]
    if attention_mask is None:
        last = torch.full((rows,), length - 1, device=inputs.device)
    elif attention_mask.dim() != 2:
        raise ValueError(f"the prompt's end: expected an attention mask [B, S], got {list(attention_mask.shape)}")
    else:
        last = (attention_mask * torch.arange(length, device=inputs.device)).argmax(dim=1)
    if labels is None:
        return last
    first = (labels[:, 1:] != IGNORED).int().argmax(dim=1)  # counted from the second token on, so one before it
    return torch.where((labels[:, 1:] != IGNORED).any(dim=1), first, last)


class Prompts:
    """Where the prompts of the batch in flight end; noted before the model's forward, read by its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.last: torch.Tensor | None = None  # int64 [B]
        self._hooks = (
            model.register_forward_pre_hook(self._note, with_kwargs=True),
            model.register_forward_hook(self._forget, always_call=True),
        )

    def release(self) -> None:
        """Takes the hooks off the model."""
        for hook in self._hooks:
            hook.remove()

    def _forget(self, model: nn.Module, args: Any, output: Any) -> None:
        self.last = None

    def _note(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = args[0] if args else kwargs.get("input_ids")
        if inputs is None:
            inputs = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        if cache is None or cache.get_seq_length() == 0:
            self.last = last_prompt_token(inputs, kwargs.get("labels"), kwargs.get("attention_mask"))


class ParaLayer(nn.Module, BaseTunerLayer):
    """A decoder layer with PARA's generators, one for each adapter."""

    adapter_layer_names = tuple(f"para_{kind}" for kind in TENSORS)
    other_param_names = ("configs",)

    def __init__(self, base_layer: Any, prompts: Prompts):
        super().__init__()
        self.base_layer: Any = base_layer
        self.para_w_down, self.para_w_up, self.para_bias = (nn.ParameterDict() for _ in TENSORS)
        self.configs: dict[str, ParaConfig] = {}
        self.prompts = prompts
        self.kept: dict[str, torch.Tensor] | None = None  # module -> l - 1 [B, D_out], of the prompts in flight
        self._bound: dict[str, torch.Tensor] | None = None  # the same, inside one forward of the layer
        hooks = [base_layer.get_submodule("self_attn").register_forward_pre_hook(self._bind, with_kwargs=True)]
        for module in para.PARA_MODULES:
            linear = base_layer.get_submodule(MODULE_PATHS[module])
            hooks.append(linear.register_forward_hook(partial(self._scale, module)))
        self._hooks = hooks

    def add(self, adapter: str, config: ParaConfig, sizes: dict[str, tuple[int, ...]]) -> None:
        """A generator with the papers' initial values, on the device and in the dtype of the layer."""
        weight = self.base_layer.get_submodule(MODULE_PATHS["q"]).weight
        for kind in TENSORS:
            tensor = torch.empty(sizes[kind], dtype=torch.float32, device="cpu")
            para.initialise(f".{kind}", tensor, torch.default_generator)
            getattr(self, f"para_{kind}")[adapter] = nn.Parameter(tensor.to(weight.device, weight.dtype))
        self.configs[adapter] = config
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def release(self) -> None:
        """Takes the hooks off the wrapped layer."""
        for hook in self._hooks:
            hook.remove()

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The layer's own forward. An empty cache, not S > 1, is what tells a prompt from a generated token."""
        adapter = self._adapter()
        if adapter is None:
            self.kept = None
        else:
            cache = kwargs.get("past_key_values")
            if cache is None or cache.get_seq_length(self.base_layer.self_attn.layer_idx) == 0:
                self.kept = self._vectors(adapter, hidden_states)
            elif self.kept is None:
                raise RuntimeError("PARA: the cache was filled without this adapter; process the prompt again with it")
        # As an argument, so that a checkpointed layer that is computed again in the backward has its own vectors.
        return self.base_layer(hidden_states, *args, para_vectors=self.kept, **kwargs)

    def _adapter(self) -> str | None:
        active = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.para_bias]
        if len(active) > 1:
            raise ValueError(f"PARA: expected one active adapter, got {', '.join(active)}")
        return active[0] if active else None

    def _vectors(self, adapter: str, hidden_states: torch.Tensor) -> dict[str, torch.Tensor]:
        w_down, w_up, bias = (getattr(self, f"para_{kind}")[adapter] for kind in TENSORS)
        last = self.prompts.last
        if last is None:
            raise RuntimeError("PARA: call the whole model, which knows the mask and the labels, not a part of it")
        pooled = hidden_states[torch.arange(len(last), device=hidden_states.device), last.to(hidden_states.device)]
        if self.configs[adapter].pool == "normalised":
            pooled = self.base_layer.input_layernorm(pooled)
        vectors = vector_generator.eager(pooled.to(w_down.dtype), w_down[None], w_up[None], bias[None] - 1)
        sizes = [self.base_layer.get_submodule(MODULE_PATHS[name]).out_features for name in para.PARA_MODULES]
        return dict(zip(para.PARA_MODULES, vectors.split(sizes, dim=1), strict=True))

    def _bind(self, attention: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._bound = kwargs.pop("para_vectors", None)
        return args, kwargs

    def _scale(self, name: str, linear: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor | None:
        return None if self._bound is None else row_scale.scaled(output, self._bound[name].to(output.dtype))

    def __getattr__(self, name: str) -> Any:
        """Models ask their layers for attributes, such as the kind of attention."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(self.base_layer, name)


class ParaModel(BaseTuner):
    """What `peft.get_peft_model` puts around the backbone."""

    prefix = "para_"
    tuner_layer_cls = ParaLayer

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Through `__call__`: before 0.20 PEFT goes past the hooks."""
        return self.model(*args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> Any:
        if model_config.get("model_type") not in LLAMA_FAMILY:
            raise ValueError(f"PARA: expected one of {', '.join(LLAMA_FAMILY)}, got {model_config.get('model_type')!r}")
        return peft_config

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
        if isinstance(target, ParaLayer):
            layer = target
        else:
            if "_prompts" not in self.__dict__:
                self._prompts = Prompts(self.model)
            layer = ParaLayer(target, self._prompts)
            layer._active_adapter = adapter_name
            self._replace_module(parent, target_name, layer, target)
        shape = BackboneShape.of_config(self.get_model_config(self.model))
        sizes = para.shapes(shape, ParaOptions(rank=peft_config.rank, pool=peft_config.pool))
        place = f"layers.{current_key.rsplit('.', 1)[1]}."
        layer.add(adapter_name, peft_config, {kind: sizes[place + kind] for kind in TENSORS})

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        if isinstance(child, ParaLayer):
            child.release()
            child.prompts.release()
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """PEFT would ignore the names of a mixed batch without a word."""
        if kwargs.get("adapter_names") is not None:
            raise ValueError("PARA in PEFT has no mixed batches; serve the adapters with perfbench")
        yield


register("para", ParaConfig, ParaModel)

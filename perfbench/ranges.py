"""Named ranges in a profile: phase, layer, module kind and method, put on from outside and taken off again.

A range is `METHOD / PHASE` (`lora / decode step 2`), `layer 3`, `layer 3 / q` or, where no layer is known, the kind
alone (`head`). Nothing of a runtime is edited: functions that it looks up by name are replaced while the context is
open. For runtime static everything that this relies on stands in `_static` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

# The public `record_function` costs 12 microseconds, as much as a small operation, and there are about 12 ranges in
# each layer; this one costs 1. It marks ranges as operators, which `trace.mark_ranges` puts right in the file.
from torch._C._profiler import _RecordFunctionFast
from torch.nn import ModuleList
from torch.profiler import record_function
from transformers.cache_utils import Cache

from perfbench.kernels import (
    decode_attention,
    low_rank,
    qkv_epilogue,
    residual_rmsnorm,
    swiglu_epilogue,
    vector_generator,
)
from perfbench.methods.shape import MODULE_PATHS
from perfbench.runtimes.generation import StepClock
from perfbench.runtimes.static import arm as static_arm
from perfbench.runtimes.static import decoder as static_decoder
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import AdaptedLinear, PlanArm

BIND = "bind adapters"
KV_CACHE = "kv cache"
VECTORS = "prompt vectors"
MODEL = "model"

# Where a module lives in a decoder layer of Hugging Face's model -> its kind; PEFT puts its own inside the linears.
LAYER_KINDS = {path: kind for kind, path in MODULE_PATHS.items()} | {
    "self_attn": "self attention",
    "mlp": "mlp",
    "input_layernorm": "norm",
    "post_attention_layernorm": "norm",
}
MODEL_KINDS = {"embed_tokens": "embed", "norm": "norm", "rotary_emb": "rotation"}


class Ranges:
    """The names of the ranges of one arm, and what makes them; `method` is the arm's label."""

    def __init__(self, method: str):
        self.method = method
        self.names: set[str] = set()

    def phase(self, step: int) -> str:
        """The name of the phase that chooses token `step`, counted from 0."""
        return f"{self.method} / {'prefill' if step == 0 else f'decode step {step}'}"

    def fast(self, name: str) -> Any:
        """A context of that name; one object may be entered again and again, not inside itself."""
        self.names.add(name)
        return _RecordFunctionFast(name)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` inside a range."""
        context = self.fast(name)

        def inside(*args: Any, **kwargs: Any) -> Any:
            with context:
                return function(*args, **kwargs)

        return inside

    @contextmanager
    def on(self, arm: Any, kernels: str) -> Iterator[None]:
        """While open, calls of `arm` make ranges. One arm at a time: some of them hang on names that arms share."""
        with ExitStack() as stack:
            if isinstance(arm, StaticArm):
                _static(stack, self, arm, kernels)
            else:
                _transformers(stack, self, arm)
            yield


class PhaseClock(StepClock):
    """Opens the range of each phase as the one before it ends; what follows the last token has none."""

    def __init__(self, device: torch.device, ranges: Ranges, new_tokens: int):
        super().__init__(device)
        self._names = iter([ranges.phase(step) for step in range(new_tokens)])
        self._open: Any = None

    def mark(self) -> None:
        """The end of a phase, and before the first call of `generate` the start of one."""
        super().mark()
        if self._open is not None:
            self._open.__exit__(None, None, None)
        name = next(self._names, None)
        self._open = None if name is None else record_function(name)
        if self._open is not None:
            self._open.__enter__()


def _replace(stack: ExitStack, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    """owner.name becomes make(owner.name) until the stack is closed. AttributeError where there is no such name."""
    had = name in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    stack.callback(lambda: setattr(owner, name, before) if had else delattr(owner, name))


def _transformers(stack: ExitStack, ranges: Ranges, arm: Any) -> None:
    """Ranges around the modules of a Hugging Face model, PEFT's too, and around what perfbench adds to them."""

    def around(owner: Any, attribute: str, name: str) -> None:
        _replace(stack, owner, attribute, lambda function: ranges.around(name, function))

    # PEFT's model.model is Hugging Face's whole model; the one with the layers is further in.
    base = next(module for module in arm.model.modules() if isinstance(getattr(module, "layers", None), ModuleList))
    around(base, "forward", MODEL)
    for path, kind in MODEL_KINDS.items():
        around(base.get_submodule(path), "forward", kind)
    around(arm.model.get_output_embeddings(), "forward", "head")
    for number, layer in enumerate(base.layers):
        # __call__ of the layer runs PARA's hook before forward: the range has to begin before the hook.
        layer_range = ranges.fast(f"layer {number}")
        hooks = (
            layer.register_forward_pre_hook(lambda *_, at=layer_range: at.__enter__(), prepend=True),
            layer.register_forward_hook(lambda *_, at=layer_range: at.__exit__(None, None, None), always_call=True),
        )
        for hook in hooks:
            stack.callback(hook.remove)
        for path, kind in LAYER_KINDS.items():
            module = layer.get_submodule(path)
            around(module, "forward", f"layer {number} / {kind}")
            if isinstance(module, AdaptedLinear):
                for attribute in ("_low_rank", "_row_scale"):
                    around(module, attribute, f"layer {number} / {kind} / {ranges.method}{attribute.replace('_', ' ')}")
            elif hasattr(module, "lora_A"):
                for attribute in ("lora_A", "lora_B"):
                    for part in getattr(module, attribute).values():
                        around(part, "forward", f"layer {number} / {kind} / {ranges.method} {attribute}")
    if isinstance(arm, PlanArm):
        around(arm, "_bind", BIND)
        for vectors in arm._vectors:
            around(vectors, "_generate", VECTORS)
    for method in ("update", "reorder_cache", "batch_repeat_interleave"):
        around(Cache, method, KV_CACHE)


# The forms of the operations that the static decoder looks up for each batch -> the kind of each.
STATIC_FORMS: tuple[tuple[dict[str, Any], str], ...] = (
    (low_rank.SHRINKS, "shrink"),
    (qkv_epilogue.FORMS, "qkv epilogue"),
    (decode_attention.FORMS, "attention"),
    (residual_rmsnorm.FORMS, "residual norm"),
    (swiglu_epilogue.FORMS, "swiglu epilogue"),
)


def _static(stack: ExitStack, ranges: Ranges, arm: StaticArm, kernels: str) -> None:
    """Ranges around what runtime static calls by name. It relies on: the tables of forms above, read when a decoder
    is made for a batch; `product(x, weight, ...)`, `scaled_dot_product_attention` and `bind`, names of the modules
    decoder and arm; and arm.weights, whose matrices say which product it is, and so in which layer."""
    products = {
        weight.data_ptr(): (number, kind)
        for number, layer in enumerate(arm.weights.layers)
        for kind, weight in layer.weights.items()
    }
    layer_in_flight = [0]
    contexts: dict[str, Any] = {}

    def in_layer(kind: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inside(*args: Any, **kwargs: Any) -> Any:
            name = f"layer {layer_in_flight[0]} / {kind}"
            context = contexts.get(name) or contexts.setdefault(name, ranges.fast(name))
            with context:
                return function(*args, **kwargs)

        return inside

    def known_product(function: Callable[..., Any]) -> Callable[..., Any]:
        head = ranges.around("head", function)
        by_kind = {kind: in_layer(kind, function) for _, kind in products.values()}

        def inside(x: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found = products.get(weight.data_ptr())
            if found is None:
                return head(x, weight, *args, **kwargs)
            layer_in_flight[0], kind = found
            return by_kind[kind](x, weight, *args, **kwargs)

        return inside

    _replace(stack, static_decoder, "product", known_product)
    attention = "scaled_dot_product_attention"
    _replace(stack, static_decoder, attention, lambda function: in_layer("attention", function))
    _replace(stack, static_arm, "bind", lambda function: ranges.around(BIND, function))
    generator = ranges.around(VECTORS, vector_generator.FORMS[kernels])  # runs before its layer's first product
    made = [(forms, in_layer(kind, forms[kernels])) for forms, kind in STATIC_FORMS]
    for forms, inside in (*made, (vector_generator.FORMS, generator)):
        stack.callback(forms.__setitem__, kernels, forms[kernels])
        forms[kernels] = inside

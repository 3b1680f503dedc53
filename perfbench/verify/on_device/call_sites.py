"""The launches of real call sites: every Triton case of the table, and batches of LLaMA-2 7B on runtime static.

Recorded on a CPU in no time: kernels are not run, products not computed, weights not filled.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import product
from typing import Any

import torch
from torch.nn.functional import linear, rms_norm, scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM

from perfbench.kernels.ahead_of_time import Launch, recording
from perfbench.kernels.placement import standing_in
from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.backbone import DTYPES, Backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.capture import Step
from perfbench.spec.backbone_config import NAMED_CONFIGS
from perfbench.verify.on_device.kernel_cases import CASES
from perfbench.verify.on_device.kernel_check import Setting

SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan")
# As scenarios/multitenant.yaml has them on a GPU.
PROMPT_TOKENS, NEW_TOKENS, BEAMS, REQUESTS = 274, 32, (1, 3), 8
# That the table of cases has.
LARGEST_RANK = 128


def of_cases() -> Iterator[tuple[str, list[Launch]]]:
    """(name, launches) of every case that Triton's kernels can take, in every type."""
    for dtype in DTYPES:
        for case in CASES:
            if "triton" in case.forms:
                with recording() as launches:
                    # Shifted, because what comes out is then not looked at: nothing was computed.
                    case.build(Setting("triton", DTYPES[dtype], "cpu")).run(1)
                yield f"{case.kernel} {case.id} {dtype}", launches


class _ArithmeticLeftOut(TorchFunctionMode):
    """Within it a product, a norm and the attention of a prefill have their sizes and type, and any values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is linear:
            x, weight = args[:2]
            return x.new_empty(*x.shape[:-1], len(weight))
        if func in (scaled_dot_product_attention, rms_norm):
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def unfilled(backbone: str, layers: int, dtype: torch.dtype) -> Backbone:
    """The named shape on the CPU, with so many layers and a small vocabulary, which no kernel of ours sees; its weights
    are whatever lay there before."""
    config = NAMED_CONFIGS[backbone] | {"num_hidden_layers": layers, "vocab_size": 256}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(config["model_type"], **fields), dtype=dtype, attn_implementation="sdpa"
        )
    model.to_empty(device="cpu").eval().requires_grad_(False)
    return Backbone(backbone, BackboneShape.of_config(config), model, dtype, torch.device("cpu"))


class Served:
    """One method on runtime static, with Triton's kernels and the decode step that a GPU captures: each runs once, in
    its capture, and its replays do nothing."""

    def __init__(self, base: Backbone, method: str, tenants: int, **options: Any):
        bank = None
        if method != "none":
            layout = parameters.meta_plan(method, base.shape, METHODS[method].options(**options))
            bank = Bank(layout, tenants, base.dtype, base.device, base.linear)
        with standing_in():  # the weights stay as they lie: a CPU alone has a form of its own for them
            self._arm = StaticArm(base, bank, "triton", self._captured)
        self._launches: list[Launch] = []
        self._prefill = 0
        self._around: Callable[[], AbstractContextManager[object]] = nullcontext

    def _captured(self, step: Step) -> Step:
        self._prefill = len(self._launches)
        with self._around():
            step()
        return lambda: None

    def generate(
        self, batch: Batch, around: Callable[[], AbstractContextManager[object]] = nullcontext
    ) -> tuple[list[Launch], list[Launch]]:
        """The launches of a batch's prefill and those of its decode step, of a size unlike the last batch's. around:
        makes what the step runs within."""
        self._around = around
        with recording() as self._launches:
            self._arm.generate(batch)
        return self._launches[: self._prefill], self._launches[self._prefill :]

    def close(self) -> None:
        """Lets the backbone go."""
        self._arm.close()


def tenants_apart(requests: int, beams: int, *, prompt_tokens: int, new_tokens: int, padded: bool = False) -> Batch:
    """Requests of as many tenants, in the slots of their numbers; padded: the first prompt is 3 tokens shorter."""
    mask = torch.ones(requests, prompt_tokens, dtype=torch.int64)
    if padded:
        mask[0, :3] = 0
    return Batch(mask.clone(), mask, tuple(range(requests)), beams, new_tokens)


def of_seven_b() -> list[tuple[str, list[Launch]]]:
    """(name, launches) of the prefills and decode steps of LLaMA-2 7B in bf16 that the main scenario has, of each
    method, and of one request alone; and at the largest rank. Two layers: the first is like all, of the last one a
    prefill needs less."""
    base = unfilled("llama2-7b", 2, torch.bfloat16)
    methods: list[tuple[str, dict[str, int]]] = [(method, {}) for method in SERVED]
    methods += [(method, {"rank": LARGEST_RANK}) for method in ("lora", "para")]
    methods += [("lora", {"lora_bias": True})]
    found = []
    for method, options in methods:
        served = Served(base, method, REQUESTS, **options)
        words = ", ".join([method, *(f"{name} {value}" for name, value in options.items())])
        for requests, beams, padded in product((REQUESTS, 1), BEAMS, (False, True)):
            if (padded and (method != "none" or requests == 1)) or (options and requests == 1):
                continue  # adapters do not see the padding
            batch = tenants_apart(requests, beams, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS, padded=padded)
            with _ArithmeticLeftOut():
                prefill, step = served.generate(batch)
            name = f"{words}, {_count(requests, 'request')}"
            found.append((f"{name}, prefill", prefill))
            found.append((f"{name}, {_count(beams, 'beam')}{', padded' if padded else ''}", step))
        served.close()
    return found


class _Operations(TorchDispatchMode):
    """Notes the operations that a GPU launches something for: not those that only look at a tensor in another way, or
    make room for one."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.__name__.split(".")[0]
        looked_at = _storages((args, kwargs)) & _storages(out)
        if func._schema.is_mutable or not (looked_at or name.startswith(("empty", "new_empty"))):
            self.names.append(name)
        return out


def _storages(values: Any) -> set[int]:
    return {leaf.untyped_storage().data_ptr() for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)}


def of_step(base: Backbone, method: str, batch: Batch, **options: Any) -> Counter[str]:
    """How often a decode step of this batch launches each operation of torch's and each of our kernels."""
    served, operations = Served(base, method, len(batch.slots), **options), _Operations()
    _, step = served.generate(batch, lambda: operations)
    served.close()
    return Counter([*operations.names, *(launch.name for launch in step)])


def _count(number: int, of_what: str) -> str:
    return f"{number} {of_what}{'' if number == 1 else 's'}"

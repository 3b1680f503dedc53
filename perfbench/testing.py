"""The contract of a served method, as a call: what a plugin's own tests import.

    from perfbench.testing import check_method

    def test_my_method():
        check_method("my-method", plugin="my_method.py")   # or without a file, where a package is installed

Every check raises AssertionError with what was expected. All run on the CPU, in fp32, on a made-up Llama of three
layers with fewer KV heads than heads, in a few seconds.
"""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from perfbench.finetune import trained
from perfbench.measure.on_device.arms import PLAN_ARMS
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, union_layout
from perfbench.methods.plan import AdapterPlan, plan_bytes
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes import backbone as backbones
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.generation import Batch
from perfbench.spec import method_plugins
from perfbench.spec.arms import frozen
from perfbench.spec.option_schema import schema_of
from perfbench.spec.scenario_schema import problems

BACKBONE = "llama-tiny"
# Of logits of about 1 in fp32: what another order of the sums makes, and what another adapter makes at least.
SAME, OTHER = 1e-4, 1e-2
# Options without which a method can't be trained. The tokens are in the prompts below.
TRAINED_WITH: dict[str, dict[str, Any]] = {"alora": {"invocation": (5, 6)}}


def check_method(name: str, plugin: str | Path | None = None) -> None:
    """All of CHECKS for the method `name`, of an installed package or of the file `plugin`.

    AssertionError says what is not as it should be; PerfbenchError, where the plugin can't be read.
    """
    method_plugins.load([] if plugin is None else [plugin])
    assert name in METHODS, f"expected a method {name!r}, there are {', '.join(METHODS)}"
    for check in CHECKS:
        check(name)


def options_are_a_scenarios(method: str) -> None:
    """Each option has a default that its own schema accepts, and goes to JSON and back unchanged."""
    made_of = METHODS[method].options
    rules = {"type": "object", "properties": schema_of(made_of), "additionalProperties": False}
    plain = json.loads(json.dumps(vars(made_of())))
    assert problems(plain, rules) == [], f"{method}: a default is refused: {problems(plain, rules)[0].message}"
    assert made_of(**{key: frozen(value) for key, value in plain.items()}) == made_of(), f"{method}: options change"


def counts_are_the_tensors(method: str) -> None:
    """The number of parameters, and that of what is served, are those of the tensors themselves."""
    shape, options = _backbone().shape, METHODS[method].options()
    values = parameters.make(method, shape, options, seed=1, linear_of=_backbone().linear)
    count = sum(tensor.numel() for tensor in values.values())
    assert count > 0, f"{method}: expected parameters, got none"
    told = parameters.parameter_count(method, shape, options)
    assert told == count, f"{method}: shapes give {told} parameters, the tensors {count}"
    held = sum(tensor.numel() for layer in _plan(method, seed=1) for tensor in layer.tensors())
    told = parameters.served_count(method, shape, options)
    assert told == held, f"{method}: served_count gives {told} numbers, the plan holds {held}"


def a_plan_is_known_without_memory(method: str) -> None:
    """The plan of meta tensors has the sizes of a real one, a layer for each of the backbone's, and no memory."""
    shape, options = _backbone().shape, METHODS[method].options()
    real, meta = _plan(method, seed=1), parameters.meta_plan(method, shape, options)
    assert len(real) == len(meta) == shape.layers, f"{method}: expected {shape.layers} layers, got {len(real)}"
    sizes = [[[tuple(t.shape) for t in layer.tensors()] for layer in plan] for plan in (real, meta)]
    assert sizes[0] == sizes[1], f"{method}: the meta plan has other sizes than a real one"
    assert all(t.is_meta for layer in meta for t in layer.tensors()), f"{method}: a meta plan allocates"


def the_seed_decides(method: str) -> None:
    """The same seed gives the same adapter, another seed another."""
    shape, options = _backbone().shape, METHODS[method].options()
    one, again, other = (parameters.make(method, shape, options, seed=seed) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one), f"{method}: one seed gave two adapters"
    assert not all(torch.equal(one[name], other[name]) for name in one), f"{method}: two seeds gave one adapter"


def it_starts_as_the_backbone(method: str) -> None:
    """Initial values change nothing, random ones do."""
    bare, initial = _logits(None), _logits(_plan(method, seed=5, initial=True))
    assert torch.equal(initial, bare), f"{method}: initial values change the backbone's output"
    assert _far(_logits(_plan(method, seed=5)), bare) > OTHER, f"{method}: random values change nothing"


def a_batch_equals_each_alone(method: str) -> None:
    """Requests of three tenants and one of the bare backbone, together and each alone, on every runtime."""
    bank, slots = _bank([_plan(method, seed=seed) for seed in range(3)]), (2, 0, -1, 1)
    first: torch.Tensor | None = None
    for runtime in PLAN_ARMS:
        arm = PLAN_ARMS[runtime](_backbone(), bank, "eager")
        together = _ask(arm, slots)
        for row, slot in enumerate(slots):
            alone = _ask(arm, (slot,))[0]
            assert _far(together[row], alone) < SAME, f"{method}: on {runtime} slot {slot} in a batch is not as alone"
        arm.close()
        assert _far(together[0], together[1]) > OTHER, f"{method}: on {runtime} two tenants are served alike"
        first = together if first is None else first
        assert _far(together, first) < SAME, f"{method}: {runtime} and {next(iter(PLAN_ARMS))} differ"


def tenants_come_and_go(method: str) -> None:
    """An adapter that leaves the bank and comes back serves as before; its bytes are those of its plan."""
    base, plans = _backbone(), [_plan(method, seed=seed) for seed in range(2)]
    bank = Bank(union_layout(plans), 1, base.dtype, base.device, base.linear)
    assert bank.bytes_per_slot == plan_bytes(plans[0], base.dtype), f"{method}: the bank holds more than the plan"

    def contents() -> list[torch.Tensor]:
        return [tensor.clone() for tensor in bank.tensors()]

    bank.admit(plans[0])
    before = contents()
    bank.evict(0)
    bank.admit(plans[1])
    assert not all(map(torch.equal, before, contents())), f"{method}: two tenants lie alike in the bank"
    bank.evict(0)
    bank.admit(plans[0])
    assert all(map(torch.equal, before, contents())), f"{method}: an adapter that came back lies otherwise in the bank"


def a_folder_gives_it_back(method: str) -> None:
    """What `save` writes, `load` reads: the same plan."""
    shape, options = _backbone().shape, METHODS[method].options()
    values = parameters.make(method, shape, options, seed=1, linear_of=_backbone().linear)
    with tempfile.TemporaryDirectory() as folder:
        parameters.implementation(method).save(values, shape, options, Path(folder), BACKBONE)
        read = parameters.implementation(method).load(Path(folder), shape, options)
    for index, layers in enumerate(zip(_plan(method, seed=1), read, strict=True)):
        wrote, found = (layer.tensors() for layer in layers)
        same = [a.shape for a in wrote] == [b.shape for b in found] and all(
            torch.allclose(a, b, rtol=1e-5, atol=1e-6) for a, b in zip(wrote, found, strict=True)
        )
        assert same, f"{method}: layer {index} read from a folder is not what was saved"


def it_is_served_as_trained(method: str) -> None:
    """Where it can be trained: PEFT trains as many parameters, every one gets a gradient, and what is saved is served
    with the trained module's own logits."""
    if METHODS[method].trained_by is None:
        return
    base, options = _backbone(), METHODS[method].options(**TRAINED_WITH.get(method, {}))
    module = trained.attach(base.skeleton(), method, options, seed=0)
    trains = [p for p in module.parameters() if p.requires_grad]
    count, told = sum(p.numel() for p in trains), parameters.parameter_count(method, base.shape, options)
    assert count == told, f"{method}: {count} parameters are trained, shapes give {told}"
    ids = _prompts(1)
    module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
    assert all(p.grad is not None for p in trains), f"{method}: a parameter gets no gradient"
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in trains:
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        expected = module.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -1:]
    with tempfile.TemporaryDirectory() as folder:
        trained.save(module, Path(folder) / "adapter")
        plan = parameters.implementation(method).load(Path(folder) / "adapter", base.shape, options)
    served = _logits(plan, new_tokens=1)
    assert _far(served, expected) < SAME, f"{method}: it is not served as it was trained"
    assert _far(served, _logits(None, new_tokens=1)) > OTHER, f"{method}: what was trained changes nothing"


CHECKS: tuple[Callable[[str], None], ...] = (
    options_are_a_scenarios,
    counts_are_the_tensors,
    a_plan_is_known_without_memory,
    the_seed_decides,
    it_starts_as_the_backbone,
    a_batch_equals_each_alone,
    tenants_come_and_go,
    a_folder_gives_it_back,
    it_is_served_as_trained,
)


@functools.lru_cache(maxsize=1)
def _backbone() -> Backbone:
    return backbones.load(BACKBONE, "fp32", "cpu", seed=0)


def _plan(method: str, seed: int, *, initial: bool = False) -> AdapterPlan:
    shape: BackboneShape = _backbone().shape
    options: Any = METHODS[method].options()
    values = parameters.make(method, shape, options, seed=seed, initial=initial, linear_of=_backbone().linear)
    plan: AdapterPlan = parameters.implementation(method).plan(values, shape, options)
    return plan


def _prompts(rows: int) -> torch.Tensor:
    """int64 [rows, 9], the same prompt for each."""
    return torch.arange(3, 12).repeat(rows, 1)


def _bank(plans: Sequence[AdapterPlan]) -> Bank:
    base = _backbone()
    bank = Bank(union_layout(plans), len(plans), base.dtype, base.device, base.linear)
    for plan in plans:
        bank.admit(plan)
    return bank


def _logits(plan: AdapterPlan | None, new_tokens: int = 3) -> torch.Tensor:
    """As `_ask`, of one request with this adapter, or with none."""
    bank = None if plan is None else _bank([plan])
    return _ask(PLAN_ARMS["transformers"](_backbone(), bank, "eager"), (0 if bank else -1,), new_tokens)


def _ask(arm: Any, slots: tuple[int, ...], new_tokens: int = 3) -> torch.Tensor:
    """[Q, N, V] of the same prompt and the same forced tokens for every slot."""
    ids = _prompts(len(slots))
    batch = Batch(ids, torch.ones_like(ids), slots, beams=1, new_tokens=new_tokens)
    forced = torch.arange(20, 20 + new_tokens).repeat(len(slots), 1)
    found: torch.Tensor = arm.generate(batch, forced=forced, with_logits=True).logits
    return found


def _far(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).abs().max())

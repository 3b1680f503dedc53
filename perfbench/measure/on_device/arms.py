"""From a case to an arm on the device: the adapters of its tenants, the bank or PEFT model that holds them."""

from __future__ import annotations

import gc
import math
import time
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors import safe_open

from perfbench.errors import AdapterError
from perfbench.measure.on_device import conversion, workload
from perfbench.measure.on_device.adapter_folders import adapter_folders
from perfbench.methods import parameters
from perfbench.methods.bank import Bank, sizes_of, union_layout
from perfbench.methods.checkpoints.adapter_folder import PEFT_PREFIX, WEIGHTS
from perfbench.methods.plan import AdapterPlan, plan_bytes
from perfbench.methods.registry import METHODS
from perfbench.methods.shape import BackboneShape
from perfbench.runtimes.backbone import Backbone
from perfbench.runtimes.continuous.arm import ContinuousArm
from perfbench.runtimes.generation import Arm, Batch
from perfbench.runtimes.merged import MERGED_ARMS
from perfbench.runtimes.peft_arms import PeftMixedArm, PeftSingleArm, expect_mixable
from perfbench.runtimes.peft_arms import admit as admit_peft
from perfbench.runtimes.shared_weights import unchanged
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.spec.cases import Case, kinds_of, of_tenant, source_of

ADMISSIONS = 5

# Runtime -> what serves a bank of layer plans, or none, on it.
PLAN_ARMS: dict[str, type[PlanArm] | type[StaticArm] | type[ContinuousArm]] = {
    "transformers": PlanArm,
    "static": StaticArm,
    "continuous": ContinuousArm,
}


@dataclass(frozen=True)
class BuiltArm:
    """An arm, its batch, and what its adapters are.

    sizes: of the adapter in each slot its plan, sizes only (None for the bare backbone, and where no step reads an
    adapter); plan_of: slot -> the adapter that lies there, made again from its seed or read again from its folder (None
    for the bare backbone); adapters: as `_figures` has them, {} where nobody asked.
    """

    arm: Arm
    batch: Batch
    sizes: tuple[AdapterPlan, ...] | None
    plan_of: Callable[[int], AdapterPlan] | None
    adapters: dict[str, Any]


def build(
    case: Case, backbone: Backbone, batch: Batch, resident: int, seed: int, scratch: Path, *, figures: bool = True
) -> BuiltArm:
    """The arm of `case` with `resident` tenants admitted. AdapterError on a folder that can't be served.

    `scratch`: an empty folder for the checkpoints that PEFT, or the measured admission, reads. `figures`: whether to
    measure what an adapter takes and how long its admission lasts, which for PEFT takes longer than to build the arm.
    """
    method = METHODS[case.method]
    if case.method == "none":
        bare = _plan_arm(case, backbone, None, batch)
        return BuiltArm(bare, batch, None, None, dict.fromkeys(_figures([0], [0], 0, 0.0)))
    if method.in_bank:
        return _build_plan(case, backbone, batch, resident, seed, scratch, figures)
    if method.served_by == "merged":
        return _build_merged(case, backbone, batch, resident, seed, figures)
    return _build_peft(case, backbone, batch, resident, seed, scratch, figures)


def _figures(
    parameters_of: Sequence[int], bytes_of: Sequence[int], resident_bytes: int, admit_ms: float
) -> dict[str, Any]:
    """What is known of the adapters of an arm, from each tenant's trained parameters and bytes when it is served:
    `parameters_per_tenant`, `bytes_per_tenant` (the means), `of_tenants` (None where all tenants are alike),
    `resident_bytes_per_tenant` (what one more takes; a slot of the bank has room for the largest), `admit_ms`."""
    differ = len(set(parameters_of)) > 1 or len(set(bytes_of)) > 1
    return {
        "parameters_per_tenant": _mean(parameters_of),
        "bytes_per_tenant": _mean(bytes_of),
        "of_tenants": {"parameters": _spread(parameters_of), "bytes": _spread(bytes_of)} if differ else None,
        "resident_bytes_per_tenant": resident_bytes,
        "admit_ms": admit_ms,
    }


def _mean(counts: Sequence[int]) -> float:
    total = sum(counts)
    return total // len(counts) if total % len(counts) == 0 else total / len(counts)


def _spread(counts: Sequence[int]) -> dict[str, float]:
    return {"least": min(counts), "median": median(counts), "most": max(counts)}


def _trained(folder: Path) -> int:
    """The numbers in an adapter's file, which are those that were trained, but for those of no place in the model."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(PEFT_PREFIX)]  # noqa: SIM118 - it is no mapping
        return sum(math.prod(file.get_slice(name).get_shape()) for name in names)


def read_adapter(case: Case, shape: BackboneShape, resident: int, tenant: int) -> AdapterPlan:
    """The adapter in the folder of the resident `tenant`. AdapterError."""
    return _load(case, shape, adapter_folders(case.options.adapters, case.method, resident)[tenant])


def _load(case: Case, shape: BackboneShape, folder: Path) -> AdapterPlan:
    plan: AdapterPlan = parameters.implementation(case.method).load(folder, shape, case.options)
    if METHODS[case.method].served_by == "peft":
        expect_mixable(folder)
    return plan


def plan_of_tenant(case: Case, backbone: Backbone, resident: int, seed: int, tenant: int) -> AdapterPlan:
    """The adapter of the resident `tenant`: read from a folder where the case's options have them, else random, made
    on the backbone's device; then converted where the case says so."""
    own = of_tenant(case, tenant)
    if source_of(case) is case and getattr(case.options, "adapters", None) is not None:
        return read_adapter(own, backbone.shape, resident, tenant)
    return _plan(own, backbone, made_values(own, backbone, resident, seed, tenant))


def random_layouts(case: Case, shape: BackboneShape) -> list[AdapterPlan]:
    """The sizes of a random adapter of each kind that the tenants of `case` have."""
    return [parameters.meta_plan(own.method, shape, own.options) for own in kinds_of(case)]


def _plan(case: Case, backbone: Backbone, values: parameters.Parameters) -> AdapterPlan:
    plan: AdapterPlan = parameters.implementation(case.method).plan(values, backbone.shape, case.options)
    return plan


def made_values(case: Case, backbone: Backbone, resident: int, seed: int, tenant: int) -> parameters.Parameters:
    """The numbers of a tenant's adapter that lies in no folder, which are the same wherever they are made: random ones,
    or what another method's adapter becomes as LoRA."""
    if (source := source_of(case)) is not case:
        plan = plan_of_tenant(source, backbone, resident, seed, tenant)
        return conversion.as_lora(plan, backbone, case.options.rank)
    return parameters.make(
        case.method,
        backbone.shape,
        case.options,
        seed=seed * 1_000_003 + tenant,
        input_rms=backbone.input_rms,
        device=backbone.device,
        linear_of=backbone.linear,
    )


def _build_plan(
    case: Case, backbone: Backbone, batch: Batch, resident: int, seed: int, scratch: Path, wanted: bool
) -> BuiltArm:
    one = of_tenant(case, 0)
    method = parameters.implementation(one.method)
    plan_of, source = partial(plan_of_tenant, case, backbone, resident, seed), source_of(case)
    rank = backbone.rank
    part, part_of_sizes = (_whole, _whole) if rank is None else (rank.of_plan, rank.of_sizes)
    if getattr(case.options, "adapters", None) is not None:
        folders = adapter_folders(case.options.adapters, source.method, resident)
        read = [plan_of(tenant) for tenant in range(resident)]
        plans: Iterable[AdapterPlan] = read
        names = list(map(str, folders))
        sizes = [part_of_sizes(sizes_of(plan)) for plan in read]
        layout, cold = union_layout(sizes), folders[0] if source is case else scratch / "cold"
        if source is not case and wanted:
            first = made_values(case, backbone, resident, seed, 0)
            method.save(first, backbone.shape, case.options, cold, backbone.name)
        trained = [_trained(folder) for folder in folders]
    else:
        kinds, of_kinds = kinds_of(case), list(map(part_of_sizes, random_layouts(case, backbone.shape)))
        layout, cold = union_layout(of_kinds), scratch / "cold"
        first = made_values(one, backbone, resident, seed, 0)
        if wanted:
            method.save(first, backbone.shape, one.options, cold, backbone.name)
        # Made one by one as they are admitted: not all of them at once, in fp32, beside the bank.
        plans = chain([_plan(one, backbone, first)], map(plan_of, range(1, resident)))
        names = [f"tenant {tenant}" for tenant in range(resident)]
        sizes = [of_kinds[tenant % len(kinds)] for tenant in range(resident)]
        counts = [parameters.parameter_count(own.method, backbone.shape, own.options) for own in kinds]
        trained = [counts[tenant % len(kinds)] for tenant in range(resident)]
    bank = Bank(layout, resident, backbone.dtype, backbone.device, backbone.linear)
    for name, plan in zip(names, plans, strict=True):
        try:
            bank.admit(part(plan))
        except AdapterError as error:
            raise AdapterError(f"{name}: {error}") from None
    batch = workload.invoked(batch, bank.invocation_of)
    if not wanted:
        return BuiltArm(_plan_arm(case, backbone, bank, batch), batch, tuple(sizes), plan_of, {})

    def admit() -> None:
        bank.admit(part(method.load(cold, backbone.shape, one.options)))

    # The first resident leaves and comes back: the last slot freed is the first to be taken.
    admit_ms = _timed(admit, before=lambda: bank.evict(0), device=backbone.device)
    held = [plan_bytes(plan, backbone.dtype) for plan in sizes]
    figures = _figures(trained, held, bank.bytes_per_slot, admit_ms)
    if source is not case:
        before = partial(plan_of_tenant, source, backbone, resident, seed)
        figures |= conversion.loss(backbone, batch, before, plan_of)
    return BuiltArm(_plan_arm(case, backbone, bank, batch), batch, tuple(sizes), plan_of, figures)


def _whole(plan: AdapterPlan) -> AdapterPlan:
    return plan


def _plan_arm(case: Case, backbone: Backbone, bank: Bank | None, batch: Batch) -> Arm:
    if backbone.rank is not None:
        arm = backbone.rank.arm(bank, case.kernels)
    else:
        arm = PLAN_ARMS[case.runtime](backbone, bank, case.kernels)
    if isinstance(arm, StaticArm):
        arm.reserve(batch)
    return arm


def _build_merged(case: Case, backbone: Backbone, batch: Batch, resident: int, seed: int, wanted: bool) -> BuiltArm:
    """`admit_ms`: what a switch to a resident tenant takes. No adapter is read in a step, so that `plan` is None."""
    plan_of = partial(plan_of_tenant, case, backbone, resident, seed)
    plans = [plan_of(tenant) for tenant in range(resident)]
    arm = MERGED_ARMS[case.runtime](backbone, plans, case.kernels)
    if not wanted:
        return BuiltArm(arm, _of_one_tenant(batch), None, plan_of, {})
    admit_ms = _timed(lambda: arm.switch(0), before=lambda: arm.switch(-1), device=backbone.device)
    if case.options.adapters is not None:
        trained = [_trained(folder) for folder in adapter_folders(case.options.adapters, case.method, resident)]
    else:
        trained = [parameters.parameter_count(case.method, backbone.shape, case.options)]
    held = [plan_bytes(plan, backbone.dtype) for plan in plans]
    figures = _figures(trained, held, sum(held) // len(held), admit_ms)
    return BuiltArm(arm, _of_one_tenant(batch), None, plan_of, figures)


def _of_one_tenant(batch: Batch) -> Batch:
    """The same with every request of the first tenant that there is."""
    slot = next((slot for slot in batch.slots if slot != -1), -1)
    return replace(batch, slots=(slot,) * len(batch.slots))


def _build_peft(
    case: Case, backbone: Backbone, batch: Batch, resident: int, seed: int, scratch: Path, wanted: bool
) -> BuiltArm:
    method = parameters.implementation(case.method)
    if case.options.adapters is not None:
        folders = adapter_folders(case.options.adapters, case.method, resident)
        sizes = [sizes_of(_load(case, backbone.shape, folder)) for folder in folders]
    else:
        folders = [scratch / f"tenant{tenant}" for tenant in range(resident)]
        for tenant, folder in enumerate(folders):
            values = made_values(case, backbone, resident, seed, tenant)
            method.save(values, backbone.shape, case.options, folder, backbone.name)
        sizes = [parameters.meta_plan(case.method, backbone.shape, case.options)] * resident
    held = [plan_bytes(plan, backbone.dtype) for plan in sizes]
    single = METHODS[case.method].served_by == "peft-single"
    arm: PeftMixedArm | PeftSingleArm
    with unchanged(backbone, f"{folders[0]} to {folders[-1]}" if len(folders) > 1 else str(folders[0])):
        arm = PeftSingleArm(backbone, folders) if single else PeftMixedArm(backbone, folders)
        figures = _figures_of_peft(arm.model, folders, held, backbone) if wanted else {}
    if single:
        batch = _of_one_tenant(batch)
    plan_of = partial(plan_of_tenant, case, backbone, resident, seed)
    return BuiltArm(arm, batch, tuple(sizes), plan_of, figures)


def _figures_of_peft(model: Any, folders: Sequence[Path], held: Sequence[int], backbone: Backbone) -> dict[str, Any]:
    """`_figures` of the adapters in `folders`, which take `held` bytes each in the bank's form."""
    admit_ms = _timed(
        lambda: admit_peft(model, folders[0], "cold", backbone.dtype, backbone.device),
        after=lambda: model.delete_adapter("cold"),
        device=backbone.device,
    )
    resident_bytes = sum(held) // len(held) + _beside_its_tensors(model, folders[0], backbone)
    return _figures([_trained(folder) for folder in folders], held, resident_bytes, admit_ms)


def _beside_its_tensors(model: Any, folder: Path, backbone: Backbone) -> int:
    """Bytes of the host that PEFT's modules of one more adapter take, as much as the numbers of a small one. Python's
    allocations, since those of the process depend on what earlier arms left free; on a GPU none of them lie there."""
    if backbone.device.type != "cpu":
        return 0
    gc.collect()
    tracemalloc.start()
    try:
        admit_peft(model, folder, "cold", backbone.dtype, backbone.device)
        gc.collect()
        return tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
        model.delete_adapter("cold")


def _timed(
    action: Callable[[], None],
    *,
    before: Callable[[], None] = lambda: None,
    after: Callable[[], None] = lambda: None,
    device: torch.device,
) -> float:
    """Median milliseconds of `action` over ADMISSIONS turns; `before` and `after` each turn are not timed."""
    times = []
    for _ in range(ADMISSIONS):
        before()
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
        after()
    return median(times)

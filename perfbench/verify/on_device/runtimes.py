"""Graph replay against no graph, runtime static against Hugging Face's `generate()`, and tenant isolation.

On a small shape in fp32, with ragged prompts, tenants that repeat and a request without an adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from perfbench.methods import parameters
from perfbench.methods.bank import Bank
from perfbench.methods.plan import AdapterPlan
from perfbench.methods.registry import METHODS
from perfbench.proof import best_choices, check
from perfbench.runtimes import backbone
from perfbench.runtimes.generation import Batch
from perfbench.runtimes.static.arm import StaticArm
from perfbench.runtimes.static.capture import Step
from perfbench.runtimes.transformers_plan import PlanArm
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding

SHAPE, SEED, RESIDENT = "llama-tiny", 0, 4
SERVED = tuple(name for name, method in METHODS.items() if method.served_by == "plan")
# Relative difference of fp32 logits on a shape this small: sums in another order leave 1e-6.
TOLERANCE = 1e-4
RUNTIMES: dict[str, Callable[..., Any]] = {"transformers": PlanArm, "static": StaticArm}


def make_plan(base: backbone.Backbone, method: str, tenant: int, options: Any = None) -> AdapterPlan:
    """The adapter of that tenant of `method`, its seed its number; options None: the method's default ones."""
    options, module = options or METHODS[method].options(), parameters.implementation(method)
    values = parameters.make(method, base.shape, options, seed=tenant, input_rms=base.input_rms, linear_of=base.linear)
    plan: AdapterPlan = module.plan(values, base.shape, options)
    return plan


def make_bank(base: backbone.Backbone, method: str, options: Any = None) -> Bank | None:
    """Four tenants of `method`, each in the slot of its number; None for the bare backbone. options: as `make_plan`."""
    if method == "none":
        return None
    layout = parameters.meta_plan(method, base.shape, options or METHODS[method].options())
    bank = Bank(layout, RESIDENT, base.dtype, base.device, base.linear)
    for tenant in range(RESIDENT):
        bank.admit(make_plan(base, method, tenant, options))
    return bank


def make_batch(base: backbone.Backbone, beams: int) -> Batch:
    """Four requests of 9 tokens at most, 6 new ones: tenants 2, 0, none, 2."""
    ids = torch.randint(3, base.shape.vocab, (4, 9), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[3, :2] = 0
    return Batch((ids * mask).to(base.device), mask.to(base.device), (2, 0, -1, 2), beams, new_tokens=6)


def kernel_sets(device: str) -> tuple[str, ...]:
    """Those that run on the device at its speed; in the interpreter a step would take minutes."""
    return ("eager", "triton") if device == "cuda" else ("eager",)


def replay(device: str) -> Iterator[Finding]:
    """A decode step of one size for all steps, captured or not, against one that grows with the cache."""
    base = backbone.load(SHAPE, "fp32", device, SEED)
    for kernels in kernel_sets(device):
        for beams in (1, 3):
            fixed = partial(_compare_replay, base, kernels, beams, _run_again)
            yield _over_methods(f"step of one size, no graph, {kernels}, beams {beams}", fixed)
            what = f"CUDA graph, {kernels}, beams {beams}"
            if device == "cuda":
                yield _over_methods(what, partial(_compare_replay, base, kernels, beams, None))
            else:
                yield Finding(what, SKIPPED, "no CUDA graph on a CPU; tests replay the step from a tape")


def _run_again(step: Step) -> Step:
    """A capture that captures nothing."""
    return step


def against_generate(device: str) -> Iterator[Finding]:
    """Tokens and logits of runtime static beside those of transformers' own loop."""
    base = backbone.load(SHAPE, "fp32", device, SEED)
    for kernels in kernel_sets(device):
        for beams in (1, 3):
            what = f"static {kernels}, {'greedy' if beams == 1 else f'beam {beams}'}"
            yield _over_methods(what, partial(_compare_loops, base, kernels, beams))


def _compare_loops(base: backbone.Backbone, kernels: str, beams: int, method: str) -> tuple[float, str | None]:
    bank = make_bank(base, method)
    return difference(StaticArm(base, bank, kernels), PlanArm(base, bank, "eager"), make_batch(base, beams))


def isolation(device: str) -> Iterator[Finding]:
    """perfbench.proof.check on a mixed batch: each request gets what the oracle says, and shifted slots are seen."""
    base = backbone.load(SHAPE, "fp32", device, SEED)
    for runtime, make in RUNTIMES.items():
        for kernels in kernel_sets(device):
            for beams in (1, 3):
                yield _isolated(base, f"{runtime} {kernels}, beams {beams}", make, kernels, beams)


def _isolated(base: backbone.Backbone, what: str, make: Callable[..., Any], kernels: str, beams: int) -> Finding:
    def compare(method: str) -> tuple[float, str | None]:
        arm = make(base, make_bank(base, method), kernels)
        plan_of = None if method == "none" else partial(make_plan, base, method)
        try:
            found = check.check(arm, make_batch(base, beams), RESIDENT, base, SEED, plan_of)
        finally:
            arm.close()
        return found.relative_difference, found.reason

    return _over_methods(what, compare)


def _over_methods(what: str, compare: Callable[[str], tuple[float, str | None]]) -> Finding:
    """`compare` gives (largest relative difference, fault) of the arms of a method; if it raises, that is a fault."""
    worst, faults = 0.0, []
    for method in SERVED:
        try:
            difference, fault = compare(method)
        except Exception as error:  # a capture that failed, a launch that was refused
            difference, fault = 0.0, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        worst = max(worst, difference)
        if fault is None and not difference <= TOLERANCE:
            fault = f"logits differ by {difference:.1e}, more than {TOLERANCE:.0e}"
        if fault is not None:
            faults.append(f"{method}: {fault}")
    return _finding(what, worst, faults)


def _finding(what: str, worst: float, faults: list[str]) -> Finding:
    finite = worst if worst < float("inf") else None
    figures = {"methods": list(SERVED), "worst_relative_difference": finite, "faults": faults}
    if faults:
        return Finding(what, FAIL, "; ".join(faults), figures)
    return Finding(what, PASS, f"{len(SERVED)} methods, same tokens, logits within {worst:.0e}", figures)


def difference(arm: Any, reference: Any, batch: Batch) -> tuple[float, str | None]:
    """(largest relative difference of the logits on the reference's tokens, what is wrong with the tokens or None).

    Tokens that part where two choices are equally good within the tolerance are no fault.
    """
    tokens = reference.generate(batch).tokens
    own = arm.generate(batch).tokens
    expected, found = (best_choices.forced_logits(one, batch, tokens) for one in (reference, arm))
    worst = max(check.relative_difference(*pair) for pair in zip(found, expected, strict=True))
    parted = [request for request in range(len(tokens)) if not torch.equal(own[request], tokens[request])]
    if parted and batch.beams == 1:
        parted = [i for i in parted if not best_choices.is_greedy_tie(expected[i], own[i], tokens[i], TOLERANCE)]
    elif parted:
        on_own = best_choices.forced_logits(reference, batch, own)
        parted = [
            i for i in parted if not best_choices.is_beam_tie(expected[i], on_own[i], own[i], tokens[i], TOLERANCE)
        ]
    return worst, f"other tokens in request(s) {', '.join(map(str, parted))}" if parted else None


def _compare_replay(
    base: backbone.Backbone, kernels: str, beams: int, capture: Callable[[Step], Step] | None, method: str
) -> tuple[float, str | None]:
    """Over batches of other prompts and tenants, one after the other, on one captured step.

    capture None: what the runtime takes by default, a CUDA graph.
    """
    bank = make_bank(base, method)
    growing, fixed = StaticArm(base, bank, kernels), StaticArm(base, bank, kernels, capture)
    growing.capture = None  # on a GPU too
    batch = make_batch(base, beams)
    # As many distinct tenants, so that Triton's form has one size for both; every request has another one.
    others = replace(batch, input_ids=batch.input_ids.flip(0) * batch.attention_mask, slots=(3, 1, 3, 1))
    worst, decoder = 0.0, None
    for other in (batch, others, batch):
        found, fault = difference(fixed, growing, other)
        worst = max(worst, found)
        if fault is None and decoder not in (None, fixed.decoder):
            fault = "the step was made again for the same size of batch"
        if fault is not None:
            return worst, fault
        decoder = fixed.decoder
    if bank is not None:
        wrong = replace(batch, slots=others.slots)
        tokens = growing.generate(batch).tokens
        pair = (best_choices.forced_logits(arm, one, tokens) for arm, one in ((fixed, wrong), (growing, batch)))
        seen = min(check.relative_difference(*rows) for rows in zip(*pair, strict=True))
        if not seen > check.SHIFTED_FACTOR * TOLERANCE:
            return worst, f"with other tenants the replayed step differs by {seen:.1e} only"
    return worst, None

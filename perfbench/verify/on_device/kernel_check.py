"""How a form of a kernel is judged: against fp64 in its type, the same bits twice, and slots shifted by one seen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

FORMS = ("eager", "triton")
FAULT_FACTOR = 10

# Relative, in the 2-norm of a row. A result rounded to 8 (11) bits is off by up to 2^-9 (2^-12) of each value; the
# interpreter cuts off the bits that a GPU rounds: 1 ulp. In the fused operations several roundings follow each other.
ONE = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 1.5e-3}
FUSED = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Setting:
    """How a case is run: in this form, in this type, on this device ("cpu": Triton's forms in the interpreter)."""

    form: str
    dtype: torch.dtype
    device: str

    def normal(self, seed: int) -> Callable[..., torch.Tensor]:
        """Makes normal values of given sizes on the CPU, in this type; the same on every device."""
        generator = torch.Generator().manual_seed(seed)
        return lambda *size: torch.randn(size, generator=generator).to(self.dtype)

    def put(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of `tensor` on the device."""
        return tensor.to(self.device, copy=True)


@dataclass(frozen=True)
class Problem:
    """A case with its numbers. run(shift): what the kernel gives, on the CPU, when every request is given the adapter
    `shift` places on; expected: fp64 of the same sizes; shifts: whether there is another adapter to be given."""

    run: Callable[[int], torch.Tensor]
    expected: torch.Tensor
    tolerances: dict[torch.dtype, float]
    shifts: bool = True


@dataclass(frozen=True)
class KernelCase:
    """One line of the table. `forms`: those that can take it."""

    kernel: str
    id: str
    build: Callable[[Setting], Problem]
    forms: tuple[str, ...] = FORMS


@dataclass(frozen=True)
class Judgement:
    """worst: largest relative error of a row; shifted: the smallest of a row with the next adapter, None where there
    is no other. fault: None, or what is wrong in a line."""

    worst: float
    tolerance: float
    shifted: float | None
    fault: str | None


def judge(case: KernelCase, setting: Setting) -> Judgement:
    """Runs a case twice as it is and once with every adapter shifted by one.

    Once only in Triton's interpreter: it runs the programs one after the other, so that no order can change.
    """
    problem = case.build(setting)
    tolerance = problem.tolerances[setting.dtype]
    with nan_filled():
        found = problem.run(0)
        again = found if (setting.form, setting.device) == ("triton", "cpu") else problem.run(0)
        wrong = problem.run(1) if problem.shifts else None
    worst = float(_differences(found, problem.expected).max())
    shifted = None if wrong is None else float(_differences(wrong, problem.expected).min())
    fault = None
    if not worst <= tolerance:
        fault = f"differs from fp64 by {worst:.1e}, more than {tolerance:.1e}"
    elif not torch.equal(found, again):
        fault = "two runs differ in their bits"
    elif shifted is not None and not shifted > FAULT_FACTOR * tolerance:
        fault = f"with the next adapter it differs by {shifted:.1e} only, less than {FAULT_FACTOR} x {tolerance:.1e}"
    return Judgement(worst, tolerance, shifted, fault)


def _differences(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    if found.shape != expected.shape:
        raise ValueError(f"expected sizes {list(expected.shape)}, got {list(found.shape)}")
    return (found.double() - expected).norm(dim=-1) / expected.norm(dim=-1)


@contextmanager
def nan_filled() -> Iterator[None]:
    """Within it, torch.empty gives NaN, as torch does in its deterministic mode: what a kernel forgets to write is
    seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that an operation has no deterministic form is not asked here
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

"""Every form of every kernel over the table of cases, and the judge itself on planted faults.

Triton's forms run in the interpreter where there is no GPU.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import pytest
import torch

from perfbench.kernels import residual_rmsnorm, row_scale
from perfbench.kernels.settings import DEFAULTS
from perfbench.runtimes.backbone import DTYPES
from perfbench.verify.on_device.kernel_cases import CASES
from perfbench.verify.on_device.kernel_check import FORMS, KernelCase, Setting, judge

TRITON = importlib.util.find_spec("triton") is not None
MARKS = {"eager": (), "triton": pytest.mark.interpreter}
TABLE = [
    pytest.param(form, case, id=f"{form}-{case.kernel}-{case.id}", marks=MARKS[form])
    for form in FORMS
    for case in CASES
    if form in case.forms and (TRITON or form == "eager")
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("form", "case"), TABLE)
def test_a_kernel_gives_what_its_definition_does(form: str, case: KernelCase, dtype: str) -> None:
    device = "cuda" if form == "triton" and torch.cuda.is_available() else "cpu"
    found = judge(case, Setting(form, DTYPES[dtype], device))
    assert found.fault is None


def test_every_kernel_that_is_launched_is_in_the_table() -> None:
    triton = {case.kernel for case in CASES if "triton" in case.forms}
    assert triton == set(DEFAULTS) | {"low_rank"}
    assert len({(case.kernel, case.id) for case in CASES}) == len(CASES)


def find(kernel: str, part: str) -> KernelCase:
    return next(case for case in CASES if case.kernel == kernel and part in case.id)


def ignores_a_row(form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(residual: torch.Tensor, y: torch.Tensor, h: torch.Tensor, *rest: object) -> torch.Tensor:
        h = h.clone()
        h[-1, -1] = 0
        return form(residual, y, h, *rest)

    return run


def gives_the_next_one_s(form: Callable[..., None]) -> Callable[..., None]:
    return lambda y, minus_one: form(y, minus_one.roll(1, 0))


def leaves_a_value(form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def run(*arguments: object) -> torch.Tensor:
        found = form(*arguments)
        out = torch.empty_like(found)
        out[:, 1:] = found[:, 1:]
        return out

    return run


def differs_each_time(form: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    calls = []

    def run(*arguments: object) -> torch.Tensor:
        calls.append(1)
        return form(*arguments) * (1 + 1e-6 * len(calls))

    return run


@pytest.mark.parametrize(
    ("module", "case", "plant", "fault"),
    [
        (residual_rmsnorm, find("residual_rmsnorm", "groups3"), ignores_a_row, "differs from fp64"),
        (row_scale, find("row_scale", "groups3"), gives_the_next_one_s, "differs from fp64"),
        (residual_rmsnorm, find("residual_rmsnorm", "groups3"), leaves_a_value, "differs from fp64 by nan"),
        (residual_rmsnorm, find("residual_rmsnorm", "groups3"), differs_each_time, "two runs differ"),
    ],
)
def test_a_planted_fault_is_seen(
    module: object, case: KernelCase, plant: Callable[..., object], fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    forms: dict[str, object] = module.FORMS  # type: ignore[attr-defined]
    setting = Setting("eager", torch.float32, "cpu")
    assert judge(case, setting).fault is None
    monkeypatch.setitem(forms, "eager", plant(forms["eager"]))
    assert fault in (judge(case, setting).fault or "")


def test_a_case_that_does_not_see_other_adapters_is_void() -> None:
    case = find("row_scale", "groups3")

    def blind(setting: Setting) -> object:
        problem = case.build(setting)
        return type(problem)(lambda shift: problem.run(0), problem.expected, problem.tolerances)

    found = judge(KernelCase("row_scale", "blind", blind), Setting("eager", torch.float32, "cpu"))  # type: ignore[arg-type]
    assert "with the next adapter it differs by" in (found.fault or "")

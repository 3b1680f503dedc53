"""Every form of every kernel against fp64: compiled on a GPU, in Triton's interpreter on a CPU."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator

from perfbench.machine import triton_interpreter
from perfbench.runtimes.backbone import DTYPES
from perfbench.verify.on_device.kernel_cases import CASES
from perfbench.verify.on_device.kernel_check import FORMS, KernelCase, Setting, judge
from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding


def findings(device: str) -> Iterator[Finding]:
    """One for each kernel in each form, over all cases and types. In the interpreter TRITON_INTERPRET has to be set
    before triton is imported."""
    kernels = list(dict.fromkeys(case.kernel for case in CASES))
    missing = _no_triton(device)
    for form in FORMS:
        for kernel in kernels:
            cases = [case for case in CASES if case.kernel == kernel and form in case.forms]
            if form == "triton" and missing:
                yield Finding(f"{kernel}, triton", SKIPPED, missing)
            elif cases:
                yield of_kernel(kernel, form, device, cases)


def of_kernel(kernel: str, form: str, device: str, cases: list[KernelCase]) -> Finding:
    """What the cases of one kernel in one form gave; a case that can't be run fails it."""
    worst: dict[str, float] = {}
    faults: list[str] = []
    for name, dtype in DTYPES.items():
        for case in cases:
            try:
                found = judge(case, Setting(form, dtype, device))
            except Exception as error:  # whatever a kernel does is a finding
                faults.append(f"{name} {case.id}: {type(error).__name__}: {_first_line(error)}")
                continue
            if found.fault:
                faults.append(f"{name} {case.id}: {found.fault}")
            if math.isfinite(found.worst):
                worst[name] = max(worst.get(name, 0.0), found.worst)
    how = "" if form == "eager" else " compiled" if device == "cuda" else " in the interpreter"
    errors = ", ".join(f"{name} {value:.0e}" for name, value in worst.items())
    text = f"{len(cases)} cases x {len(DTYPES)} types{how}, worst error {errors}"
    if faults:
        more = f" and {len(faults) - 1} more" if len(faults) > 1 else ""
        text = f"{faults[0]}{more}"
    figures = {"cases": len(cases), "worst_relative_error": worst, "faults": faults}
    return Finding(f"{kernel}, {form}", FAIL if faults else PASS, text, figures)


def _no_triton(device: str) -> str | None:
    """Why Triton's kernels can't be run on the device, with the way out; None where they can."""
    try:
        importlib.import_module("triton")
    except (ImportError, OSError) as error:
        return f"triton can't be imported ({_first_line(error)}); install triton"
    return triton_interpreter.broken() if device == "cpu" else None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else "no message"

"""Which versions' interpreter is known to fail, and that section kernels and the tests say so."""

from __future__ import annotations

import pytest

from perfbench.machine import triton_interpreter
from perfbench.verify.on_device import kernels
from perfbench.verify.verify_report import SKIPPED


@pytest.mark.parametrize(
    ("triton", "numpy", "works"),
    [
        ("3.6.0", "2.4.0", False),
        ("3.6.1+git", "2.10.1", False),
        ("3.6.0", "3.0.0rc1", False),
        ("3.6.0", "2.3.5", True),
        ("3.7.0", "2.4.6", True),
        ("3.10.0", "2.4.6", True),
        ("unknown", "2.4.6", False),
    ],
)
def test_versions(triton: str, numpy: str, works: bool) -> None:
    why = triton_interpreter.broken(triton, numpy)
    assert (why is None) == works
    if why:
        assert why.startswith(f"the interpreter of triton {triton} fails on numpy {numpy} (2.4 and later); install")


def test_the_installed_versions_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_interpreter, "version_of", {"triton": "3.6.0", "numpy": "2.4.6"}.get)
    assert "triton 3.6.0 fails on numpy 2.4.6" in (triton_interpreter.broken() or "")
    monkeypatch.setattr(triton_interpreter, "version_of", {"triton": None, "numpy": "2.4.6"}.get)
    assert triton_interpreter.broken() is None


def test_section_kernels_is_skipped_with_that_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not there for this platform")
    monkeypatch.setattr(triton_interpreter, "version_of", {"triton": "3.6.0", "numpy": "2.4.6"}.get)
    monkeypatch.setattr(kernels, "FORMS", ("triton",))
    found = list(kernels.findings("cpu"))
    assert {one.status for one in found} == {SKIPPED}
    assert {one.finding for one in found} == {triton_interpreter.broken()}
    assert kernels._no_triton("cuda") is None, "a compiled kernel needs no interpreter"

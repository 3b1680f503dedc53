"""What kernels `compiled` need, and how a run without it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from perfbench import cli
from perfbench.doctor.machine import compiling
from perfbench.machine import compiler

RUN = ["run", "smoke", "--set", "kernels=compiled", "--set", "device=cpu", "--dry-run"]


@pytest.fixture
def a_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only program on PATH; the cache is a folder that is not there yet."""
    programs = tmp_path / "programs"
    programs.mkdir()
    made = programs / "a-compiler"
    made.write_text("#!/bin/sh\n")
    made.chmod(0o755)
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setenv("CXX", "a-compiler")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    return made


def refusal(capsys: pytest.CaptureFixture[str], *more: str) -> str:
    assert cli.main([*RUN, *more]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.usefixtures("a_compiler")
def test_a_compiler_and_a_folder_are_enough() -> None:
    assert compiler.problem() is None
    assert compiling().status == "ok"


def test_no_compiler_is_refused(
    a_compiler: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    a_compiler.unlink()
    monkeypatch.delenv("CXX")
    monkeypatch.setattr("sys.platform", "linux")
    line = refusal(capsys, "--set", "runtime=static")
    assert "compiled: no C++ compiler: there is no g++ on PATH; install g++, or choose kernels eager" in line
    assert (compiling().status, compiling().remedy) == ("warn", "install g++")


@pytest.mark.usefixtures("a_compiler")
def test_a_cache_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "cache").write_text("a file in the folder's place")
    line = refusal(capsys, "--set", "runtime=static")
    assert f"can't write to {tmp_path / 'cache'}, which keeps what was compiled: file exists; set TORCHINDUCTOR" in line
    assert line.endswith("or choose kernels eager")


@pytest.mark.usefixtures("a_compiler")
@pytest.mark.parametrize("runtime", ["transformers", "[static, transformers]"])
def test_other_runtimes_are_refused(runtime: str, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "--set", f"runtime={runtime}")
    assert "compiled: it compiles runtime static's decode step, not that of transformers" in line
    assert line.endswith("choose runtime static, or kernels eager")

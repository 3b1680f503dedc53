"""Shared by all tests: no network, where the real data is, a real browser, and GPU tests skipped without a GPU."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Read by huggingface_hub when it is first imported, so it has to stand before any import of it.
os.environ["HF_HUB_OFFLINE"] = "1"
# Read by triton when it is first imported (transformers does): without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidiactl").exists():
    os.environ["TRITON_INTERPRET"] = "1"
# Read by the OpenMP library when torch loads it: threads that wait in a busy loop slow other processes tenfold.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# A shell starts a background job with SIGINT ignored, and whatever the tests start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest

from tests.browser import Browser


def pytest_configure(config: pytest.Config) -> None:
    """Benchmarks are called once and not timed, unless they are asked for. No garbage is collected until the tests are,
    since the libraries that they import leave none."""
    gc.disable()
    if not (config.option.benchmark_only or config.option.benchmark_enable):
        config.option.benchmark_disable = True


@pytest.fixture
def own_methods(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The test begins and ends with perfbench's own methods, whatever plugins it reads."""
    from perfbench.methods.registry import METHODS
    from perfbench.spec import method_plugins

    monkeypatch.setattr(method_plugins, "_READ", {})
    own = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(own)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are skipped, with the reason, where torch finds no CUDA device; those marked `interpreter`
    where they would run in an interpreter of Triton's that is known to fail."""
    from perfbench.machine.triton_interpreter import broken

    if "TRITON_INTERPRET" in os.environ and (why := broken()):
        for item in items:
            if item.get_closest_marker("interpreter"):
                item.add_marker(pytest.mark.skip(reason=why))
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if not marked:
        return
    import torch

    if not torch.cuda.is_available():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and torch finds none here"))


def pytest_collection_finish() -> None:
    """The libraries that the tests have imported stay: collections of garbage need not look through them."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.fixture(autouse=True)
def _pinned_threads() -> Iterator[None]:
    """Two torch threads in tests that use torch, so that sums are split alike on every machine."""
    torch = sys.modules.get("torch")
    if torch is None:
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def compiling() -> Callable[..., str]:
    """Runs a Python program with arguments in a process where Triton's kernels are compiled and not interpreted, and
    gives what it prints."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}

    def run(program: str, *arguments: object) -> str:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture(scope="session")
def test_data() -> Path:
    """The folder of real data that PERFBENCH_TEST_DATA names; the test is skipped where there is none."""
    folder = os.environ.get("PERFBENCH_TEST_DATA")
    if not folder:
        pytest.skip("needs real data: set PERFBENCH_TEST_DATA to its folder")
    if not Path(folder).is_dir():
        pytest.skip(f"needs real data: PERFBENCH_TEST_DATA is {folder}, and there is no such folder")
    return Path(folder)


@pytest.fixture(scope="session")
def stories260k(test_data: Path) -> Path:
    """The folder of a real Llama of 260,032 parameters with its tokenizer."""
    folder = test_data / "stories260K" / "hf"
    if not folder.is_dir():
        pytest.skip(f"needs a real checkpoint: no folder stories260K/hf in {test_data}")
    return folder


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """One browser for all tests; they are skipped where there is none."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs a browser: no chromium, chromium-browser or google-chrome on PATH")
    # Its processes may write a last file while the folder is being removed.
    with tempfile.TemporaryDirectory(prefix="perfbench-browser-", ignore_cleanup_errors=True) as profile:
        found = Browser(program, Path(profile))
        yield found
        found.close()

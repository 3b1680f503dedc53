"""What a run records about its machine: real facts, JSON-able, and nothing about who runs it."""

from __future__ import annotations

import getpass
import json
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from perfbench.machine import environment
from perfbench.machine.environment import checkout, collect, limits
from perfbench.machine.nvml import GpuProcess

# perfbench's own folder; the symbolic links in it don't matter here.
PACKAGE = Path(environment.__file__).parent


def test_it_says_what_the_machine_says():
    found = collect("cpu", 3)
    assert json.loads(json.dumps(found)) == found
    assert found["device_kind"] == "cpu"
    assert found["cpu"]["threads"] == 3
    assert found["cpu"]["memory_bytes"] == psutil.virtual_memory().total
    assert found["cpu"]["logical_cores"] == os.cpu_count()
    assert found["cpu"]["model"]
    assert platform.python_version() in found["python"]
    assert platform.release() in found["os"]
    assert len(found["load_average"]) == 3


def test_threads_left_to_torch_are_none():
    assert collect("cuda", None)["cpu"]["threads"] is None


def test_versions_are_the_installed_ones():
    import numpy
    import torch

    versions = collect("cpu", 1)["versions"]
    assert (versions["torch"], versions["numpy"]) == (torch.__version__, numpy.__version__)
    assert environment.version_of("perfbench-no-such-package") is None


def test_nothing_names_the_user_the_host_or_a_folder(monkeypatch):
    monkeypatch.setenv("LD_PRELOAD", "")
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    text = json.dumps(collect("cpu", 1))
    assert str(Path.home()) + "/" not in text
    assert str(PACKAGE) not in text
    assert f'"{platform.node()}"' not in text
    assert f'"{getpass.getuser()}"' not in text


def test_only_variables_that_matter_are_recorded(monkeypatch):
    for name in environment.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LD_PRELOAD", "/home/somebody/libjemalloc.so.2:/opt/libother.so")
    assert environment.variables() == {"OMP_NUM_THREADS": "2", "LD_PRELOAD": "libjemalloc.so.2 libother.so"}


def test_gpus_are_listed_with_the_other_programs_on_them(monkeypatch):
    """A stand-in plays the driver: no GPU was at hand."""
    readings = {
        "name": "Some GPU",
        "device_total_bytes": 80,
        "device_used_bytes": 3,
        "driver_version": "580.1",
        "sm_clock_mhz": 1410,
        "max_sm_clock_mhz": 1980,
        "power_limit_watts": 700.0,
        "throttle_reasons": ["gpu_idle"],
        "processes": [GpuProcess(os.getpid(), "python", 1), GpuProcess(os.getpid() + 1, "other", 2)],
    }
    gpu = SimpleNamespace(**{name: (lambda value=value: value) for name, value in readings.items()})
    monkeypatch.setattr(environment.Nvml, "devices", lambda: [gpu])
    (found,) = collect("cuda", None)["gpus"]
    assert found["other_processes"] == [{"name": "other", "used_bytes": 2}]
    assert (found["name"], found["memory_bytes"], found["max_sm_clock_mhz"]) == ("Some GPU", 80, 1980)
    assert json.loads(json.dumps(found)) == found


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, {"cpus": None, "memory_bytes": None}),
        ({"cpu.max": "150000 100000\n", "memory.max": "1048576\n"}, {"cpus": 1.5, "memory_bytes": 1048576}),
        ({"cpu.max": "max 100000\n", "memory.max": "max\n"}, {"cpus": None, "memory_bytes": None}),
        (
            {
                "cpu/cpu.cfs_quota_us": "200000",
                "cpu/cpu.cfs_period_us": "100000",
                "memory/memory.limit_in_bytes": "1048576",
            },
            {"cpus": 2.0, "memory_bytes": 1048576},
        ),
        (
            {"cpu/cpu.cfs_quota_us": "-1", "memory/memory.limit_in_bytes": "9223372036854771712"},
            {"cpus": None, "memory_bytes": None},
        ),
    ],
)
def test_a_containers_limits(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert limits(tmp_path) == expected


def git(folder, *arguments):
    identity = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path):
    """A checkout with a package in it, committed."""
    root = tmp_path / "checkout"
    (root / "perfbench").mkdir(parents=True)
    (root / "perfbench" / "__init__.py").write_text("")
    (root / "pyproject.toml").write_text("")
    git(tmp_path, "init", "-q", "checkout")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    return root


def test_the_commit_and_whether_the_code_was_changed(repository):
    clean = {"commit": git(repository, "rev-parse", "HEAD"), "dirty": False}
    assert checkout(repository / "perfbench") == clean
    (repository / "results").mkdir()
    (repository / "results" / "run.json").write_text("{}")
    assert checkout(repository / "perfbench") == clean, "a result is not code"
    (repository / "perfbench" / "new.py").write_text("")
    assert checkout(repository / "perfbench") == {**clean, "dirty": True}
    (repository / "perfbench" / "new.py").unlink()
    (repository / "perfbench" / "__init__.py").write_text("changed")
    assert checkout(repository / "perfbench") == {**clean, "dirty": True}


def test_a_copy_installed_inside_another_checkout_has_no_commit(repository):
    installed = repository / ".venv" / "site-packages" / "perfbench"
    installed.mkdir(parents=True)
    assert checkout(installed) is None


def test_outside_a_checkout_or_without_git_there_is_none(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    (tmp_path / "plain" / "perfbench").mkdir(parents=True)
    assert checkout(tmp_path / "plain" / "perfbench") is None
    monkeypatch.setenv("PATH", str(tmp_path))
    assert checkout(repository / "perfbench") is None


def test_git_variables_do_not_point_elsewhere(repository, monkeypatch, tmp_path):
    commit = git(repository, "rev-parse", "HEAD")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "elsewhere"))
    found = checkout(repository / "perfbench")
    assert found is not None
    assert found["commit"] == commit


def test_kernel_settings_are_tuned_or_defaults(tmp_path: Path) -> None:
    table = tmp_path / "settings.json"
    table.write_text('{"A Card": {}}')
    assert environment.kernel_settings(["A Card", "Another"], table) == {"A Card": "tuned", "Another": "defaults"}
    assert environment.kernel_settings([], table) == {}
    assert environment.collect("cpu", 1)["kernel_settings"] == environment.kernel_settings()

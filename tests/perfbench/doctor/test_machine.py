"""The doctor's checks of the machine, each fault planted, and each package missing that one needs."""

from __future__ import annotations

import builtins
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from perfbench.doctor import machine
from perfbench.machine import environment


@pytest.mark.parametrize(
    ("name", "status", "said"),
    [
        ("Linux", "ok", "everything is tested"),
        ("Darwin", "warn", "no CUDA and no Triton kernels"),
        ("Windows", "warn", "no limits for generated SQL"),
        ("Plan9", "warn", "Plan9: not tested here"),
    ],
)
def test_what_other_systems_lack_is_said(monkeypatch, name, status, said):
    monkeypatch.setattr(machine.platform, "system", lambda: name)
    found = machine.system()
    assert found.status == status
    assert said in found.finding


def test_cuda_agrees_with_torch():
    import torch

    assert (machine.cuda().status == "ok") <= torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert machine.cuda().finding.startswith("no CUDA device")


@pytest.mark.parametrize(
    ("available", "version", "status", "expected"),
    [
        (False, None, "warn", "this torch is a CPU build"),
        (False, "13.0", "warn", "torch finds no usable GPU"),
        (True, "13.0", "ok", "cases run on Some GPU (80 GiB)"),
    ],
)
def test_what_torch_says_of_cuda(monkeypatch, available, version, status, expected):
    import torch

    gpu = SimpleNamespace(name="Some GPU", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    check = machine.cuda()
    assert check.status == status
    assert expected in check.finding


def test_old_gpus_lack_bf16(monkeypatch):
    import torch

    test_what_torch_says_of_cuda(monkeypatch, True, "13.0", "ok", "cases run on")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    check = machine.cuda()
    assert check.status == "warn"
    assert "bf16 is not native" in check.finding


def test_a_torch_that_cannot_be_imported(monkeypatch):
    def damaged(name, *rest, real=builtins.__import__):
        if name == "torch":
            raise OSError("libtorch.so: no such file\nand more")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", damaged)
    check = machine.cuda()
    assert (check.status, check.finding) == ("missing", "torch can't be imported: libtorch.so: no such file and more")


@pytest.mark.parametrize(
    ("absent", "skipped"),
    [
        ("torch", {"cuda"}),
        ("psutil", {"kernel settings", "memory", "cpu clock", "cpu load"}),
        ("huggingface_hub", {"hub"}),
    ],
)
def test_without_a_package_only_what_needs_it_is_skipped(monkeypatch, absent, skipped):
    monkeypatch.setitem(sys.modules, absent, None)
    if absent == "psutil":  # which this imports
        monkeypatch.delitem(sys.modules, "perfbench.machine.environment")
        monkeypatch.delattr("perfbench.machine.environment")
    found = [check for check in machine.all_of_them() if check.finding.startswith("skipped: ")]
    assert {check.name for check in found} == skipped
    assert {check.finding for check in found} == {f"skipped: it needs {absent}, which is not installed"}
    assert all(absent in check.remedy for check in found)


def test_every_check_is_called_what_it_calls_itself():
    assert [check.name for check in machine.all_of_them()] == list(machine.MACHINE_CHECKS)


def test_other_programs_on_the_gpu(monkeypatch):
    processes = [SimpleNamespace(pid=os.getpid(), name="python"), SimpleNamespace(pid=-1, name="other")]
    monkeypatch.setattr(machine.Nvml, "why_not", lambda: None)
    monkeypatch.setattr(machine.Nvml, "devices", lambda: [SimpleNamespace(processes=lambda: processes)])
    check = machine.nvml()
    assert check.status == "warn"
    assert "1 other programs compute on the GPUs: other" in check.finding
    processes.pop()
    assert machine.nvml().status == "ok"


def test_no_driver(monkeypatch):
    monkeypatch.setattr(machine.Nvml, "why_not", lambda: "NVML is not available: reason")
    check = machine.nvml()
    assert check.status == "warn"
    assert check.finding.startswith("NVML is not available: reason; ")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    check = machine.triton()
    assert check.status == "warn"
    assert "kernels: eager works without it" in check.finding


def test_the_name_kernels(tmp_path):
    assert machine.kernels_name().status == "ok"
    (tmp_path / "kernels").write_text("../kernels")  # what git writes for a link where links are off
    assert machine.kernels_name(tmp_path).status == "missing"
    (tmp_path / "kernels").unlink()
    (tmp_path / "kernels").mkdir()
    assert machine.kernels_name(tmp_path).status == "ok"
    (tmp_path / "kernels" / "__init__.py").write_text("")
    check = machine.kernels_name(tmp_path)
    assert (check.status, check.remedy) == ("missing", "delete kernels/__init__.py")


@pytest.mark.parametrize(
    ("free", "limit", "status", "fits", "too_large"),
    [
        (2**37, None, "ok", "llama2-13b", None),
        (2**33, None, "ok", "llama-110m", "llama2-7b"),
        (2**30, None, "warn", "no named shapes", "llama-110m"),
        (2**37, 2**30, "warn", "no named shapes", "llama-110m"),
    ],
)
def test_memory_says_what_fits(monkeypatch, free, limit, status, fits, too_large):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(environment, "limits", lambda: {"memory_bytes": limit})
    check = machine.memory()
    here, _, not_here = check.finding.partition("; too large are ")
    assert check.status == status
    assert fits in here
    assert (too_large or "") in not_here


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**34))
    assert machine.disk(tmp_path).status == "ok"
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert machine.disk(tmp_path).status == "warn"
    monkeypatch.setattr(machine.os, "access", lambda folder, mode: False)
    assert "not writable" in machine.disk(tmp_path).finding


def test_the_memory_peak(tmp_path):
    check = machine.peak_memory(tmp_path / "nowhere" / "clear_refs")
    assert check.status == "warn"
    assert "No such file" in check.finding
    if Path("/proc/self/clear_refs").exists():
        assert machine.peak_memory().status == "ok"


@pytest.mark.parametrize(("governor", "status"), [(None, "warn"), ("powersave", "warn"), ("performance", "ok")])
def test_the_clock(monkeypatch, governor, status):
    monkeypatch.setattr(environment, "governor", lambda: governor)
    assert machine.cpu_clock().status == status


@pytest.mark.parametrize(
    ("load", "quota", "status", "remedy"),
    [
        (0.1, None, "ok", ""),
        (7.5, None, "warn", "wait, or stop them"),
        (0.1, 1.5, "warn", "use at most 1 threads"),
    ],
)
def test_the_load(monkeypatch, load, quota, status, remedy):
    monkeypatch.setattr(psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(environment, "limits", lambda: {"cpus": quota})
    check = machine.cpu_load()
    assert (check.status, check.remedy) == (status, remedy)


@pytest.mark.parametrize(("offline", "status"), [(True, "warn"), (False, "ok")])
def test_the_hub_is_not_asked(monkeypatch, tmp_path, offline, status):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path.home() / "perfbench-no-such-cache"))
    check = machine.hub()
    assert check.status == status
    assert "(~/perfbench-no-such-cache) does not exist yet" in check.finding
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert f"({tmp_path}) exists" in machine.hub().finding


def test_a_gpu_that_was_not_tuned_for_is_named():
    found = machine.tuned_kernels({"A Card": "tuned", "Another": "defaults"})
    assert found.status == "warn"
    assert "lacks Another" in found.finding
    assert "kernels.tune --write" in found.remedy
    assert machine.tuned_kernels({"A Card": "tuned"}).status == "ok"
    assert "no GPU" in machine.tuned_kernels({}).finding

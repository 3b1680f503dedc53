"""The doctor's checks on this machine, and each fault planted."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from perfbench import doctor
from perfbench.doctor import Check


def shown(found) -> str:
    console = Console(width=400, record=True, file=open(os.devnull, "w"))  # noqa: SIM115, PTH123
    with console.file:
        console.print(doctor.render(found))
    return console.export_text()


def test_this_machine_can_run_the_tests():
    found = doctor.checks()
    assert [check for check in found if check.status == "missing"] == []
    names = [check.name for check in found]
    assert {"python", "torch", "transformers", "peft", "cuda", "nvml", "memory", "disk", "hub"} <= set(names)
    assert len(names) == len(set(names))
    assert all(check.remedy for check in found if check.status != "ok" and "bf16" not in check.finding)
    assert "\n" not in "".join(check.finding + check.remedy for check in found)
    text = shown(found)
    assert all(name in text for name in names)


def test_packages_in_out_of_range_and_absent():
    absent, newer, here, not_here = (
        "perfbench-no-such-package>=1",
        "rich>=9999",
        "rich>=1",
        "perfbench-no-such-package; platform_system == 'Nowhere'",
    )
    extra = "perfbench-no-such-package; extra == 'test'"
    found = doctor.packages([absent, newer, here, not_here, extra])
    assert [check.status for check in found] == ["missing", "warn", "ok"]
    assert found[0].remedy == "pip install -c constraints.txt 'perfbench-no-such-package>=1'"
    assert found[1].finding == f"{importlib.metadata.version('rich')}, outside the tested range >=9999"


def test_the_ranges_are_perfbenchs_own():
    required = {re.split(r"[<>=!~;\s]", line)[0] for line in importlib.metadata.requires("perfbench") or []}
    checked = {check.name for check in doctor.packages()}
    assert {"torch", "transformers", "peft"} <= checked <= required


def test_python_outside_the_range(monkeypatch):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.8.1")
    check = doctor.python()
    assert (check.status, check.finding) == ("missing", "3.8.1, outside >=3.11")


def test_not_installed(monkeypatch):
    def absent(_):
        raise importlib.metadata.PackageNotFoundError("perfbench")

    monkeypatch.setattr(importlib.metadata, "metadata", absent)
    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert doctor.python() == Check(
        "perfbench", "missing", "not installed in this Python", "pip install -e . in its checkout"
    )
    assert doctor.packages() == []


def test_cuda_agrees_with_torch():
    import torch

    assert (doctor.cuda().status == "ok") <= torch.cuda.is_available()
    if not torch.cuda.is_available():
        assert doctor.cuda().finding.startswith("no CUDA device")


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
    check = doctor.cuda()
    assert check.status == status
    assert expected in check.finding


def test_old_gpus_lack_bf16(monkeypatch):
    import torch

    test_what_torch_says_of_cuda(monkeypatch, True, "13.0", "ok", "cases run on")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    check = doctor.cuda()
    assert check.status == "warn"
    assert "bf16 is not native" in check.finding


def test_a_torch_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert doctor.cuda().status == "missing"


def test_other_programs_on_the_gpu(monkeypatch):
    processes = [SimpleNamespace(pid=os.getpid(), name="python"), SimpleNamespace(pid=-1, name="other")]
    monkeypatch.setattr(doctor.Nvml, "why_not", lambda: None)
    monkeypatch.setattr(doctor.Nvml, "devices", lambda: [SimpleNamespace(processes=lambda: processes)])
    check = doctor.nvml()
    assert check.status == "warn"
    assert "1 other programs compute on the GPUs: other" in check.finding
    processes.pop()
    assert doctor.nvml().status == "ok"


def test_no_driver(monkeypatch):
    monkeypatch.setattr(doctor.Nvml, "why_not", lambda: "NVML is not available: reason")
    check = doctor.nvml()
    assert check.status == "warn"
    assert check.finding.startswith("NVML is not available: reason; ")


def test_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    check = doctor.triton()
    assert check.status == "warn"
    assert "kernels: eager works without it" in check.finding


def test_the_name_kernels(tmp_path):
    assert doctor.kernels_name().status == "ok"
    (tmp_path / "kernels").write_text("../kernels")  # what git writes for a link where links are off
    assert doctor.kernels_name(tmp_path).status == "missing"
    (tmp_path / "kernels").unlink()
    (tmp_path / "kernels").mkdir()
    assert doctor.kernels_name(tmp_path).status == "ok"
    (tmp_path / "kernels" / "__init__.py").write_text("")
    check = doctor.kernels_name(tmp_path)
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
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    monkeypatch.setattr(doctor, "limits", lambda: {"memory_bytes": limit})
    check = doctor.memory()
    here, _, not_here = check.finding.partition("; too large are ")
    assert check.status == status
    assert fits in here
    assert (too_large or "") in not_here


def test_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**34))
    assert doctor.disk(tmp_path).status == "ok"
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert doctor.disk(tmp_path).status == "warn"
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    assert "not writable" in doctor.disk(tmp_path).finding


def test_the_memory_peak(tmp_path):
    check = doctor.peak_memory(tmp_path / "nowhere" / "clear_refs")
    assert check.status == "warn"
    assert "No such file" in check.finding
    if Path("/proc/self/clear_refs").exists():
        assert doctor.peak_memory().status == "ok"


@pytest.mark.parametrize(
    ("governor", "status"), [(None, "warn"), ("powersave", "warn"), ("performance", "ok")]
)
def test_the_clock(monkeypatch, governor, status):
    monkeypatch.setattr(doctor, "governor", lambda: governor)
    assert doctor.cpu_clock().status == status


@pytest.mark.parametrize(
    ("load", "quota", "status", "remedy"),
    [
        (0.1, None, "ok", ""),
        (7.5, None, "warn", "wait, or stop them"),
        (0.1, 1.5, "warn", "use at most 1 threads"),
    ],
)
def test_the_load(monkeypatch, load, quota, status, remedy):
    monkeypatch.setattr(doctor.psutil, "cpu_count", lambda: 8)
    monkeypatch.setattr(doctor.os, "getloadavg", lambda: (load, 0, 0))
    monkeypatch.setattr(doctor, "limits", lambda: {"cpus": quota})
    check = doctor.cpu_load()
    assert (check.status, check.remedy) == (status, remedy)


@pytest.mark.parametrize(("offline", "status"), [(True, "warn"), (False, "ok")])
def test_the_hub_is_not_asked(monkeypatch, tmp_path, offline, status):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(Path.home() / "perfbench-no-such-cache"))
    check = doctor.hub()
    assert check.status == status
    assert "(~/perfbench-no-such-cache) does not exist yet" in check.finding
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert f"({tmp_path}) exists" in doctor.hub().finding


def test_text_from_the_machine_is_not_markup():
    text = shown([Check("a [b]", "warn", "a GPU called [/bold] [red]x", "see [link]")])
    assert "a [b]" in text
    assert "a GPU called [/bold] [red]x" in text
    assert "see [link]" in text


def test_the_verdict():
    ok, warn, missing = (Check(status, status, "") for status in ("ok", "warn", "missing"))
    assert doctor.verdict([ok]) == "This machine can run perfbench."
    assert doctor.verdict([ok, warn]) == "This machine can run perfbench; read what is said of warn."
    assert doctor.verdict([ok, warn, missing]) == "This machine can't run perfbench yet: mend missing."


def test_a_gpu_that_was_not_tuned_for_is_named():
    found = doctor.tuned_kernels({"A Card": "tuned", "Another": "defaults"})
    assert found.status == "warn"
    assert "lacks Another" in found.finding
    assert "kernels.tune --write" in found.remedy
    assert doctor.tuned_kernels({"A Card": "tuned"}).status == "ok"
    assert "no GPU" in doctor.tuned_kernels({}).finding

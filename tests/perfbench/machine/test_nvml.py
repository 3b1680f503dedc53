"""The readings of NVML. No GPU was at hand when these were written: a small stand-in plays the driver, and
only the path without a driver uses the real library (and the one test marked `gpu`, unrun so far)."""

from __future__ import annotations

from types import SimpleNamespace

import pynvml
import pytest

from perfbench.machine.nvml import CLOCK_REASONS, FATAL, GpuProcess, Nvml

UUID = "12345678-aaaa-bbbb-cccc-1234567890ab"


class FakeNvml:
    """One GPU. Errors, constants and missing functions are the real library's."""

    NVML_CLOCK_SM = pynvml.NVML_CLOCK_SM

    def __init__(self, prefix="GPU-", reasons=0, missing=(), error=pynvml.NVMLError_NotSupported, unknown=None):
        self.unknown = unknown or pynvml.NVMLError_NotFound
        self.uuid, self.reasons, self.missing, self.error = prefix + UUID, reasons, missing, error
        self.started = False

    def __getattr__(self, name):
        if name.startswith("NVMLError"):
            return getattr(pynvml, name)
        raise AttributeError(name)

    def __getattribute__(self, name):
        found = object.__getattribute__(self, name)
        if name.startswith("nvml"):
            assert hasattr(pynvml, name), f"the real library has no {name}"
            if name != "nvmlInit":
                assert self.started, f"{name} before nvmlInit"
            if name in self.missing:
                return self._raise
        return found

    def _raise(self, *_):
        raise self.error()

    def nvmlInit(self):
        self.started = True

    def nvmlDeviceGetCount(self):
        return 1

    def nvmlDeviceGetHandleByIndex(self, index):
        return f"handle{index}"

    def nvmlDeviceGetHandleByUUID(self, uuid):
        if uuid != self.uuid:
            raise self.unknown()
        return "handle0"

    def nvmlDeviceGetName(self, handle):
        return "Some GPU"

    def nvmlSystemGetDriverVersion(self):
        return "580.1"

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(total=80 * 2**30, used=3 * 2**30, free=77 * 2**30)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=7, usedGpuMemory=2**30), SimpleNamespace(pid=8, usedGpuMemory=None)]

    def nvmlSystemGetProcessName(self, pid):
        return "/home/somebody/bin/python"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {pynvml.NVML_CLOCK_SM: 1410}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {pynvml.NVML_CLOCK_SM: 1980}[kind]

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self.reasons

    def nvmlDeviceGetPowerUsage(self, handle):
        return 123_456

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 700_000

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        return 987_654_321


def opened(**options) -> Nvml:
    gpu = Nvml.open(UUID, FakeNvml(**options))
    assert gpu is not None
    return gpu


def test_every_reading():
    gpu = opened(reasons=0x4 | 0x40)
    assert (gpu.name(), gpu.driver_version()) == ("Some GPU", "580.1")
    assert (gpu.device_total_bytes(), gpu.device_used_bytes()) == (80 * 2**30, 3 * 2**30)
    assert (gpu.sm_clock_mhz(), gpu.max_sm_clock_mhz()) == (1410, 1980)
    assert gpu.throttle_reasons() == ["sw_power_cap", "hw_thermal_slowdown"]
    assert (gpu.power_watts(), gpu.power_limit_watts()) == (123.456, 700.0)
    assert gpu.total_energy_mj() == 987_654_321


def test_processes_are_found_by_pid_and_named_without_their_folder():
    gpu = opened()
    assert gpu.process_used_bytes(7) == 2**30
    assert gpu.process_used_bytes(8) is None
    assert gpu.process_used_bytes(9) is None
    assert gpu.processes() == [GpuProcess(7, "python", 2**30), GpuProcess(8, "python", None)]


def test_no_reason_is_an_empty_list_and_an_unknown_bit_keeps_its_number():
    assert opened(reasons=0).throttle_reasons() == []
    assert opened(reasons=0x8000).throttle_reasons() == ["unknown_0x8000"]


def test_an_old_driver_has_the_reasons_under_the_old_name():
    gpu = opened(
        reasons=0x20,
        missing={"nvmlDeviceGetCurrentClocksEventReasons"},
        error=pynvml.NVMLError_FunctionNotFound,
    )
    assert gpu.throttle_reasons() == ["sw_thermal_slowdown"]


def test_the_reasons_are_the_real_librarys():
    for bit, name in CLOCK_REASONS.items():
        spelled = "".join(part.capitalize() for part in name.split("_"))
        assert getattr(pynvml, f"nvmlClocksThrottleReason{spelled}") == bit


READINGS = {
    "name": "nvmlDeviceGetName",
    "driver_version": "nvmlSystemGetDriverVersion",
    "device_total_bytes": "nvmlDeviceGetMemoryInfo",
    "device_used_bytes": "nvmlDeviceGetMemoryInfo",
    "sm_clock_mhz": "nvmlDeviceGetClockInfo",
    "max_sm_clock_mhz": "nvmlDeviceGetMaxClockInfo",
    "power_watts": "nvmlDeviceGetPowerUsage",
    "power_limit_watts": "nvmlDeviceGetEnforcedPowerLimit",
    "total_energy_mj": "nvmlDeviceGetTotalEnergyConsumption",
}


NOT_FATAL = sorted(
    name
    for name in dir(pynvml)
    if name.startswith("NVMLError_") and name not in FATAL and issubclass(getattr(pynvml, name), pynvml.NVMLError)
)


def test_the_errors_of_a_query_are_told_from_those_of_the_driver():
    assert {"NVMLError_InvalidArgument", "NVMLError_ArgumentVersionMismatch", "NVMLError_NoData"} <= set(NOT_FATAL)
    assert all(issubclass(getattr(pynvml, name), pynvml.NVMLError) for name in FATAL)


@pytest.mark.parametrize("error", NOT_FATAL)
@pytest.mark.parametrize("reading", READINGS)
def test_a_reading_the_card_does_not_have_is_none(reading, error):
    gpu = opened(missing={READINGS[reading]}, error=getattr(pynvml, error))
    assert getattr(gpu, reading)() is None


def test_missing_lists_of_reasons_and_processes():
    both = {"nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"}
    assert opened(missing=both).throttle_reasons() is None
    gpu = opened(missing={"nvmlDeviceGetComputeRunningProcesses"})
    assert (gpu.processes(), gpu.process_used_bytes(7)) == ([], None)
    assert opened(missing={"nvmlSystemGetProcessName"}).processes()[0] == GpuProcess(7, None, 2**30)


@pytest.mark.parametrize("error", FATAL)
def test_a_lost_gpu_is_not_taken_for_a_missing_reading(error):
    gpu = opened(missing={"nvmlDeviceGetClockInfo"}, error=getattr(pynvml, error))
    with pytest.raises(getattr(pynvml, error)):
        gpu.sm_clock_mhz()


@pytest.mark.parametrize("prefix", ["GPU-", "MIG-"])
def test_torchs_uuid_has_no_prefix(prefix):
    library = FakeNvml(prefix=prefix)
    assert Nvml.open(UUID, library) is not None
    assert Nvml.open(prefix + UUID, library) is not None
    assert Nvml.why_not(UUID, library) is None


def test_a_driver_that_calls_another_kind_of_uuid_invalid():
    library = FakeNvml(prefix="MIG-", unknown=pynvml.NVMLError_InvalidArgument)
    assert Nvml.open(UUID, library) is not None


def test_a_gpu_that_is_not_there():
    library = FakeNvml()
    assert Nvml.open("other", library) is None
    assert Nvml.why_not("other", library) == "NVML knows no GPU other: Not Found"
    assert Nvml.why_not(library=library) is None


def test_every_device_is_listed():
    (gpu,) = Nvml.devices(FakeNvml())
    assert gpu.name() == "Some GPU"


def test_without_a_driver():
    """The real library."""
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError_LibraryNotFound:
        pass
    else:
        pytest.skip("this machine has an NVIDIA driver")
    assert Nvml.open(UUID) is None
    assert Nvml.devices() == []
    assert Nvml.why_not() == "NVML is not available: NVML Shared Library Not Found"


@pytest.mark.gpu
def test_the_real_driver_agrees_with_torch():
    import torch

    properties = torch.cuda.get_device_properties(0)
    gpu = Nvml.open(str(properties.uuid))
    assert gpu is not None, Nvml.why_not(str(properties.uuid))
    total, used = gpu.device_total_bytes(), gpu.device_used_bytes()
    assert total is not None
    assert used is not None
    assert abs(total - properties.total_memory) < 0.1 * total
    assert 0 < used <= total
    assert gpu.name() == properties.name

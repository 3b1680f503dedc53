"""What the NVIDIA driver says about one GPU: memory, clocks, throttling, energy, and who else is on it.

NVML (package nvidia-ml-py, imported as pynvml) opens no CUDA context, so reading it disturbs nothing. A GPU
is found by its UUID: CUDA_VISIBLE_DEVICES renumbers the devices that torch sees, and NVML ignores it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Bit of the clocks-event ("throttle") mask -> name; from nvml.h, the same in its old and its new spelling.
CLOCK_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}


# Errors that are no answer to one query, but say that there will be no answer to any: names in pynvml.
FATAL = ("NVMLError_GpuIsLost", "NVMLError_ResetRequired", "NVMLError_DriverNotLoaded", "NVMLError_Uninitialized")


@dataclass(frozen=True)
class GpuProcess:
    """A process with a context on the GPU. `pid` is the host's, which a container may not know; `name` is the
    program's file name without its folder; `used_bytes` is None where the driver does not say."""

    pid: int
    name: str | None
    used_bytes: int | None


class Nvml:
    """One GPU as NVML sees it. Every reading is None where the card, the driver or our rights do not provide it.

    A reading raises pynvml.NVMLError only when the GPU or the driver is gone (see FATAL): a run can't go on then.
    """

    def __init__(self, library: Any, handle: Any) -> None:
        """`library`: pynvml, initialised; `handle`: the device's handle in it."""
        self._library = library
        self._handle = handle

    @classmethod
    def open(cls, uuid: str, library: Any = None) -> Nvml | None:
        """The GPU of this UUID (torch: `str(torch.cuda.get_device_properties(i).uuid)`); None where there is
        no driver or no such GPU: `why_not(uuid)` says which. `library` stands in for pynvml in tests."""
        library = library or _pynvml()
        try:
            library.nvmlInit()
            return cls(library, _handle_of(library, uuid))
        except library.NVMLError:
            return None

    @staticmethod
    def why_not(uuid: str | None = None, library: Any = None) -> str | None:
        """Why NVML, or the GPU of this UUID, can't be read, in one line; None when it can."""
        library = library or _pynvml()
        try:
            library.nvmlInit()
        except library.NVMLError as error:
            return f"NVML is not available: {error}"
        if uuid is not None:
            try:
                _handle_of(library, uuid)
            except library.NVMLError as error:
                return f"NVML knows no GPU {uuid}: {error}"
        return None

    @classmethod
    def devices(cls, library: Any = None) -> list[Nvml]:
        """Every GPU of the machine, whatever CUDA_VISIBLE_DEVICES says; empty where there is no driver."""
        library = library or _pynvml()
        try:
            library.nvmlInit()
            count = library.nvmlDeviceGetCount()
            return [cls(library, library.nvmlDeviceGetHandleByIndex(index)) for index in range(count)]
        except library.NVMLError:
            return []

    def name(self) -> str | None:
        """The card's product name."""
        return self._read(self._library.nvmlDeviceGetName)

    def driver_version(self) -> str | None:
        """The driver's version."""
        return _or_none(self._library, self._library.nvmlSystemGetDriverVersion)

    def device_total_bytes(self) -> int | None:
        """The GPU's memory, in bytes."""
        memory = self._read(self._library.nvmlDeviceGetMemoryInfo)
        return None if memory is None else memory.total

    def device_used_bytes(self) -> int | None:
        """Memory in use on the whole GPU by all processes and the driver, in bytes."""
        memory = self._read(self._library.nvmlDeviceGetMemoryInfo)
        return None if memory is None else memory.used

    def process_used_bytes(self, pid: int) -> int | None:
        """Memory of process `pid` on this GPU, in bytes; None where NVML does not list it: it has no context
        there, or runs in a container whose process numbers are not the host's."""
        for process in self._running():
            if process.pid == pid:
                return process.usedGpuMemory
        return None

    def processes(self) -> list[GpuProcess]:
        """The processes that compute on this GPU."""
        return [
            GpuProcess(process.pid, self._process_name(process.pid), process.usedGpuMemory)
            for process in self._running()
        ]

    def sm_clock_mhz(self) -> int | None:
        """The multiprocessors' clock now, in MHz."""
        return self._read(self._library.nvmlDeviceGetClockInfo, self._library.NVML_CLOCK_SM)

    def max_sm_clock_mhz(self) -> int | None:
        """The highest clock the multiprocessors can have, in MHz."""
        return self._read(self._library.nvmlDeviceGetMaxClockInfo, self._library.NVML_CLOCK_SM)

    def throttle_reasons(self) -> list[str] | None:
        """Why the clock is not higher, as names; `gpu_idle` only says that nothing was running just now."""
        mask = self._read(self._library.nvmlDeviceGetCurrentClocksEventReasons)
        if mask is None:  # drivers before 535 know the same mask by its old name only
            mask = self._read(self._library.nvmlDeviceGetCurrentClocksThrottleReasons)
        if mask is None:
            return None
        bits = [1 << position for position in range(mask.bit_length()) if mask >> position & 1]
        return [CLOCK_REASONS.get(bit, f"unknown_{bit:#x}") for bit in bits]

    def power_watts(self) -> float | None:
        """Power drawn now, in watts."""
        return _thousandth(self._read(self._library.nvmlDeviceGetPowerUsage))

    def power_limit_watts(self) -> float | None:
        """The enforced power limit, in watts."""
        return _thousandth(self._read(self._library.nvmlDeviceGetEnforcedPowerLimit))

    def total_energy_mj(self) -> int | None:
        """Energy drawn since the driver was loaded, in millijoules: read it twice and subtract."""
        return self._read(self._library.nvmlDeviceGetTotalEnergyConsumption)

    def _read(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return _or_none(self._library, function, self._handle, *arguments)

    def _running(self) -> list[Any]:
        return self._read(self._library.nvmlDeviceGetComputeRunningProcesses) or []

    def _process_name(self, pid: int) -> str | None:
        path = _or_none(self._library, self._library.nvmlSystemGetProcessName, pid)
        return path.rsplit("/", 1)[-1] if path else None  # the folder could name a user


def _pynvml() -> Any:
    """pynvml, imported on first use; importing it needs no driver."""
    import pynvml

    return pynvml


def _handle_of(library: Any, uuid: str) -> Any:
    """The device's handle. torch gives a UUID without NVML's prefix, of a whole GPU and a MIG slice alike."""
    if uuid.startswith(("GPU-", "MIG-")):
        return library.nvmlDeviceGetHandleByUUID(uuid)
    try:
        return library.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except (library.NVMLError_NotFound, library.NVMLError_InvalidArgument):
        return library.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


def _or_none(library: Any, function: Callable[..., Any], *arguments: Any) -> Any:
    """`function(*arguments)`, or None where NVML answers with an error that is not FATAL: drivers and cards differ in
    which one they give to a query that they don't have, and a reading that is missing is no reason to end a run."""
    try:
        return function(*arguments)
    except library.NVMLError as error:
        if isinstance(error, tuple(getattr(library, name) for name in FATAL)):
            raise
        return None


def _thousandth(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000

"""Which device a scenario runs on. Imports torch only when it has to ask."""

from __future__ import annotations

from perfbench.errors import ScenarioError


def device_kind(wanted: str) -> tuple[str, str]:
    """(`cpu` or `cuda`, why) for what a scenario asks for: auto, cpu or cuda.

    ScenarioError where CUDA is asked for and torch has none.
    """
    if wanted == "cpu":
        return "cpu", "asked for"
    import torch

    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    why = "torch is a CPU build" if torch.version.cuda is None else "torch sees no CUDA device"
    if wanted == "cuda":
        raise ScenarioError(f"device: expected a CUDA device, but {why}; set device=cpu, or see `perfbench doctor`")
    return "cpu", why

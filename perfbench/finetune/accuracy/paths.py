"""The paths from a prompt to an answer: as trained, and each way in which adapters are served here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from perfbench.finetune.accuracy.accuracy_config import Serving
from perfbench.finetune.trained_table import served_as
from perfbench.spec.runtime_support import kernels_problem, unsupported

AS_TRAINED = "as-trained"


@dataclass(frozen=True)
class ServingPath:
    """`runtime`: AS_TRAINED (the PEFT model, one tenant at a time) or one that serves a bank; `dtype` of weights and
    arithmetic."""

    runtime: str
    kernels: str
    dtype: str

    @property
    def id(self) -> str:
        """Such as `as-trained-fp32` or `static-triton-bf16`."""
        return "-".join(part for part in (self.runtime, self.kernels, self.dtype) if part)

    def must_equal(self, reference: ServingPath) -> bool:
        """Whether every prediction has to be the reference's: in fp32 nothing but the order of sums differs."""
        return self.dtype == reference.dtype == "fp32"


@dataclass(frozen=True)
class LeftOut:
    """A path that isn't there, and why."""

    id: str
    reason: str


def as_trained(dtype: str) -> ServingPath:
    """The path that all others are compared with."""
    return ServingPath(AS_TRAINED, "", dtype)


def served(serving: Serving, config: Mapping[str, Any], device_kind: str) -> Iterator[ServingPath | LeftOut]:
    """Every path that `serving` asks for; `config`: the backbone's. Runtime transformers is the plain reference and is
    served with kernels eager; static with each kernel set."""
    for dtype in serving.dtypes:
        for runtime in serving.runtimes:
            for kernels in serving.kernels if runtime == "static" else ("eager",):
                path = ServingPath(runtime, kernels, dtype)
                reason = unsupported(runtime, config) or kernels_problem(kernels, device_kind, (runtime,))
                yield path if reason is None else LeftOut(path.id, reason)


def is_served(method: str) -> bool:
    """Whether a bank can serve adapters of this method; what none can hold is judged as trained."""
    return served_as(method) is not None

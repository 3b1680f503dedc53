"""`perfbench export`: a traffic scenario's adapters as folders, for servers that are to have the very same ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import transformers

from perfbench.errors import PerfbenchError, RunDirectoryError
from perfbench.files.run_lock import has_files
from perfbench.measure.on_device import arms
from perfbench.methods import parameters
from perfbench.runtimes import backbone as backbones
from perfbench.spec.cases import Case
from perfbench.spec.traffic import DEFAULT_TENANT_MODEL, TrafficScenario


def export(scenario: TrafficScenario, case: Case, tenants: int, out: Path, say: Callable[[str], None]) -> None:
    """Writes OUT/tenant-0, tenant-1, ...: PEFT checkpoints of the random adapters that the tenants of `case` have.

    PerfbenchError for the bare backbone, for adapters that are folders already, and for a folder that is not empty.
    """
    if case.method == "none":
        raise PerfbenchError("export: the bare backbone has no adapters; choose a method with --method")
    if getattr(case.options, "adapters", None) is not None:
        raise PerfbenchError(f"export: the adapters of {case.arm} are folders already: {case.options.adapters}")
    if out.exists() and (not out.is_dir() or has_files(out)):
        raise RunDirectoryError(f"{out}: expected a new or empty folder; give another --out")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    wanted = scenario.comparison
    say(f"loading {wanted.backbone}")
    backbone = backbones.load(wanted.backbone, wanted.dtype, wanted.device, scenario.common.seed)
    for tenant in range(tenants):
        own = arms.of_tenant(case, tenant)
        folder = out / DEFAULT_TENANT_MODEL.replace("{tenant}", str(tenant))
        values = arms.made_values(own, backbone, tenants, scenario.common.seed, tenant)
        parameters.implementation(own.method).save(values, backbone.shape, own.options, folder, backbone.name)
    say(f"{tenants} adapters of {case.arm} in {out}: {DEFAULT_TENANT_MODEL.replace('{tenant}', '0')} and so on")

"""`perfbench.kernels.tune --write` as the last section: what is best on this GPU goes into the kernels' table."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator

from perfbench.verify.verify_report import FAIL, PASS, SKIPPED, Finding


def findings(device: str) -> Iterator[Finding]:
    """One for each kernel, then whether the table was written."""
    if device != "cuda":
        yield Finding("launch settings", SKIPPED, "expected a CUDA device to time them on, this is a CPU")
        return
    from perfbench.kernels import tune

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = tune.main(["--write"])
    for line in said.getvalue().splitlines():
        kernel, _, times = line.partition(" ")
        if kernel in tune.CANDIDATES:
            yield Finding(kernel, PASS, f"us {' '.join(times.split())}")
    if code == 0:
        text = "kernels/settings.json has this GPU now; what was measured before had other settings"
        yield Finding("launch settings", PASS, text)
    else:
        yield Finding("launch settings", FAIL, f"perfbench.kernels.tune ended with {code}; nothing was written")

"""What a kernel does before the one ahead of it has ended, on a GPU that can start it so early (sm_90 and later).

A product of a decode step lets the kernel behind it, an epilogue, start as soon as the last of its own programs have
started. The epilogue's programs, few and small, then fetch their adapters' weights while the product still reads its
own, and wait for it. CUDA calls it programmatic dependent launch.

An epilogue reads nothing before `wait` that any kernel of the step writes, and writes nothing. The products themselves
start when the epilogue has ended: started early, they took 17% longer on an H200, since what starts on a GPU in use is
crowded onto those of its multiprocessors that are free.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def let_next_start(EARLY: tl.constexpr):
    """The next kernel may start once every program of this one has come here."""
    if EARLY:
        gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr):
    """Until the kernel ahead has ended and all that it wrote can be read."""
    if EARLY:
        gdc_wait()

"""What the exit code of every command means; the only place that has the numbers. Free of torch."""

from __future__ import annotations

import signal

OK = 0
# A check failed, or a run is slower, or a method less accurate, than may be.
FAILED = 1
# The user's input can't be used as it is.
BAD_INPUT = 2
# There are not enough measurements to judge by.
INCONCLUSIVE = 3
# A case crashed or was not measured, or perfbench itself is at fault.
FAULT = 4
# As a shell says of a program that died of the signal: 0 would be a gate's pass.
INTERRUPTED = 128 + signal.SIGINT
BROKEN_PIPE = 128 + signal.SIGPIPE if hasattr(signal, "SIGPIPE") else FAILED

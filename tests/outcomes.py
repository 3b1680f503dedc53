"""What a call of perfbench comes to, and what may be wrong with that: for the fuzzers."""

from __future__ import annotations

import io
import re
import signal
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType

from perfbench import crash_report, exit_codes
from perfbench.cli import main
from perfbench.errors import PerfbenchError

# Of a processor, so that what else the machine does counts for nothing.
LONGEST_S = 20
LONGEST_LINE = 1500
MEANT = {exit_codes.OK, exit_codes.FAILED, exit_codes.BAD_INPUT, exit_codes.INCONCLUSIVE}
# Categories of characters that are not shown as one; of them only the ends of lines may be printed.
OBEYED = {"Cc", "Cs", "Cf", "Co", "Cn"}


class TooLong(BaseException):
    """No answer within LONGEST_S of work."""


@contextmanager
def limited() -> Iterator[None]:
    """Ends with TooLong what works for longer than LONGEST_S."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLong

    before = signal.signal(signal.SIGPROF, end)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def outcome(call: Callable[[], object]) -> tuple[int | str, str, str]:
    """(exit code, standard output, standard error) of a call; what is raised is told as the command line tells it."""
    out, error = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", newline="") for _ in range(2))
    code: int | str
    with redirect_stdout(out), redirect_stderr(error):
        try:
            with limited():
                answer = call()
            code = answer if isinstance(answer, int) else exit_codes.OK
        except PerfbenchError as refused:
            print(f"perfbench: {refused}", file=error)
            code = exit_codes.BAD_INPUT
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else "SystemExit"
        except TooLong:
            code = f"no answer in {LONGEST_S} s"
        except Exception as fault:
            print(f"perfbench: {crash_report.in_one_line(fault)}", file=error)
            code = exit_codes.FAULT
    said = []
    for stream in (out, error):
        stream.flush()
        said.append(stream.buffer.getvalue().decode(errors="replace"))  # type: ignore[attr-defined]
    return code, said[0], said[1]


def problem(code: int | str, out: str, error: str, *, tells: str) -> str:
    """What is wrong with an outcome, in words; "" where nothing is. tells: the command. `gate` tells of a refusal
    in its report; `show` has the exit code of the run, 4 where a case of it crashed."""
    both = out + error
    if "Traceback" in both or "a fault of perfbench itself" in both:
        return "a fault"
    if code not in MEANT and not (code == exit_codes.FAULT and tells == "show"):
        return f"exit code {code}"
    obeyed = {char for char in both if char not in "\n\r" and unicodedata.category(char) in OBEYED}
    if obeyed:
        return f"characters that a terminal obeys: {sorted(map(hex, map(ord, obeyed)))}"
    if any(len(line) > LONGEST_LINE for line in error.splitlines()):
        return "a line that fills the screen"
    refusals = [line for line in error.splitlines() if line.startswith("perfbench")]
    if code == exit_codes.BAD_INPUT and tells != "gate" and len(refusals) != 1:
        return f"{len(refusals)} refusals"
    return ""


class Family:
    """Counts what went wrong over many damaged inputs."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.codes: Counter[int | str] = Counter()

    def expect(self, call: Callable[[], object], about: object, tells: str = "") -> None:
        """Notes the call where its outcome is not as it should be."""
        code, out, error = outcome(call)
        self.codes[code] += 1
        if wrong := problem(code, out, error, tells=tells):
            kept = re.search(r"the traceback is in (\S+)", out + error)
            told = Path(kept[1]).read_text(encoding="utf-8").splitlines() if kept else (error or out).splitlines()
            last = " | ".join(line.strip() for line in told[-12:] if line.strip(" ^~"))
            self.failures.append(f"{about}: {wrong}: {last[-800:]!a}")

    def command(self, *words: str | Path, about: object) -> None:
        """`expect` of a command line."""
        line = [str(word) for word in words]
        self.expect(lambda: main(line), f"{about}: {' '.join(line[:3])}", tells=line[0])

    def assert_none(self) -> None:
        """Fails with the first of the failures and their number; and where nothing was damaged, or all beyond use."""
        assert not self.failures, f"{len(self.failures)} of {self.codes.total()}:\n" + "\n".join(self.failures[:20])
        assert {exit_codes.OK, exit_codes.BAD_INPUT} <= set(self.codes), self.codes

"""One line of the doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "missing"]


@dataclass(frozen=True)
class Check:
    """`status`: ok; warn, something is worse or can't be done; missing, perfbench can't work until it is mended.
    `finding`: what is so; `remedy`: what to do, empty if nothing."""

    name: str
    status: Status
    finding: str
    remedy: str = ""

"""A stand-in for a tensor that knows its size alone: with it a method's own `plan` tells, without torch, how many
numbers a tenant takes. It can what the plans of methods need; any other use raises AttributeError or TypeError."""

from __future__ import annotations

import math
from typing import Any


class Sized:
    """Of `shape`; the results of its operations are as large as torch's would be."""

    def __init__(self, *shape: int):
        self.shape = shape

    def numel(self) -> int:
        """How many numbers it would hold."""
        return math.prod(self.shape)

    def t(self) -> Sized:
        """Transposed; TypeError where it has not two dimensions."""
        rows, columns = self._matrix()
        return Sized(columns, rows)

    def __mul__(self, other: Any) -> Sized:
        return self._broadcast(other)

    def __matmul__(self, other: Any) -> Sized:
        rows, columns = other._matrix() if isinstance(other, Sized) else (None, None)
        if columns is None or not self.shape or self.shape[-1] != rows:
            raise TypeError(f"{self.shape} @ {other!r}: sizes do not fit")
        return Sized(*self.shape[:-1], columns)

    __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = __truediv__ = __mul__

    def _broadcast(self, other: Any) -> Sized:
        if isinstance(other, int | float):
            return Sized(*self.shape)
        if not isinstance(other, Sized) or other.shape != self.shape:
            raise TypeError(f"{self.shape} and {other!r}: expected a number, or the same size")
        return Sized(*self.shape)

    def _matrix(self) -> tuple[int, int]:
        if len(self.shape) != 2:
            raise TypeError(f"expected two dimensions, got {self.shape}")
        return self.shape

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

    @property
    def is_meta(self) -> bool:
        """It has no numbers."""
        return True

    def new_empty(self, *shape: int) -> Sized:
        """Another of any size."""
        return Sized(*shape)

    def new_ones(self, *shape: int) -> Sized:
        """Another of any size."""
        return Sized(*shape)

    def cos(self) -> Sized:
        """As large."""
        return Sized(*self.shape)

    def sin(self) -> Sized:
        """As large."""
        return Sized(*self.shape)

    def flatten(self) -> Sized:
        """In one dimension."""
        return Sized(self.numel())

    def reshape(self, *shape: int) -> Sized:
        """As torch's, with at most one -1; TypeError where the numbers do not fit."""
        known = -math.prod(shape) if -1 in shape else math.prod(shape)
        found = tuple(self.numel() // known if size == -1 else size for size in shape)
        if known <= 0 or math.prod(found) != self.numel():
            raise TypeError(f"{self.shape} does not fit into {shape}")
        return Sized(*found)

    def repeat(self, *times: int) -> Sized:
        """As torch's, with a number for each dimension; TypeError on another count."""
        if len(times) != len(self.shape):
            raise TypeError(f"expected {len(self.shape)} numbers, got {times}")
        return Sized(*(size * count for size, count in zip(self.shape, times, strict=True)))

    def __getitem__(self, index: Any) -> Sized:
        """Of whole numbers and slices."""
        index = index if isinstance(index, tuple) else (index,)
        if len(index) > len(self.shape) or not all(isinstance(one, int | slice) for one in index):
            raise TypeError(f"expected at most {len(self.shape)} whole numbers or slices, got {index}")
        first = [len(range(size)[one]) for size, one in zip(self.shape, index, strict=False) if isinstance(one, slice)]
        return Sized(*first, *self.shape[len(index) :])

    def __setitem__(self, index: Any, value: Any) -> None:
        """There are no numbers to be changed."""

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
        if not isinstance(other, Sized) or self.shape[-len(other.shape) :] != other.shape:
            raise TypeError(f"{self.shape} and {other!r}: expected a number, or the same size at its end")
        return Sized(*self.shape)

    def _matrix(self) -> tuple[int, int]:
        if len(self.shape) != 2:
            raise TypeError(f"expected two dimensions, got {self.shape}")
        return self.shape

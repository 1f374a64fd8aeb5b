"""Read the rows of a tensor, in any order, a block at a time: the numbers of floats, or the codes of packed ternary weights.

Knows tensors; no names, no architectures and no files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from ..adapter.lowrank import spans
from ..checkpoint import Span, Tensor
from ..weights import FOUR

Array = np.ndarray[Any, Any]
Reader = Callable[[int, int], Array]

BLOCK = 1 << 18  # numbers that are read at a time: what a processor's cache holds
UNITS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.uint16, "U8": np.uint8}
LOW_BITS = np.uint64(0x0303030303030303)


@dataclass(frozen=True)
class Matrix:
    """Rows [rows, ...] of a tensor, in the order in which they are to be read; the tensor's own, where `order` is None.

    scale: s of a packed ternary matrix, [1], or its inverse; None where `weight` holds floating-point numbers.
    """

    weight: Tensor
    scale: Tensor | None = None
    inverse: bool = False
    order: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrix as numbers."""
        shape = self.weight.shape
        return (shape[0] * FOUR, *shape[1:]) if self.scale else shape

    @property
    def width(self) -> int:
        """Numbers in a row."""
        return prod(self.shape[1:])

    @property
    def inputs(self) -> tuple[Span, ...]:
        """The byte ranges that it reads."""
        return (*spans(self.weight), *(spans(self.scale) if self.scale else ()))

    def value(self) -> np.float32:
        """Return s of a packed matrix, as float32."""
        assert self.scale is not None
        (stored,) = to_float(np.frombuffer(b"".join(self.scale.chunks()), UNITS[self.scale.dtype]), self.scale.dtype)
        with np.errstate(divide="ignore"):
            return np.float32(1) / stored if self.inverse else stored

    def blocks(self) -> Iterator[Array]:
        """Yield blocks [some rows, numbers of a row]: as they are stored, BF16 as uint16, or codes 0, 1 and 2 of packed weights, uint8."""
        rows = self.shape[0]
        step = max(1, BLOCK // max(self.width, 1))
        if not isinstance(self.weight.data, Span) and not self.scale and self.order is None:
            yield from self._computed(step)
            return
        read = self._reader()
        for first in range(0, rows, step):
            wanted = np.arange(first, min(first + step, rows)) if self.order is None else self.order[first : first + step]
            yield _unpacked(read, self.weight.shape[0], wanted) if self.scale else _picked(read, wanted)

    def _computed(self, step: int) -> Iterator[Array]:
        """Yield so many rows at a time of a tensor that is computed, as its bytes come."""
        unit, held = UNITS[self.weight.dtype], bytearray()
        size = step * self.width * np.dtype(unit).itemsize
        for chunk in self.weight.chunks():
            held += chunk
            for first in range(0, len(held) - size + 1, size):
                yield np.frombuffer(bytes(held[first : first + size]), unit).reshape(-1, self.width)
            del held[: len(held) // size * size]
        if held:
            yield np.frombuffer(bytes(held), unit).reshape(-1, self.width)

    def _reader(self) -> Reader:
        """Return what reads rows [first, end) as they are stored; it holds a packed matrix, or a computed one whose rows are to be put in
        another order, in memory.
        """
        data, rows, unit = self.weight.data, self.weight.shape[0], UNITS[self.weight.dtype]
        if isinstance(data, Span) and not self.scale:
            return lambda first, end: _as_rows(_part(data, rows, first, end), unit, end - first)
        held = bytearray()
        for chunk in self.weight.chunks():
            held += chunk
        whole = _as_rows(held, unit, rows)
        return lambda first, end: whole[first:end]


def _part(span: Span, rows: int, first: int, end: int) -> bytes:
    size = span.length // rows
    return span.source.read(span.path, span.start + first * size, (end - first) * size)


def _as_rows(data: bytes | bytearray, unit: type, rows: int) -> Array:
    return np.frombuffer(data, unit).reshape(rows, -1)


def _picked(read: Reader, wanted: Array) -> Array:
    """Read rows in any order: all between the first and the last, or run by run where they lie far apart."""
    low, high = int(wanted.min()), int(wanted.max()) + 1
    if high - low <= 2 * len(wanted):
        return read(low, high)[wanted - low]
    ends = np.flatnonzero(np.diff(wanted) != 1) + 1
    return np.concatenate([read(int(run[0]), int(run[-1]) + 1) for run in np.split(wanted, ends)])


def _unpacked(read: Reader, quarter: int, wanted: Array) -> Array:
    """Unpack rows of the layout that transformers' bitnet has: row r of R packed ones holds rows r, r + R, r + 2R and r + 3R."""
    packed, shift = read(0, quarter)[wanted % quarter], 2 * (wanted // quarter)[:, None]
    if packed.shape[1] % 8:
        return (packed >> shift.astype(np.uint8)) & np.uint8(3)
    return ((packed.view(np.uint64) >> shift.astype(np.uint64)) & LOW_BITS).view(np.uint8)


def to_float(block: Array, dtype: str) -> Array:
    """Return numbers as float32; BF16 comes as uint16."""
    if dtype == "BF16":
        return (block.astype(np.uint32) << 16).view(np.float32)
    return block.astype(np.float32, copy=False)

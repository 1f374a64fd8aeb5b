"""Ternary weights in 2 bits each, computed while a matrix streams by, in bounded memory. Knows tensors; no model and no config.

The layout is that of transformers' `bitnet` (quant_method bitnet): with R = outputs / 4, byte [r, c] holds the codes of rows r, r + R,
r + 2R and r + 3R of column c in its bits 0-1, 2-3, 4-5 and 6-7; a code is the ternary weight plus 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from ..adapter.lowrank import BLOCK, FLOATS, pieces, spans
from ..checkpoint import Span, Tensor
from ..errors import UnsuitableError
from ..weights import FOUR
from .tally import Counted, Tally

if TYPE_CHECKING:
    import torch

Tell = Callable[[str, Tally], object]  # is told a tensor's name and what its weights became


@dataclass
class Scale:
    """s = mean |W| of a matrix, at least 1e-5, and the sum of the squares of W: computed once, when one is first asked for.

    Of a matrix that is ternary already, all -s, 0 or s, it is that s: its weights stay what they are.
    """

    weight: Tensor
    name: str
    _sums: tuple[float, float] | None = None
    _lock: Lock = field(default_factory=Lock)

    def value(self) -> float:
        """Return s, summed in float64 and rounded once to float32.

        Raises:
            UnsuitableError: a weight is NaN or infinite.
        """
        return self._both()[0]

    def squares(self) -> float:
        """Return |W|^2, summed in float64."""
        return self._both()[1]

    def _both(self) -> tuple[float, float]:
        from .bitlinear import SMALLEST

        with self._lock:
            if self._sums is None:
                total = squares = 0.0
                only: set[float] = set()  # the sizes that numbers other than 0 have, until there are two
                for block in _blocks(self.weight):
                    sizes = block.abs().double()
                    total, squares = total + float(sizes.sum()), squares + float(sizes.dot(sizes))
                    if len(only) < 2 and len(some := sizes[sizes > 0]):
                        only |= {float(some.min()), float(some.max())}
                if not math.isfinite(total):
                    raise UnsuitableError(f"{self.name}: holds NaN or infinity; the training that made it failed, or the file is damaged")
                mean = total / prod(self.weight.shape)
                (value,) = struct.unpack("<f", struct.pack("<f", max(only.pop() if len(only) == 1 else mean, SMALLEST)))
                self._sums = value, squares
        return self._sums


def packed(scale: Scale, tell: Tell | None = None) -> Tensor:
    """Return a matrix [outputs, inputs] as uint8 [outputs / 4, inputs].

    Args:
        tell: is told the matrix's name and the tally of its weights, once all of them are packed.
    """
    weight = scale.weight
    rows, columns = weight.shape

    def chunks() -> Iterator[bytes]:
        counted = Counted(scale.value()) if tell else None
        pack = _pack_by_quarters if isinstance(weight.data, Span) else _pack_in_order
        for codes in pack(scale, rows // FOUR * columns, counted):
            yield bytes(codes.numpy().data)
        if tell and counted:
            tell(scale.name, counted.tally(scale.squares(), weight.nbytes))

    return Tensor("U8", (rows // FOUR, columns), chunks, spans(weight))


def scale_tensor(scale: Scale, inverse: bool) -> Tensor:
    """Return s, or 1 / s, as a float32 tensor of shape [1]."""

    def chunks() -> Iterator[bytes]:
        value = scale.value()
        yield struct.pack("<f", 1 / value if inverse else value)

    return Tensor("F32", (1,), chunks, spans(scale.weight))


def _pack_by_quarters(scale: Scale, quarter: int, counted: Counted | None) -> Iterator[torch.Tensor]:
    """Yield packed codes of a matrix in a file, which is read in four places at once: nothing but blocks is held."""
    import torch

    data, dtype = scale.weight.data, getattr(torch, FLOATS[scale.weight.dtype])
    assert isinstance(data, Span)
    for place in range(0, quarter, BLOCK):
        codes = torch.zeros(count := min(BLOCK, quarter - place), dtype=torch.uint8)
        for number in range(FOUR):
            start = data.start + (number * quarter + place) * dtype.itemsize
            stored = bytearray(data.source.read(data.path, start, count * dtype.itemsize))
            codes |= _codes(torch.frombuffer(stored, dtype=dtype), scale, counted) << 2 * number
        yield codes


def _pack_in_order(scale: Scale, quarter: int, counted: Counted | None) -> Iterator[torch.Tensor]:
    """Yield packed codes of a matrix that is computed, from first to last: all of them are held until the last quarter is there."""
    import torch

    codes, done = torch.zeros(quarter, dtype=torch.uint8), 0
    for block in _blocks(scale.weight):
        for some in _split(_codes(block, scale, counted), quarter, done):
            place = done % quarter
            codes[place : place + len(some)] |= some << (2 * (done // quarter))
            done += len(some)
    yield from codes.split(BLOCK)


def _codes(block: torch.Tensor, scale: Scale, counted: Counted | None) -> torch.Tensor:
    """Return clamp(round(W / s), -1, 1) + 1, uint8, flat, and count what became of W where that is asked for."""
    import torch

    values = block.float()
    codes = values.div(scale.value()).round_().clamp_(-1, 1)
    if counted:
        counted.add(values, codes)
    return codes.add_(1).to(torch.uint8)


def _blocks(weight: Tensor) -> Iterator[torch.Tensor]:
    for piece in pieces(weight):
        yield from piece.split(BLOCK)


def _split(block: torch.Tensor, quarter: int, done: int) -> Iterator[torch.Tensor]:
    """Split a block where a quarter of the matrix ends."""
    while len(block):
        count = min(len(block), quarter - done % quarter)
        yield block[:count]
        block, done = block[count:], done + count

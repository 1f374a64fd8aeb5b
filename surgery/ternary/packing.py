"""Ternary weights in 2 bits each, computed while a matrix streams by, in bounded memory. Knows tensors; no model and no config.

The layout is that of transformers' `bitnet` (quant_method bitnet): with R = outputs / 4, byte [r, c] holds the codes of rows r, r + R,
r + 2R and r + 3R of column c in its bits 0-1, 2-3, 4-5 and 6-7; a code is the ternary weight plus 1.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from threading import Lock
from typing import TYPE_CHECKING

from ..adapter.lowrank import BLOCK, pieces, spans
from ..checkpoint import Tensor
from ..errors import DowncycleError

if TYPE_CHECKING:
    import torch

FOUR = 4  # weights in a byte


@dataclass
class Scale:
    """s = mean |W| of a matrix, at least 1e-5: computed once, when it is first asked for."""

    weight: Tensor
    name: str
    _value: float | None = None
    _lock: Lock = field(default_factory=Lock)

    def value(self) -> float:
        """Return s, summed in float64 and rounded once to float32.

        Raises:
            DowncycleError: a weight is NaN or infinite.
        """
        from .bitlinear import SMALLEST

        with self._lock:
            if self._value is None:
                total = sum(float(block.abs().double().sum()) for block in _blocks(self.weight))
                if not math.isfinite(total):
                    raise DowncycleError(f"{self.name}: holds NaN or infinity; the training that made it failed, or the file is damaged")
                (self._value,) = struct.unpack("<f", struct.pack("<f", max(total / prod(self.weight.shape), SMALLEST)))
        return self._value


def packed(scale: Scale) -> Tensor:
    """Return a matrix [outputs, inputs] as uint8 [outputs / 4, inputs]."""
    weight = scale.weight
    rows, columns = weight.shape

    def chunks() -> Iterator[bytes]:
        import torch

        quarter = rows // FOUR * columns
        codes, done = torch.zeros(quarter, dtype=torch.uint8), 0
        for block in ternary_blocks(scale):
            for some in _split(block, quarter, done):
                place = done % quarter
                codes[place : place + len(some)] |= some << (2 * (done // quarter))
                done += len(some)
        yield from (bytes(piece.numpy().data) for piece in codes.split(BLOCK))

    return Tensor("U8", (rows // FOUR, columns), chunks, spans(weight))


def scale_tensor(scale: Scale, inverse: bool) -> Tensor:
    """Return s, or 1 / s, as a float32 tensor of shape [1]."""

    def chunks() -> Iterator[bytes]:
        value = scale.value()
        yield struct.pack("<f", 1 / value if inverse else value)

    return Tensor("F32", (1,), chunks, spans(scale.weight))


def ternary_blocks(scale: Scale) -> Iterator[torch.Tensor]:
    """Yield clamp(round(W / s), -1, 1) + 1, uint8, flat, a block at a time."""
    import torch

    value = scale.value()
    for block in _blocks(scale.weight):
        yield block.float().div_(value).round_().clamp_(-1, 1).add_(1).to(torch.uint8)


def _blocks(weight: Tensor) -> Iterator[torch.Tensor]:
    for piece in pieces(weight):
        yield from piece.split(BLOCK)


def _split(block: torch.Tensor, quarter: int, done: int) -> Iterator[torch.Tensor]:
    """Split a block where a quarter of the matrix ends."""
    while len(block):
        count = min(len(block), quarter - done % quarter)
        yield block[:count]
        block, done = block[count:], done + count

"""How numbers lie in a GGUF tensor: floats, and ternary weights as TQ2_0, TQ1_0 and I2_S. Computes a tensor's bytes, block by block.

Knows matrices; no names and no files.

TQ2_0: 256 weights in 66 bytes. Two halves of 128 in 32 bytes each, of which byte j holds weights j, j + 32, j + 64 and j + 96 in its bits
0-1, 2-3, 4-5 and 6-7; then d as float16: w = d (code - 1). TQ1_0: 256 weights in 54 bytes, five in a byte as digits of a number in base 3,
v, the first the most significant; the byte is v 256 / 243, rounded up; then d. I2_S (bitnet.cpp on x86): 128 weights in 32 bytes, of which
byte j holds weights j, j + 32, j + 64 and j + 96 in its bits 7-6, 5-4, 3-2 and 1-0; the tensor ends with 32 bytes, the scale as float32
the first four.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod

import numpy as np
from gguf.quants import TQ1_0, TQ2_0

from ..errors import DowncycleError
from .kinds import TYPES, Kind
from .rows import UNITS, Array, Matrix, to_float

ZERO, TAIL = 1, 32  # the code of a zero; bytes behind an I2_S tensor
SIGN_SHIFT = {2: 15, 4: 31, 8: 63}
UNSIGNED = {2: np.uint16, 4: np.uint32, 8: np.uint64}


@dataclass
class Encoder:
    """The bytes of one GGUF tensor: matrices one after the other, as one kind. add: to each number, before all.

    rounded: how many numbers are not exactly what they were; counted while `chunks` runs. rescaled: by how much, relatively, a ternary
    tensor's scale changes where it is rounded to float16.
    """

    name: str
    kind: Kind
    matrices: tuple[Matrix, ...]
    add: float = 0.0
    rounded: int = field(default=0, init=False)
    rescaled: float = field(default=0.0, init=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape, the outermost dimension first."""
        shape = self.matrices[0].shape
        return (len(self.matrices), *shape) if len(self.matrices) > 1 else shape

    @property
    def numbers(self) -> int:
        """How many numbers it holds."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return TYPES[self.kind].nbytes(self.numbers)

    def chunks(self) -> Iterator[bytes]:
        """Yield the bytes in order.

        Raises:
            DowncycleError: a number that the kind cannot hold.
        """
        self.rounded, self.rescaled = 0, 0.0
        for matrix in self.matrices:
            yield from self._ternary(matrix) if self.kind in PACK else self._floats(matrix)

    def _floats(self, matrix: Matrix) -> Iterator[bytes]:
        dtype, scale = matrix.weight.dtype, matrix.value() if matrix.scale else None
        for block in matrix.blocks():
            if matrix.scale:
                _check_codes(block, self.name)
            if dtype == self.kind.upper() and not self.add:
                if not _all_finite(block):
                    raise DowncycleError(f"{self.name}: holds NaN or infinity; mend the model")
                yield block.tobytes()
            elif block.itemsize == 2 and self.kind != "f32" and not self.add:
                stored, faults = _table(dtype, self.kind)
                yield self._counted(stored[block.view(np.uint16)], faults[block.view(np.uint16)])
            else:
                numbers = to_float(block, dtype) if scale is None else (block.astype(np.float32) - 1) * scale
                numbers = numbers + np.float32(self.add) if self.add else numbers
                yield self._counted(*_round(numbers, block if block.dtype == np.float64 and not self.add else numbers, self.kind))

    def _counted(self, stored: Array, faults: Array) -> bytes:
        """Count what was rounded, and refuse what is not finite."""
        if faults.max(initial=0) > 1:
            raise DowncycleError(
                f"{self.name}: holds NaN, infinity or a number that {self.kind.upper()} cannot hold; choose --type f32, or bf16, whose "
                "range is wider, or mend the model"
            )
        self.rounded += int(np.count_nonzero(faults))
        return stored.tobytes()

    def _ternary(self, matrix: Matrix) -> Iterator[bytes]:
        scale = _checked(matrix.value(), self.name) if matrix.scale else np.float32(0)
        for block in matrix.blocks():
            if not matrix.scale:
                codes, scale = ternary_codes(block, matrix.weight.dtype, scale, self.name)
                _checked(scale or np.float32(1), self.name)  # a matrix may begin with zeros
            else:
                codes = _check_codes(block, self.name)
            yield PACK[self.kind](np.ascontiguousarray(codes), scale, self.name)
        if self.kind != "i2_s" and scale:
            self.rescaled = max(self.rescaled, abs(float(np.float16(scale)) / float(scale) - 1))
        if self.kind == "i2_s":
            yield scale.tobytes() + bytes(TAIL - 4)


def _check_codes(block: Array, name: str) -> Array:
    """Return codes of packed weights; refuse those that are none."""
    if block.max() > 2:
        raise DowncycleError(f"{name}: holds codes that are no ternary weights; the file is damaged, fetch it again")
    return block


def _all_finite(block: Array) -> bool:
    """Whether no number is NaN or infinity; BF16 comes as uint16. By the exponent's bits where there are 16: that is faster."""
    if block.itemsize > 2:
        return bool(np.isfinite(block).all())
    exponent = np.uint16(0x7C00 if block.dtype == np.float16 else 0x7F80)
    return bool(((block.view(np.uint16) & exponent) != exponent).all())


def _round(numbers: Array, exact: Array, kind: Kind) -> tuple[Array, Array]:
    """Round float32 numbers to a kind; say of each, by 0, 1 or 2, whether it is `exact`, is not, or is no finite number."""
    if kind == "f16":
        with np.errstate(over="ignore"):
            stored = numbers.astype(np.float16)
        again = stored.astype(np.float32)
    elif kind == "bf16":
        stored = _to_bf16(numbers)
        again = to_float(stored, "BF16")
    else:
        stored = again = numbers
    return stored, np.where(np.isfinite(again), again != exact, 2).astype(np.uint8)


@lru_cache
def _table(dtype: str, kind: Kind) -> tuple[Array, Array]:
    """Return what `_round` makes of each number of 16 bits, by its bits: to look it up is faster."""
    numbers = to_float(np.arange(1 << 16, dtype=np.uint16).view(UNITS[dtype]), dtype)
    return _round(numbers, numbers, kind)


def ternary_codes(block: Array, dtype: str, scale: np.float32, name: str) -> tuple[Array, np.float32]:
    """Return the codes 0, 1 and 2 of numbers that are -s, 0 and s exactly, and s: the one given, unless that is 0 yet.

    Raises:
        DowncycleError: the numbers are no such.
    """
    size = block.dtype.itemsize
    bits = block.view(UNSIGNED[size])
    shift = bits.dtype.type(SIGN_SHIFT[size])
    magnitude = bits & ~(bits.dtype.type(1) << shift)
    nonzero = magnitude != 0
    if not scale:
        scale = np.float32(to_float(_as_stored(magnitude.max(), block), dtype)[0])
    expected = _bits_of(scale, dtype, block)
    if not np.isfinite(scale) or not ((magnitude == expected) | ~nonzero).all():
        raise DowncycleError(
            f"{name}: its numbers are not all -s, 0 or s, so ternary codes would ruin it; make a packed checkpoint first: "
            "downcycle ternarize DIR --out PACKED, and give that"
        )
    up = nonzero.view(np.uint8)
    return up + np.uint8(ZERO) - (up & (bits >> shift).astype(np.uint8)) * np.uint8(2), scale


def _as_stored(magnitude: np.generic, block: Array) -> Array:
    return np.array([magnitude]).view(block.dtype)


def _bits_of(scale: np.float32, dtype: str, block: Array) -> np.generic:
    if dtype == "BF16":
        return np.uint16(np.array([scale], np.float32).view(np.uint32)[0] >> 16)
    return np.array([scale]).astype(block.dtype).view(UNSIGNED[block.dtype.itemsize])[0]


def _checked(scale: np.float32, name: str) -> np.float32:
    """Refuse a scale that is no positive number, or that float16 cannot hold."""
    with np.errstate(over="ignore"):
        half = np.float16(scale)
    if not (np.isfinite(half) and half > 0):
        raise DowncycleError(f"{name}: has the scale {scale}, which is no positive number that float16 can hold; the checkpoint is damaged")
    return scale


def _tq2_0(codes: Array, scale: np.float32, name: str) -> bytes:
    groups = codes.view(np.uint64).reshape(-1, 2, 4, 4)
    packed = groups[:, :, 0] | (groups[:, :, 1] << 2) | (groups[:, :, 2] << 4) | (groups[:, :, 3] << 6)
    return _with_scale(packed.reshape(len(groups), 8).view(np.uint8), scale, codes, TQ2_0.dequantize_blocks, name)


def _tq1_0(codes: Array, scale: np.float32, name: str) -> bytes:
    flat = codes.reshape(-1, 256)
    parts = [
        _digits(flat[:, :160].reshape(-1, 5, 32)),
        _digits(flat[:, 160:240].reshape(-1, 5, 16)),
        _digits(flat[:, 240:].reshape(-1, 4, 4)),
    ]
    return _with_scale(TRITS_TO_BYTE[np.concatenate(parts, 1)], scale, codes, TQ1_0.dequantize_blocks, name)


def _digits(codes: Array) -> Array:
    """Read codes [blocks, 4 or 5 digits, ...] as numbers of five digits in base 3, the first the most significant."""
    value = codes[:, 0] * np.uint8(3)
    for digit in range(1, 5):
        if digit < codes.shape[1]:
            value += codes[:, digit]
        if digit < 4:
            value *= np.uint8(3)
    return value


TRITS_TO_BYTE = ((np.arange(243, dtype=np.uint16) * 256 + 242) // 243).astype(np.uint8)


def _with_scale(packed: Array, scale: np.float32, codes: Array, decode: Callable[[Array], Array], name: str) -> bytes:
    """Put d behind each block, 0 where all of it is zero, and see that the package's own decoder gives the numbers back."""
    flat = codes.reshape(len(packed), -1)
    half = np.where((flat != ZERO).any(1), np.float16(scale), np.float16(0))
    whole = np.concatenate([packed, half[:, None].view(np.uint8)], 1)
    numbers = (flat.astype(np.int8) - np.int8(1)) * half.astype(np.float32)[:, None]
    if not np.array_equal(decode(whole), numbers):
        raise DowncycleError(f"{name}: the installed gguf package decodes its blocks to other numbers; upgrade it: pip install -U gguf")
    return whole.tobytes()


def _i2_s(codes: Array, scale: np.float32, name: str) -> bytes:
    groups = codes.view(np.uint64).reshape(-1, 4, 4)
    packed = (groups[:, 0] << 6) | (groups[:, 1] << 4) | (groups[:, 2] << 2) | groups[:, 3]
    return packed.tobytes()


PACK: dict[str, Callable[[Array, np.float32, str], bytes]] = {"tq2_0": _tq2_0, "tq1_0": _tq1_0, "i2_s": _i2_s}


def _to_bf16(numbers: Array) -> Array:
    """Round to nearest, ties to even."""
    bits = numbers.view(np.uint32)
    return ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)

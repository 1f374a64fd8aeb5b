"""What became of weights that were made ternary: how many are -1, 0 and 1, and how far that is from what they were.

Counts a matrix while it is packed, or a packed one beside its source. Knows tensors and checkpoints; prints nothing.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from ..adapter.lowrank import BLOCK, FLOATS, pieces
from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..stack import NUMBERED, layer_stems
from ..weights import is_inverse, scale_of, ternary_matrices

if TYPE_CHECKING:
    import torch

SCALE_BYTES = 4


@dataclass(frozen=True)
class Tally:
    """The weights of one ternary matrix, or of several together.

    minus, zero, plus: how many are -1, 0 and 1. after: bytes of codes and scales. before: bytes of W, the weights that were rounded;
    lost: |W - sT|^2, squares: |W|^2, float64 sums; all three None where W is not at hand.
    """

    minus: int
    zero: int
    plus: int
    after: int
    before: int | None = None
    lost: float | None = None
    squares: float | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.minus + self.zero + self.plus

    @property
    def shares(self) -> tuple[float, float, float]:
        """The shares of -1, 0 and 1."""
        return self.minus / self.weights, self.zero / self.weights, self.plus / self.weights

    @property
    def error(self) -> float | None:
        """|W - sT| / |W|, Frobenius norms: 0 where W was ternary already. None where W is not at hand."""
        if self.lost is None or self.squares is None:
            return None
        return math.sqrt(self.lost / self.squares) if self.squares else 0.0


@dataclass
class Counted:
    """The weights of a matrix of which blocks are seen one after the other."""

    scale: float
    count: int = 0
    total: int = 0
    others: int = 0
    lost: float = 0.0

    def add(self, values: torch.Tensor, codes: torch.Tensor) -> None:
        """Take a block of W and one of T: float32, flat, at most 2^24 numbers, so that sums of codes are exact."""
        import torch

        self.count += len(codes)
        self.total += int(codes.sum())
        self.others += int(codes.dot(codes))
        rest = torch.add(values, codes, alpha=-self.scale).double()
        self.lost += float(rest.dot(rest))

    def tally(self, squares: float, before: int) -> Tally:
        """Return what was counted. squares: |W|^2; before: bytes of W."""
        plus, minus = (self.others + self.total) // 2, (self.others - self.total) // 2
        zero = self.count - self.others
        return Tally(minus, zero, plus, self.count // 4 + SCALE_BYTES, before, self.lost, squares)


def tally_packed(packed: Checkpoint, source: Checkpoint | None = None) -> dict[str, Tally]:
    """Return the tally of each ternary matrix of a packed checkpoint, by the name of its tensor.

    Args:
        source: the floating-point checkpoint that it was made from; None: nothing is said of the error.
    Raises:
        DowncycleError: codes that are no ternary weights; a source that holds other matrices.
    """
    return {name: _tally(packed, name, source) for name in ternary_matrices(packed)}


def by_layer(checkpoint: Checkpoint, tallies: Mapping[str, Tally]) -> dict[int | None, Tally]:
    """Add the matrices of each decoder layer up, by its number; None: those outside of layers."""
    stems = layer_stems(checkpoint.tensors, checkpoint.num_layers)
    groups: defaultdict[int | None, list[Tally]] = defaultdict(list)
    for name, tally in tallies.items():
        match = NUMBERED.fullmatch(name)
        groups[int(match[2]) if match and match[1] in stems else None].append(tally)
    return {layer: add_up(groups[layer]) for layer in sorted(groups, key=lambda layer: math.inf if layer is None else layer)}


def add_up(tallies: Iterable[Tally]) -> Tally:
    """Return the tally of all matrices together; at least one."""
    found = list(tallies)
    minus, zero, plus, after = (sum(getattr(one, name) for one in found) for name in ("minus", "zero", "plus", "after"))
    before, lost, squares = ([getattr(one, name) for one in found] for name in ("before", "lost", "squares"))
    if None in (*before, *lost, *squares):
        return Tally(minus, zero, plus, after)
    return Tally(minus, zero, plus, after, sum(before), math.fsum(lost), math.fsum(squares))


def _tally(packed: Checkpoint, name: str, source: Checkpoint | None) -> Tally:
    import torch

    tensor, scale = packed.tensors[name], packed.tensors[scale_of(name)]
    codes = torch.frombuffer(bytearray().join(tensor.chunks()), dtype=torch.uint8)
    minus, zero, plus = _counts(codes, f"{packed.name}: {name}")
    after = tensor.nbytes + scale.nbytes
    if source is None:
        return Tally(minus, zero, plus, after)
    weight = source.tensors.get(name)
    if weight is None or weight.dtype not in FLOATS or weight.shape != (4 * tensor.shape[0], tensor.shape[1]):
        raise DowncycleError(f"{source.name}: holds no {name} that {packed.name} can have been made from; give the model that it was")
    counted, squares = Counted(_scale(scale, is_inverse(packed.config))), 0.0
    for values, block in zip(_values(weight, len(codes)), _codes(codes), strict=True):
        counted.add(values, block)
        sizes = values.double()
        squares += float(sizes.dot(sizes))
    return Tally(minus, zero, plus, after, weight.nbytes, counted.lost, squares)


def _counts(codes: torch.Tensor, where: str) -> tuple[int, int, int]:
    """Count -1, 0 and 1 in bytes of four codes each."""
    found = codes.bincount(minlength=256).tolist()
    sums = [0, 0, 0, 0]
    for count, four in zip(found, product(range(4), repeat=4), strict=True):
        for code in four:
            sums[code] += count
    if sums[3]:
        raise DowncycleError(f"{where} holds {sums[3]:,} codes that are no ternary weights; the file is damaged, fetch it again")
    return sums[0], sums[1], sums[2]


def _codes(codes: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield T, float32, in the order of W: each quarter of its rows lies in two bits of all bytes."""
    for quarter in range(4):
        for block in codes.split(BLOCK):
            yield (block >> 2 * quarter & 3).float().sub_(1)


def _values(weight: Tensor, quarter: int) -> Iterator[torch.Tensor]:
    """Yield W, float32, in blocks that end where a quarter of it does."""
    import torch

    left, room = torch.empty(0), min(BLOCK, quarter)
    done = 0
    for piece in pieces(weight):
        left = torch.cat([left, piece.float()])
        while len(left) >= room:
            yield left[:room]
            left, done = left[room:], done + room
            room = min(BLOCK, quarter - done % quarter)


def _scale(scale: Tensor, inverse: bool) -> float:
    """Return s as it is stored, or of its inverse."""
    from ..adapter.lowrank import to_torch

    value = float(to_torch(scale).float())
    (single,) = struct.unpack("<f", struct.pack("<f", 1 / value if inverse else value))
    return float(single)

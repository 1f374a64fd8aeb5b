"""The arithmetic of a merge: W + s BA, block of rows by block of rows, in bounded memory. Needs torch.

Knows tensors and where their bytes are; no configs, no names of modules.

Sums are carried in float32 for 16-bit weights, in float64 for wider ones and for DoRA, and rounded once, to nearest even, to the
weight's dtype. Numbers that are not finite are refused, never written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ..checkpoint import Span, Tensor
from ..errors import DowncycleError
from ..header import DTYPE_BITS
from ..sources import CHUNK

if TYPE_CHECKING:
    import torch

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 1 << 19  # elements computed at a time: what a processor's cache holds
ROWS = 64  # computed at a time, at least: with fewer, A is read too often
RUN = 128  # terms that are summed before the sum is added to W: BLAS libraries agree on the order within so many

Reader = Callable[[Tensor], "torch.Tensor"]


@dataclass(frozen=True)
class Update:
    """What LoRA adds to one matrix W [out, in]: scale * B A; with a magnitude, DoRA's rescaling of the sum.

    a: [rank * experts, in]. b: [out, rank * experts], the expert counting fastest. transposed: W is stored [in, out].
    magnitude: [out]. expert: which of the experts W belongs to. first: the first of B's rows that W has, where W is a part.
    """

    a: Tensor
    b: Tensor
    scale: float
    transposed: bool = False
    magnitude: Tensor | None = None
    expert: int = 0
    experts: int = 1
    first: int = 0

    @property
    def inputs(self) -> tuple[Span, ...]:
        """The byte ranges that it reads."""
        return tuple(span for tensor in (self.a, self.b, self.magnitude) if tensor for span in spans(tensor))


def spans(tensor: Tensor) -> tuple[Span, ...]:
    """Return the byte ranges that a tensor copies or is computed from."""
    return (tensor.data,) if isinstance(tensor.data, Span) else tensor.inputs


def merged(weight: Tensor, update: Update, read: Reader, name: str) -> Tensor:
    """Return W + s BA, or m (W + s BA) / |W + s BA| with DoRA (arXiv 2402.09353, eq. 5), as a computed tensor.

    Args:
        weight: [out, in], or [in, out] where the update says transposed.
        read: loads a factor.
        name: for errors.
    """
    import torch

    threads = torch.get_num_threads()

    def chunks() -> Iterator[bytes]:
        with _one_thread(threads):
            magnitude = None if update.magnitude is None else read(update.magnitude).double()
            norms = _column_norms(weight, update, read) if update.transposed and magnitude is not None else None
            for row, total in _sums(weight, update, read):
                if magnitude is not None and norms is not None:
                    total *= magnitude / norms
                elif magnitude is not None:
                    total *= (magnitude[row : row + len(total)] / torch.linalg.vector_norm(total, dim=1))[:, None]
                yield _round(total, weight.dtype, name)

    return Tensor(weight.dtype, weight.shape, chunks, (*spans(weight), *update.inputs))


def stacked(weight: Tensor, update: Update, read: Reader, name: str) -> Tensor:
    """Return a stack of matrices [experts, rows, columns], each updated with its own expert's factors."""
    parts = [merged(_part(weight, expert), replace(update, expert=expert), read, name) for expert in range(weight.shape[0])]

    def chunks() -> Iterator[bytes]:
        for part in parts:
            yield from part.chunks()

    return Tensor(weight.dtype, weight.shape, chunks, (*spans(weight), *update.inputs))


def added(vector: Tensor, addend: Tensor, scale: float, name: str) -> Tensor:
    """Return vector + scale * addend, both [n]: a bias for which LoRA has one too."""

    def chunks() -> Iterator[bytes]:
        yield _round(to_torch(vector).double() + to_torch(addend).double() * scale, vector.dtype, name)

    return Tensor(vector.dtype, vector.shape, chunks, (*spans(vector), *spans(addend)))


def with_rows(matrix: Tensor, rows: Tensor, indices: list[int], name: str) -> Tensor:
    """Return matrix [n, columns] with its rows at `indices` replaced by those of `rows` [len(indices), columns]."""
    places = {index: place for place, index in enumerate(indices)}  # where an index stands twice, the last row counts

    def chunks() -> Iterator[bytes]:
        new = to_torch(rows)
        size, done = matrix.shape[1] * DTYPE_BITS[matrix.dtype] // 8, 0
        for chunk in matrix.chunks():
            data = bytearray(chunk)
            for index in places:
                low, high = max(index * size, done), min((index + 1) * size, done + len(data))
                if low < high:
                    row = _round(new[places[index]], matrix.dtype, name)
                    data[low - done : high - done] = row[low - index * size : high - index * size]
            done += len(data)
            yield bytes(data)

    return Tensor(matrix.dtype, matrix.shape, chunks, (*spans(matrix), *spans(rows)))


def cast(tensor: Tensor, dtype: str, name: str) -> Tensor:
    """Return a tensor rounded once to another floating dtype; itself where it has that dtype."""
    if tensor.dtype == dtype:
        return tensor

    def chunks() -> Iterator[bytes]:
        for piece in pieces(tensor):
            yield _round(piece, dtype, name)

    return Tensor(dtype, tensor.shape, chunks, spans(tensor))


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite; reads it in pieces."""
    import torch

    with _one_thread(torch.get_num_threads()):
        return all(_stays_finite(piece, piece.dtype) for piece in pieces(tensor))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Load a tensor."""
    import torch

    return torch.frombuffer(bytearray().join(tensor.chunks()), dtype=getattr(torch, FLOATS[tensor.dtype])).reshape(tensor.shape)


def pieces(tensor: Tensor) -> Iterator[torch.Tensor]:
    """Load a tensor flat, in the pieces of a span: 8 MiB, which the size of every dtype divides."""
    import torch

    for chunk in tensor.chunks():
        yield torch.frombuffer(bytearray(chunk), dtype=getattr(torch, FLOATS[tensor.dtype]))


def _sums(weight: Tensor, update: Update, read: Reader) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield blocks of rows of W + s BA, each with its first row's number: left [rows, rank] @ right [rank, columns] is added to W's."""
    import torch

    sums = torch.float32 if DTYPE_BITS[weight.dtype] == 16 and not update.magnitude else torch.float64
    rank, outs = update.a.shape[0] // update.experts, weight.shape[1 if update.transposed else 0]
    a = read(update.a)[update.expert * rank : (update.expert + 1) * rank]
    b = read(update.b)[update.first : update.first + outs].reshape(outs, rank, update.experts)[:, :, update.expert]
    left, right = (a.T, b.T) if update.transposed else (b, a)
    right = right.to(sums).contiguous()
    for row, block in _blocks(weight):
        total = to_torch(block).to(sums, copy=True)
        scaled = (left[row : row + len(total)].double() * update.scale).to(sums)
        for start in range(0, rank, RUN):
            total.addmm_(scaled[:, start : start + RUN], right[start : start + RUN])
        yield row, total


def _column_norms(weight: Tensor, update: Update, read: Reader) -> torch.Tensor:
    """Return the norm of each column of W + s BA [columns]: all rows must be seen before one can be rescaled."""
    import torch

    return sum((total.square_().sum(0) for _, total in _sums(weight, update, read)), torch.zeros(())).sqrt()


def _round(values: torch.Tensor, dtype: str, name: str) -> bytes:
    """Round to nearest, ties to even, and return the bytes; refuse what is not finite then."""
    import torch

    if values.dtype == torch.float64 and DTYPE_BITS[dtype] == 16:
        values = _to_odd(values)
    rounded = values.to(getattr(torch, FLOATS[dtype]))
    if not _stays_finite(values, rounded.dtype):
        raise DowncycleError(f"{name}: not all of its numbers are finite in {dtype}; what it is made from is broken")
    return rounded.view(torch.uint8).numpy().tobytes()


def _stays_finite(values: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether all numbers are finite once rounded: the square of their length tells it fastest, unless it is too large."""
    import torch

    flat = (values.float() if values.element_size() == 2 else values).flatten()
    largest = torch.finfo(dtype).max
    return torch.dot(flat, flat).item() < largest * largest or bool(values.to(dtype).isfinite().all())


def _to_odd(values: torch.Tensor) -> torch.Tensor:
    """Cut float64 to the bits of float32, the last one set if anything is lost: rounding that further is rounding once."""
    import torch

    lost = (1 << 29) - 1
    bits = values.contiguous().view(torch.int64)
    return ((bits | ((bits & lost) + lost)) & ~lost).view(torch.float64).float()


def _part(weight: Tensor, index: int) -> Tensor:
    """Return one matrix of a stack [count, rows, columns]."""
    size = weight.nbytes // weight.shape[0]
    data = weight.data
    part = replace(data, start=data.start + index * size, length=size) if isinstance(data, Span) else _cut_out(weight, index * size, size)
    return Tensor(weight.dtype, weight.shape[1:], part, spans(weight))


def _cut_out(tensor: Tensor, start: int, length: int) -> Callable[[], Iterable[bytes]]:
    return lambda: [b"".join(tensor.chunks())[start : start + length]]


def _blocks(weight: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows with their first rows' numbers; what is itself computed is one block, held in memory."""
    span = weight.data
    if not isinstance(span, Span):
        yield 0, weight
        return
    height, width = weight.shape
    rows = max(ROWS, (BLOCK if span.source.local_path(span.path) else CHUNK // 2) // max(width, 1))  # fewer requests of what is not here
    for row in range(0, height, rows):
        count, size = min(rows, height - row), span.length // height
        yield row, Tensor(weight.dtype, (count, width), replace(span, start=span.start + row * size, length=count * size))


@contextmanager
def _one_thread(before: int) -> Iterator[None]:
    """Let torch use one processor in this thread: the writer computes a tensor on each, and torch's threads would wait for each other."""
    import torch

    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # what a thread sets, threads begun later take for their own

"""The arithmetic of a merge: W + s BA, block of rows by block of rows, in bounded memory. Needs torch.

Knows tensors and where their bytes are; no configs, no names of modules.

Sums are carried in float32 for 16-bit weights and in float64 for wider ones, and rounded once, to nearest even, to the weight's dtype.
Blocks are computed by several threads of one processor each: that is as fast as one computation on all of them, and does not slow down
where others use the machine too.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from .checkpoint import Span, Tensor
from .errors import DowncycleError
from .header import DTYPE_BITS
from .sources import CHUNK

if TYPE_CHECKING:
    import torch

FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
BLOCK = 1 << 19  # elements computed at a time: what a processor's cache holds
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

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether W of this shape can be updated."""
        if len(shape) != 2:
            return False
        out, into = reversed(shape) if self.transposed else shape
        return self.a.shape[1] == into and self.first + out <= self.b.shape[0]


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

    def chunks() -> Iterator[bytes]:
        import torch

        left, right = _factors(weight, update, read)
        magnitude = None if update.magnitude is None else read(update.magnitude).double()
        norms = _column_norms(weight, left, right) if update.transposed and magnitude is not None else None

        def block(row: int, values: torch.Tensor) -> bytes:
            total = _sum(values, left[row : row + len(values)], right)
            if magnitude is not None and norms is not None:
                total *= (magnitude / norms).to(total.dtype)
            elif magnitude is not None:
                own = magnitude[row : row + len(values)] / torch.linalg.vector_norm(total, dim=1, dtype=torch.float64)
                total *= own.to(total.dtype)[:, None]
            return _round(total, weight.dtype, name)

        yield from _each_block(weight, left.dtype, block)

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
        for piece in _pieces(tensor):
            yield _round(piece, dtype, name)

    return Tensor(dtype, tensor.shape, chunks, spans(tensor))


def is_finite(tensor: Tensor) -> bool:
    """Whether every number of a tensor is finite; reads it in pieces."""
    return all(bool(piece.isfinite().all()) for piece in _pieces(tensor))


def to_torch(tensor: Tensor) -> torch.Tensor:
    """Load a tensor."""
    import torch

    data = bytearray().join(tensor.chunks())
    return torch.frombuffer(data, dtype=getattr(torch, FLOATS[tensor.dtype])).reshape(tensor.shape)


def _pieces(tensor: Tensor) -> Iterator[torch.Tensor]:
    """Load a tensor flat, in the pieces of a span: 8 MiB, which the size of every dtype divides."""
    import torch

    for chunk in tensor.chunks():
        yield torch.frombuffer(bytearray(chunk), dtype=getattr(torch, FLOATS[tensor.dtype]))


def _factors(weight: Tensor, update: Update, read: Reader) -> tuple[torch.Tensor, torch.Tensor]:
    """Return left [rows, rank] and right [rank, columns], whose product is what W gains as it is stored."""
    import torch

    sums = torch.float32 if DTYPE_BITS[weight.dtype] == 16 else torch.float64
    rank, outs = update.a.shape[0] // update.experts, weight.shape[1 if update.transposed else 0]
    a = read(update.a)[update.expert * rank : (update.expert + 1) * rank].to(sums)
    b = read(update.b)[update.first : update.first + outs].reshape(outs, rank, update.experts)[:, :, update.expert]
    b = (b.double() * update.scale).to(sums)
    return (a.T.contiguous(), b.T.contiguous()) if update.transposed else (b.contiguous(), a.contiguous())


def _sum(values: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Add left [rows, rank] @ right [rank, columns] to values, in place."""
    for start in range(0, left.shape[1], RUN):
        values.addmm_(left[:, start : start + RUN], right[start : start + RUN])
    return values


def _column_norms(weight: Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the norm of each column of W + left @ right [columns]: no row can be rescaled before all have been seen."""
    import torch

    def squares(row: int, values: torch.Tensor) -> torch.Tensor:
        return _sum(values, left[row : row + len(values)], right).double().square_().sum(0)

    return sum(_each_block(weight, left.dtype, squares), torch.zeros(weight.shape[1], dtype=torch.float64)).sqrt()


def _round(values: torch.Tensor, dtype: str, name: str) -> bytes:
    """Round to nearest, ties to even, and return the bytes; refuse what is not finite then."""
    import torch

    if values.dtype == torch.float64 and DTYPE_BITS[dtype] == 16:
        values = _to_odd(values)
    rounded = values.to(getattr(torch, FLOATS[dtype]))
    total = rounded.sum(dtype=torch.float64 if dtype == "F64" else torch.float32)
    if not total.isfinite() and not rounded.isfinite().all():  # one sum is faster than looking at every number
        raise DowncycleError(f"{name}: not all of its merged numbers are finite in {dtype}; the base or the adapter is broken")
    return rounded.view(torch.uint8).numpy().tobytes()


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


def _each_block(weight: Tensor, sums: torch.dtype, work: Callable[[int, torch.Tensor], Any]) -> Iterator[Any]:
    """Yield, in order, what `work` makes of each block of rows, given its first row's number and its numbers in the dtype of sums."""
    import torch

    span = weight.data
    remote = isinstance(span, Span) and not span.source.local_path(span.path)
    size = CHUNK // (DTYPE_BITS[weight.dtype] // 8) if remote else BLOCK
    threads = span.source.connections if remote and isinstance(span, Span) else torch.get_num_threads()

    def compute(block: tuple[int, Tensor]) -> Any:
        return work(block[0], to_torch(block[1]).to(sums))

    blocks = list(_blocks(weight, max(16, size // max(weight.shape[1], 1))))
    yield from map(compute, blocks) if min(threads, len(blocks)) < 2 else _in_threads(compute, blocks, threads)


def _blocks(weight: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """Yield blocks of rows with their first rows' numbers; what is itself computed is one block, held in memory."""
    span = weight.data
    if not isinstance(span, Span):
        yield 0, weight
        return
    size = span.length // max(weight.shape[0], 1)
    for row in range(0, weight.shape[0], rows):
        count = min(rows, weight.shape[0] - row)
        part = replace(span, start=span.start + row * size, length=count * size)
        yield row, Tensor(weight.dtype, (count, weight.shape[1]), part)


def _in_threads(work: Callable[[Any], Any], items: list[Any], threads: int) -> Iterator[Any]:
    """Yield work(item) in order, computed ahead by threads of which each uses one processor."""
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    pending: deque[Future[Any]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(work, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(before)  # what a thread sets, threads begun later take for their own

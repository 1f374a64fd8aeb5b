"""Join what the tasks wrote into the files of a dataset: split, cut at the asked number, shard.

Reads and writes parquet in bounded memory; counts no text, and decides by the numbers that the parts hold.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow as pa

SHARD_BYTES = 1_000_000_000  # of text and columns, before compression
GROUP_ROWS = 1000  # as in FineWeb
N_TOKENS, HASH = "n_tokens", "__text_hash"


@dataclass(frozen=True)
class Split:
    """How a text is known to be held out: its hash is below `below`, or is `first`, the hash of the first text of all."""

    below: int
    first: int | None = None

    def held(self, table: pa.Table) -> pa.ChunkedArray:
        """Say of every row whether it is held out: [rows] bool."""
        import pyarrow as pa
        import pyarrow.compute as pc

        below = pc.less(table[HASH], pa.scalar(self.below, pa.uint64()))
        return below if self.first is None else pc.or_(below, pc.equal(table[HASH], pa.scalar(self.first, pa.uint64())))


def threshold(fraction: float) -> int:
    """Turn a fraction in [0, 1) into the hash below which a text is held out."""
    return int(fraction * 2**64)


def first_hash(parts: list[Path]) -> int | None:
    """Return the hash of the first document of all, if there is one."""
    import pyarrow.parquet as pq

    for part in parts:
        if part.exists() and (hashes := pq.read_table(part, columns=[HASH])[HASH]):
            return int(hashes[0].as_py())
    return None


def count_training(part: Path, split: Split) -> int:
    """Count the training tokens that a task wrote."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    if not part.exists():  # a task all of whose documents were dropped
        return 0
    table = pq.read_table(part, columns=[N_TOKENS, HASH])
    return pc.sum(table.filter(pc.invert(split.held(table)))[N_TOKENS]).as_py() or 0


@dataclass
class Shards:
    """The files of one split while they are written. They get their names, which hold their number, at the end."""

    folder: Path
    split: str
    schema: pa.Schema
    documents: int = 0
    tokens: int = 0
    _paths: list[Path] = field(default_factory=list)
    _waiting: list[pa.Table] = field(default_factory=list)
    _writer: object | None = None
    _size: int = 0

    def add(self, table: pa.Table) -> None:
        """Take rows; write them when there are enough for a row group."""
        import pyarrow.compute as pc

        if not table.num_rows:
            return
        self.documents += table.num_rows
        self.tokens += pc.sum(table[N_TOKENS]).as_py()
        self._waiting.append(table)
        if sum(part.num_rows for part in self._waiting) >= GROUP_ROWS:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        table = pa.concat_tables(self._waiting)
        self._waiting = []
        if self._writer is None:
            self._paths.append(self.folder / f"{self.split}-{len(self._paths):05}.parquet")
            self._writer, self._size = pq.ParquetWriter(self._paths[-1], self.schema, compression="zstd"), 0
        self._writer.write_table(table)  # type: ignore[attr-defined]
        self._size += table.nbytes
        if self._size >= SHARD_BYTES:
            self._close()

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()  # type: ignore[attr-defined]
            self._writer = None

    def finish(self) -> list[Path]:
        """Write what is left, flush to the disk, and name the files as the Hub does."""
        if self._waiting:
            self._flush()
        self._close()
        named = [self.folder / f"{self.split}-{i:05}-of-{len(self._paths):05}.parquet" for i in range(len(self._paths))]
        for path, name in zip(self._paths, named, strict=True):
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            path.rename(name)
        return named


def write_splits(parts: list[Path], asked: int, split: Split, schema: pa.Schema, folder: Path) -> tuple[Shards, Shards]:
    """Write the documents of the parts, in order, as train and test files, up to the training document that reaches `asked` tokens."""
    folder.mkdir(parents=True)
    train, test = Shards(folder, "train", schema), Shards(folder, "test", schema)
    for table in _tables(parts):
        import pyarrow.compute as pc

        held = split.held(table)
        table, held = _trim(table, held, asked - train.tokens)
        rows = table.select(schema.names)
        train.add(rows.filter(pc.invert(held)))
        test.add(rows.filter(held))
        if train.tokens >= asked:
            break
    train.finish()
    test.finish()
    return train, test


def _tables(parts: list[Path]) -> Iterator[pa.Table]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for part in parts:
        if part.exists():
            with pq.ParquetFile(part) as file:
                for batch in file.iter_batches(GROUP_ROWS):
                    yield pa.Table.from_batches([batch])


def _trim(table: pa.Table, held: pa.ChunkedArray, wanted: int) -> tuple[pa.Table, pa.ChunkedArray]:
    """Cut a table behind the row whose training tokens make the sum reach `wanted`."""
    import pyarrow.compute as pc

    sums = pc.cumulative_sum(pc.if_else(held, 0, table[N_TOKENS]))
    rows = min(table.num_rows, pc.sum(pc.less(sums, wanted)).as_py() + 1)
    return table.slice(0, rows), held.slice(0, rows)

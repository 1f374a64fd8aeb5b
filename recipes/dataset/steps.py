"""The steps of the datatrove pipeline that takes documents from parquet, filters, counts and writes them, one file per task.

Knows nothing of processes, of splits or of how many tokens were asked for in all. Imported only where datatrove is installed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from datatrove.data import Document
from datatrove.io import get_datafolder
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers.parquet import ParquetReader
from datatrove.pipeline.tokens.counter import TokensCounter
from datatrove.pipeline.writers.parquet import ParquetWriter
from datatrove.utils.batching import batched
from tokenizers import Tokenizer

from .shards import HASH, N_TOKENS
from .source import Filters, Piece, is_broken_connection, read_fault

BATCH = 128  # documents encoded at once
WAITS = (1, 5, 20, 60)  # seconds between attempts
Documents = Iterator[Document]


class RowGroupReader(ParquetReader):
    """Reads the row groups of one piece per task, and drops rows that are no documents."""

    name = "row groups"

    def __init__(self, url: str, pieces: list[Piece], schema: pa.Schema):
        super().__init__(url, adapter=_to_document)
        self.add_file_path = False
        self.pieces, self.schema = pieces, schema

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield the documents of this task's piece, in the order of the file."""
        self.piece = self.pieces[rank]
        for document in self.read_files_shard([self.piece.file]):
            self.update_doc_stats(document)
            yield document

    def read_file(self, filepath: str) -> Documents:
        """Yield the documents of the current piece."""
        for batch in self._batches(filepath):
            with self.track_time("batch"):
                rows = _rows(batch.select(self.schema.names).cast(self.schema))
            for row in rows:
                if document := self.get_document_from_dict(row, filepath, 0):
                    yield document

    def _batches(self, filepath: str) -> Iterator[pa.RecordBatch]:
        """Yield the piece's batches; where a connection breaks, wait, open the file again and go on behind the last one."""
        groups, given = list(range(self.piece.first, self.piece.stop)), 0
        for wait in (*WAITS, None):
            try:
                with self.data_folder.open(filepath, "rb") as file, pq.ParquetFile(file) as parquet:
                    for number, batch in enumerate(parquet.iter_batches(self.batch_size, row_groups=groups, use_threads=False)):
                        if number >= given:
                            yield batch
                            given += 1
                return
            except Exception as error:
                if wait is None or not is_broken_connection(error):
                    raise read_fault(self.data_folder.resolve_paths(filepath), error) from error
                time.sleep(wait)


def _rows(batch: pa.RecordBatch) -> list[dict[str, Any]]:
    """Turn a batch into dictionaries; a row that holds bytes which are no UTF-8, in whatever column, loses its text."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        half = batch.num_rows // 2
        return _rows(batch.slice(0, half)) + _rows(batch.slice(half)) if half else [{"text": None, "id": None}]


def _to_document(reader: ParquetReader, row: dict[str, Any], path: str, number: int) -> dict[str, Any]:
    """Make a document of a row, or one without text, which the reader drops."""
    text, name = row.pop("text"), row.pop("id")
    if text is None or name is None:
        reader.stat_update("dropped_malformed")
    elif not text.strip():
        reader.stat_update("dropped_blank_text")
    else:
        return {"text": text, "id": name, "metadata": row}
    return {"text": ""}


class FineWebFilter(BaseFilter):
    """Drops what FineWeb's columns say is not wanted, with the reason."""

    name = "FineWeb columns"

    def __init__(self, filters: Filters):
        super().__init__()
        self.filters = filters

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        """Say whether a document is kept, else why not."""
        wanted, row = self.filters, doc.metadata
        if wanted.language is not None and row["language"] != wanted.language:
            return False, "other_language"
        if wanted.min_language_score is not None and not (row["language_score"] or 0) >= wanted.min_language_score:
            return False, "low_language_score"
        if wanted.min_tokens is None and wanted.max_tokens is None:
            return True
        if row["token_count"] is None:
            return False, "no_token_count"
        if wanted.min_tokens is not None and row["token_count"] < wanted.min_tokens:
            return False, "too_short"
        if wanted.max_tokens is not None and row["token_count"] > wanted.max_tokens:
            return False, "too_long"
        return True


class CompletionCounter(TokensCounter):
    """Counts each document as Axolotl's `type: completion` trains on it: with the tokenizer's own special tokens, and one end-of-text token
    behind it unless it ends with one. A document that gives no token is dropped.
    """

    name = "Counter as in completion"

    def __init__(self, tokenizer_file: str, end: int):
        super().__init__(tokenizer_file, batch_size=BATCH)
        self.end = end

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer, loaded once per process."""
        return _load_tokenizer(self.tokenizer_name_or_path)

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Yield each document with its number of tokens and a hash of its text."""
        os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread per worker
        for batch in batched(data, self.batch_size):
            with self.track_time(unit="batch"):
                encoded = self.tokenizer.encode_batch_fast([document.text for document in batch])
            for document, encoding in zip(batch, encoded, strict=True):
                if not (count := len(encoding)):
                    self.stat_update("dropped_no_tokens")
                    continue
                document.metadata[N_TOKENS] = count + (encoding.ids[-1] != self.end)
                document.metadata[HASH] = text_hash(document.text)
                self.stat_update("tokens", value=document.metadata[N_TOKENS])
                yield document


@cache
def _load_tokenizer(path: str) -> Tokenizer:
    return Tokenizer.from_file(path)


def text_hash(text: str) -> int:
    """Hash a text to 64 bits, the same on every machine."""
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


class PartWriter(ParquetWriter):
    """Writes one file per task; its name depends on nothing else, whatever the columns are called."""

    def _get_output_filename(self, document: Document, rank: int | str = 0, **kwargs: object) -> str:
        return f"{str(rank).zfill(5)}.parquet"


def _to_row(writer: ParquetWriter, document: Document) -> dict[str, Any]:
    return {**document.metadata, "text": document.text, "id": document.id}


class Receipt(PipelineStep):
    """Keeps count of what a task has written, where others can read it; ends the first task when it alone has enough.

    limit: training tokens after which the first task may stop. held_out: hashes below it do not count, nor does the first text.
    """

    type, name = "receipt", "Receipt"

    def __init__(self, work: str, limit: int, held_out: int):
        super().__init__()
        self.work, self.limit, self.held_out = Path(work), limit, held_out

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:
        """Pass documents on; leave `counts/RANK.json` with the documents and tokens written, the limit if it was reached."""
        documents = total = training = 0
        first: int | None = None
        limit: list[int] | None = None
        for document in data:
            hash_, tokens = document.metadata[HASH], document.metadata[N_TOKENS]
            first = hash_ if first is None and self.held_out else first
            training += 0 if hash_ < self.held_out or hash_ == first else tokens
            documents, total = documents + 1, total + tokens
            if documents % BATCH == 0:
                self._write(rank, documents, total, None)
            yield document
            if rank == 0 and training >= self.limit:
                limit = [self.limit, self.held_out]
                data.close()  # type: ignore[attr-defined]  # the writer's file is whole from here on
                break
        part = self.work / "parts" / f"{rank:05}.parquet"
        if part.exists():
            with open(part, "rb") as file:
                os.fsync(file.fileno())
        self._write(rank, documents, total, limit)

    def _write(self, rank: int, documents: int, tokens: int, limit: list[int] | None) -> None:
        path = self.work / "counts" / f"{rank:05}.json"
        path.with_suffix(".new").write_text(json.dumps({"documents": documents, "tokens": tokens, "limit": limit}))
        path.with_suffix(".new").rename(path)


def make_pipeline(
    url: str,
    pieces: list[Piece],
    schema: pa.Schema,
    filters: Filters,
    tokenizer: tuple[str, int],
    work: Path,
    limit: int,
    held_out: int,
) -> list[PipelineStep]:
    """Put the steps together: task r reads the columns of `schema` from pieces[r] and writes parts/r.parquet with two columns more.

    tokenizer: its file, and its end-of-text token.
    """
    return [
        RowGroupReader(url, pieces, schema),
        FineWebFilter(filters),
        CompletionCounter(*tokenizer),
        PartWriter(
            get_datafolder(str(work / "parts")),
            compression="zstd",
            adapter=_to_row,
            schema=schema.append(pa.field(N_TOKENS, pa.int64())).append(pa.field(HASH, pa.uint64())),
            max_file_size=-1,
            use_content_defined_chunking=False,
            write_page_index=False,
        ),
        Receipt(str(work), limit, held_out),
    ]

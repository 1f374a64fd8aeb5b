"""Put byte ranges and computed tensors into an open file: one after the other from a disk, several at once from a remote source."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import TextIO

from .checkpoint import Span, Tensor
from .sources import Progress, write_at

PIECE = 64 << 20  # bytes that a remote source is asked for at once, and that a cut-off download loses at most


def write_computed(file: int, tensor: Tensor, offset: int, progress: Progress) -> None:
    """Write a computed tensor at an offset, piece by piece."""
    end = offset + tensor.nbytes
    for chunk in tensor.chunks():
        write_at(file, chunk, offset)
        progress(len(chunk))
        offset += len(chunk)
    if offset != end:
        raise ValueError(f"a computed tensor gave {tensor.nbytes + offset - end} bytes instead of {tensor.nbytes}")


def copy_all(copies: list[tuple[int, Span]], file: int, journal: Path, done: set[str], progress: Progress) -> None:
    """Copy ranges into the file: one after the other from a disk, several at once and journalled from a remote source."""
    pieces: list[tuple[int, Span]] = []
    for offset, span in copies:
        if span.source.local_path(span.path):
            span.source.copy(span.path, span.start, span.length, file, offset, progress)
        else:
            pieces += _pieces(offset, span)
    if pieces:
        with open(journal, "a", buffering=1) as log:
            _fetch_all(pieces, file, log, done, progress)


def _fetch_all(pieces: list[tuple[int, Span]], file: int, log: TextIO, done: set[str], progress: Progress) -> None:
    """Fetch pieces over several connections; the first fault, or Ctrl-C, stops them all."""
    stop = threading.Event()

    def advance(count: int) -> None:
        if stop.is_set():
            raise InterruptedError("stopped because another piece failed")
        progress(count)

    def fetch(offset: int, span: Span) -> None:
        if str(offset) in done:
            return progress(span.length)
        span.source.copy(span.path, span.start, span.length, file, offset, advance)
        os.fdatasync(file)  # what the journal names must outlive a power cut
        log.write(f"{offset}\n")
        return None

    with ThreadPoolExecutor(max(span.source.connections for _, span in pieces)) as pool:
        futures = [pool.submit(fetch, offset, span) for offset, span in pieces]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _pieces(offset: int, span: Span) -> Iterator[tuple[int, Span]]:
    for done in range(0, span.length, PIECE):
        yield offset + done, Span(span.source, span.path, span.start + done, min(PIECE, span.length - done))

"""Put byte ranges and computed tensors into an open file: one after the other from a disk, several at once from a remote source."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, TextIO

from .checkpoint import Span, Tensor
from .sources import Progress, start_flush, write_at

WORKERS = 8  # tensors that are computed at once, at most: each holds some pieces in memory
PIECE = 64 << 20  # bytes that a remote source is asked for at once, and that a cut-off download loses at most


def write_computed(computed: list[tuple[int, Tensor]], file: int, progress: Progress) -> None:
    """Write computed tensors at their offsets, piece by piece, as many at once as there are processors; the first fault stops them all."""
    stop = threading.Event()

    def put(offset: int, tensor: Tensor) -> None:
        end = offset + tensor.nbytes
        for chunk in tensor.chunks():
            if stop.is_set():
                raise InterruptedError("stopped because another tensor failed")
            write_at(file, chunk, offset)
            start_flush(file, offset, len(chunk))
            progress(len(chunk))
            offset += len(chunk)
        if offset != end:
            raise ValueError(f"a computed tensor gave {tensor.nbytes + offset - end} bytes instead of {tensor.nbytes}")

    _run_all(put, computed, min(os.cpu_count() or 1, WORKERS), stop)


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

    _run_all(fetch, pieces, max(span.source.connections for _, span in pieces), stop)


def _run_all(work: Callable[..., None], items: Iterable[tuple[Any, ...]], threads: int, stop: threading.Event) -> None:
    """Do work(*item) for all items in threads; the first fault, or Ctrl-C, sets `stop` and is raised."""
    with ThreadPoolExecutor(threads) as pool:
        futures = [pool.submit(work, *item) for item in items]
        try:
            for future in as_completed(futures):
                future.result()
        finally:
            stop.set()
            pool.shutdown(cancel_futures=True)


def _pieces(offset: int, span: Span) -> Iterator[tuple[int, Span]]:
    for done in range(0, span.length, PIECE):
        yield offset + done, Span(span.source, span.path, span.start + done, min(PIECE, span.length - done))

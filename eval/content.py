"""What a model computes with, as one SHA-256: equal for two copies, and another one when a single byte of it changes.

Reads a file once, and not again while its size, times and inode stay. Needs no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..surgery.checkpoint import Checkpoint, Span, Tensor, file_bytes
from ..surgery.filenames import LEGAL
from ..surgery.sources import CHUNK
from ..surgery.staging import replace_file


def cache_folder() -> Path:
    """Where measurements are kept: $DOWNCYCLE_CACHE, or `downcycle` in the user's cache folder."""
    if given := os.environ.get("DOWNCYCLE_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "downcycle"


def content_digest(checkpoint: Checkpoint, progress: Callable[[int], None] = lambda count: None) -> str:
    """Return the SHA-256 of config, small files and every tensor's name, dtype, shape and bytes; of a computed one, of what it is from.

    Args:
        progress: called with the number of bytes of each step that is read.
    """
    files = _Files(progress)
    digest = sha256(json.dumps(checkpoint.config, sort_keys=True).encode())
    for path, data in sorted(checkpoint.files.items()):
        if not path.startswith(LEGAL):  # they change nothing that it computes
            digest.update(f"{path}\n{sha256(file_bytes(data)).hexdigest()}\n".encode())
    for name, tensor in sorted(checkpoint.tensors.items()):
        digest.update(repr((name, tensor.dtype, tensor.shape, _bytes_of(tensor, files))).encode())
    if any(not isinstance(tensor.data, Span) for tensor in checkpoint.tensors.values()):
        digest.update(json.dumps(checkpoint.lineage, sort_keys=True, default=str).encode())
    files.save()
    return digest.hexdigest()


def _bytes_of(tensor: Tensor, files: _Files) -> list[Any]:
    spans = [tensor.data] if isinstance(tensor.data, Span) else list(tensor.inputs)
    return [(files.digest(span), span.start, span.length) for span in spans]


class _Files:
    """The SHA-256 of files, remembered between runs by what the file system says of them."""

    def __init__(self, progress: Callable[[int], None]):
        self.progress = progress
        self.memory = cache_folder() / "files.json"
        self.known: dict[str, list[Any]] = {}
        self.done: dict[tuple[int, str], str] = {}
        with suppress(OSError, ValueError):
            found = json.loads(self.memory.read_text())
            self.known = found if isinstance(found, dict) else {}

    def digest(self, span: Span) -> str:
        """Return a file's digest; of one of the Hub, the one that it has there, in the local cache or not, without reading it."""
        key = id(span.source), span.path
        if key not in self.done:
            path = None if span.source.revision else span.source.local_path(span.path)
            self.done[key] = self._local(path) if path else span.source.identity(span.path)
        return self.done[key]

    def _local(self, path: Path) -> str:
        real = os.path.realpath(path)
        status = os.stat(real)
        sign = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino, status.st_dev]
        known = self.known.get(real)
        if isinstance(known, list) and known[:-1] == sign:
            return str(known[-1])
        digest = sha256()
        with open(real, "rb", buffering=0) as file:
            while piece := file.read(CHUNK):
                digest.update(piece)
                self.progress(len(piece))
        self.known[real] = [*sign, digest.hexdigest()]
        return digest.hexdigest()

    def save(self) -> None:
        """Remember; where that cannot be, files are read again next time."""
        with suppress(OSError):
            replace_file(self.memory, json.dumps(self.known).encode())

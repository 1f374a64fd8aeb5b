"""Where the bytes of a checkpoint come from: a local folder.

Reads byte ranges of files and copies them into other files. Knows nothing of tensors or configs.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from functools import cached_property
from io import FileIO
from pathlib import Path, PurePosixPath
from typing import Protocol

from .errors import DowncycleError

CHUNK = 8 << 20
Progress = Callable[[int], None]


class Source(Protocol):
    """A set of files that can be read by byte range."""

    @property
    def name(self) -> str:
        """What the user called it: a folder or a Hub id."""

    @property
    def revision(self) -> str | None:
        """The commit of a Hub repo."""

    @property
    def connections(self) -> int:
        """How many copies are worth having in flight; more than one where bytes come over a network."""

    @property
    def files(self) -> dict[str, int]:
        """Size in bytes of each file, by its path relative to the source, with forward slashes."""

    def local_path(self, path: str) -> Path | None:
        """Where a file lies on this machine; None where its bytes must be fetched."""

    def identity(self, path: str) -> str:
        """A string that changes when the content of the file changes."""

    def read(self, path: str, start: int, length: int) -> bytes:
        """Return exactly these bytes of a file, or raise a DowncycleError."""

    def copy(self, path: str, start: int, length: int, into: int, offset: int, progress: Progress) -> None:
        """Copy exactly these bytes of a file into the open file descriptor `into`, at `offset`.

        Calls `progress` with the number of bytes of each step. Safe to call from several threads.
        """


class LocalFolder:
    """A folder on this machine; symbolic links in it are followed, as the Hub's cache is made of them."""

    connections = 1

    def __init__(self, folder: Path, name: str | None = None, revision: str | None = None):
        self.folder = folder
        self.name = name or str(folder)
        self.revision = revision

    @cached_property
    def files(self) -> dict[str, int]:
        """Sizes of the files of the folder and its visible subfolders; no deeper, and unreadable ones are passed over."""
        paths = sorted([*self.folder.glob("*"), *self.folder.glob("[!.]*/*")])
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths if path.is_file()}

    def local_path(self, path: str) -> Path:
        """Where a file lies; it may be a link."""
        return self.folder / PurePosixPath(path)

    def identity(self, path: str) -> str:
        """Size and time of last change."""
        status = self.local_path(path).stat()
        return f"{status.st_size}:{status.st_mtime_ns}"

    def read(self, path: str, start: int, length: int) -> bytes:
        """Return these bytes."""
        with self._open(path) as file:
            data = os.pread(file.fileno(), length, start)
            while len(data) < length:
                more = os.pread(file.fileno(), length - len(data), start + len(data))
                if not more:
                    raise self._ended(path, start + length)
                data += more
        return data

    def copy(self, path: str, start: int, length: int, into: int, offset: int, progress: Progress) -> None:
        """Copy these bytes inside the kernel."""
        with self._open(path) as file:
            while length:
                copied = _copy_some(file.fileno(), start, length, into, offset)
                if not copied:
                    raise self._ended(path, start + length)
                start_flush(into, offset, copied)
                progress(copied)
                start, offset, length = start + copied, offset + copied, length - copied

    def _open(self, path: str) -> FileIO:
        try:
            return open(self.local_path(path), "rb", buffering=0)
        except OSError as error:
            raise DowncycleError(f"{self.local_path(path)}: {error.strerror}") from error

    def _ended(self, path: str, end: int) -> DowncycleError:
        return DowncycleError(f"{self.local_path(path)}: ends before byte {end}; the file is truncated, fetch it again")


def _copy_some(source: int, start: int, length: int, into: int, offset: int) -> int:
    """Copy up to 32 MiB inside the kernel, or 8 MiB through a buffer where the file systems cannot; return the count."""
    try:
        if copied := os.copy_file_range(source, into, min(length, 32 << 20), start, offset):
            return copied  # some network file systems answer 0 where there is more
    except AttributeError:
        pass
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF):
            raise
    return os.pwrite(into, os.pread(source, min(length, CHUNK), start), offset)


def start_flush(file: int, start: int, length: int) -> None:
    """Let the disk begin on these bytes while the next ones are copied; else the fsync at the end waits for all of them."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, length, os.POSIX_FADV_DONTNEED)


def write_at(file: int, data: bytes, offset: int) -> None:
    """Write all of `data` at an offset, however little the system takes at once."""
    view = memoryview(data).cast("B")
    while view:
        count = os.pwrite(file, view, offset)
        view, offset = view[count:], offset + count

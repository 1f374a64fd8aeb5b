"""A folder that appears under its name only when it is whole: it is made beside its target, locked, flushed, and renamed.

Knows nothing of what the folder holds.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import DowncycleError, UnsuitableError

MARK = "plan.sha256"


def staging_path(out: Path) -> Path:
    """Where a target is prepared: beside it, so that one rename completes it."""
    return out.with_name(f".{out.name}.downcycle")


def target_path(out: str | Path) -> Path:
    """Return a target's absolute path."""
    if not str(out):
        raise DowncycleError("--out '': give a folder's name")
    try:
        return Path(os.path.abspath(os.path.expanduser(out)))
    except FileNotFoundError as error:
        raise DowncycleError(f"--out {out}: the current folder was deleted; change into one that exists") from error


def check_name(out: Path, overwrite: bool, kind: str, sign: str) -> None:
    """Refuse a target that stands there already, unless it is to be overwritten and is of this kind: a folder that holds `sign`."""
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink():
        raise DowncycleError(f"--out {out}: is a symbolic link; give the folder that it leads to, or another name")
    if not out.is_dir():
        raise DowncycleError(f"--out {out}: exists and is no folder; choose another name")
    if any(out.iterdir()):
        if not overwrite:
            raise DowncycleError(f"--out {out}: exists already; choose another folder, or give --overwrite to replace it")
        if not (out / sign).is_file():
            raise DowncycleError(f"--out {out}: exists and holds no {kind}; --overwrite replaces {kind}s only")


@contextmanager
def staging_folder(out: Path, digest: str, has_work: Callable[[Path], bool], resume: str = "the same command") -> Iterator[Path]:
    """Give a locked staging folder that holds the work begun under this digest, or its mark only; say where it is when the work fails.

    Args:
        has_work: whether a folder holds anything worth keeping.
        resume: what goes on from there.
    """
    staging = staging_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(staging, out)
    except OSError as error:
        raise DowncycleError(f"--out {out}: {error.strerror}; choose a folder that can be written") from error
    try:
        _claim(staging, digest)
        yield staging
    except (OSError, DowncycleError) as error:
        text = str(error) if isinstance(error, DowncycleError) else f"{out.name} is not complete: {what_failed(error)}."
        if has_work(staging) and not isinstance(error, UnsuitableError):
            text = f"{text.removesuffix('.')}. What is done stays in {staging}; {resume} goes on from there."
        else:
            shutil.rmtree(staging, ignore_errors=True)
        raise DowncycleError(text) from error
    finally:
        os.close(lock)


def replace_file(path: Path, data: bytes) -> None:
    """Write one file whole, or not at all; its folder is made where there is none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        staged.write_bytes(data)
        staged.replace(path)
    except BaseException:
        with suppress(OSError):
            staged.unlink()
        raise


def what_failed(error: OSError) -> str:
    """Say it for people, and what to do where that is known."""
    return "the disk is full; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)


def publish(staging: Path, out: Path) -> None:
    """Give the finished folder its name. What it replaces is set aside first, and deleted last."""
    for path in (staging, *(path for path in staging.iterdir() if path.is_dir())):
        _flush(path)
    aside = out.with_name(f".{out.name}.replaced")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    staging.rename(out)
    _flush(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _lock(staging: Path, out: Path) -> int:
    """Create the staging folder and lock it; the lock goes with the process, however it ends."""
    while True:
        with suppress(FileExistsError):
            staging.mkdir()
        try:
            folder = os.open(staging, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue  # the other run has just completed and renamed it
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(folder)
            raise DowncycleError(f"--out {out}: another run is writing it; wait for it or choose another folder") from None
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(folder), staging.stat()):
                return folder
        os.close(folder)


def _claim(staging: Path, digest: str) -> None:
    """Empty the staging folder unless it was begun for the same work."""
    mark = staging / MARK
    if mark.is_file() and mark.read_bytes() == digest.encode():
        return
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    mark.write_text(digest)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

"""Turn a Checkpoint value into files: sharded, atomic, resumable, in bounded memory. The only code that writes a checkpoint.

Everything is made in a staging folder beside the target, flushed, and renamed when complete.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .checkpoint import Checkpoint, Span, file_length
from .errors import DowncycleError
from .filenames import CONFIG
from .plan import Plan, Shard, plan_write
from .sources import Progress, write_at
from .transfer import copy_all, write_computed

PLAN = "plan.sha256"


def write(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    max_shard_size: int = 5_000_000_000,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
) -> Path:
    """Write a checkpoint as a folder that appears under its name only when it is whole.

    A run that was stopped leaves a staging folder, `.NAME.downcycle` beside the target; the same call goes on from there.

    Args:
        overwrite: replace an existing checkpoint folder. Another kind of folder is never replaced.
        progress: called with the number of bytes of each step.
    Raises:
        DowncycleError: the target exists or is the source, the disk is full or read-only, or another run writes the same target.
    """
    out = target_path(out)
    plan = plan_write(checkpoint, max_shard_size)
    check_target(out, plan, overwrite)
    with _staging_folder(out, plan) as staging:
        _check_name(out, overwrite)  # again, now that nobody else can take it
        for shard in plan.shards:
            _write_shard(shard, staging, progress)
        for path, data in plan.files.items():
            _write_file(staging / path, data)
            progress(file_length(data))
        (staging / PLAN).unlink()
        _flush_folders(staging)
        publish(staging, out)
    return out


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


def check_target(out: Path, plan: Plan, overwrite: bool) -> None:
    """Refuse a target that must not be written or has no room, before the first byte.

    Raises:
        DowncycleError: the target is the source, holds it or lies in it, exists, cannot be written, or the disk is too small.
    """
    try:
        _check_name(out, overwrite)
        for path in {path for span in plan.spans() if (path := span.source.local_path(span.path))}:
            _check_apart(Path(os.path.realpath(out)), path)
        home = next(folder for folder in out.parents if folder.exists())
        if not home.is_dir() or not os.access(home, os.W_OK | os.X_OK):
            raise DowncycleError(f"--out {out}: nothing can be written into {home}; choose another folder")
        _check_space(home, staging_path(out), plan)
    except OSError as error:
        raise DowncycleError(f"--out {out}: {error.strerror}; choose another folder") from error


def _check_apart(out: Path, source: Path) -> None:
    folder, file = Path(os.path.realpath(source.parent)), Path(os.path.realpath(source))
    if out in (folder, *folder.parents, *file.parents):
        raise DowncycleError(f"--out {out}: holds the source {source}; choose another folder")
    if folder in out.parents:
        raise DowncycleError(f"--out {out}: lies in the source {source.parent}; choose a folder beside it")


def _check_name(out: Path, overwrite: bool) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if out.is_symlink():
        raise DowncycleError(f"--out {out}: is a symbolic link; give the folder that it leads to, or another name")
    if not out.is_dir():
        raise DowncycleError(f"--out {out}: exists and is no folder; choose another name")
    if any(out.iterdir()):
        if not overwrite:
            raise DowncycleError(f"--out {out}: exists already; choose another folder, or give --overwrite to replace it")
        if not (out / CONFIG).is_file():
            raise DowncycleError(f"--out {out}: exists and holds no checkpoint; --overwrite replaces checkpoints only")


@contextmanager
def _staging_folder(out: Path, plan: Plan) -> Iterator[Path]:
    """Give a locked staging folder that holds this plan's finished shards or nothing; say where it is when the work fails."""
    staging = staging_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_folder(staging, out)
    except OSError as error:
        raise DowncycleError(f"--out {out}: {error.strerror}; choose a folder that can be written") from error
    try:
        _claim(staging, plan)
        yield staging
    except OSError as error:
        what = "the disk is full; free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error.strerror or str(error)
        raise DowncycleError(f"{out.name} is not complete: {what}. {_resume(staging)}") from error
    except DowncycleError as error:
        if not any(staging.glob("*.safetensors*")):
            shutil.rmtree(staging)
            raise
        raise DowncycleError(f"{str(error).removesuffix('.')}. {_resume(staging)}") from error
    finally:
        os.close(lock)


def _resume(staging: Path) -> str:
    return f"What is done stays in {staging}; the same command goes on from there."


def lock_folder(staging: Path, out: Path) -> int:
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


def _claim(staging: Path, plan: Plan) -> None:
    """Empty the staging folder unless it was begun for the same plan."""
    mark = staging / PLAN
    if mark.is_file() and mark.read_bytes() == plan.digest.encode():
        return
    for path in staging.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    mark.write_text(plan.digest)


def _check_space(home: Path, staging: Path, plan: Plan) -> None:
    there = 0
    with suppress(FileNotFoundError):  # another run is at work there; the lock will say so
        there = sum(path.lstat().st_blocks * 512 for path in staging.glob("*"))
    free = shutil.disk_usage(home).free
    if plan.write_bytes - there > free:
        raise DowncycleError(
            f"{home}: {(plan.write_bytes - there) / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; "
            "free some space or choose --out on another disk"
        )


def _write_shard(shard: Shard, staging: Path, progress: Progress) -> None:
    final, part, journal = (staging / f"{shard.name}{suffix}" for suffix in ("", ".part", ".done"))
    if final.is_file():
        progress(shard.size)
        return
    if not part.is_file():
        journal.unlink(missing_ok=True)
    done = set(journal.read_text().split("\n")[:-1]) if journal.is_file() else set()
    with open(part, "r+b" if done else "wb", buffering=0) as file:
        _reserve(file.fileno(), shard.size)
        write_at(file.fileno(), shard.header, 0)
        progress(len(shard.header))
        computed = [(offset, tensor) for offset, tensor in shard.placed() if not isinstance(tensor.data, Span)]
        write_computed(computed, file.fileno(), progress)
        copy_all(list(shard.copies()), file.fileno(), journal, done, progress)
        os.fsync(file.fileno())
    journal.unlink(missing_ok=True)
    part.rename(final)


def _write_file(path: Path, data: Span | bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    with open(path, "wb") as file:
        for chunk in data.chunks() if isinstance(data, Span) else [data]:
            file.write(chunk)
        file.flush()
        os.fsync(file.fileno())


def publish(staging: Path, out: Path) -> None:
    """Give the finished folder its name. What it replaces is set aside first, and deleted last."""
    aside = out.with_name(f".{out.name}.replaced")
    if out.exists() and any(out.iterdir()):
        shutil.rmtree(aside, ignore_errors=True)
        out.rename(aside)
    staging.rename(out)
    _flush(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _flush_folders(folder: Path) -> None:
    for path in (folder, *(path for path in folder.iterdir() if path.is_dir())):
        _flush(path)


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reserve(file: int, size: int) -> None:
    """Ask for all blocks of a file at once, so that copying into it takes less time. Where the file system cannot, nothing is lost."""
    if fallocate := getattr(ctypes.CDLL(None), "fallocate", None):  # not os.posix_fallocate, which then writes every block
        fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size))

"""Turn a Checkpoint value into files: sharded, atomic, resumable, in bounded memory. The only code that writes a checkpoint.

Everything is made in a staging folder (staging.py), flushed, and renamed when complete.
"""

from __future__ import annotations

import ctypes
import os
import shutil
from contextlib import suppress
from pathlib import Path

from .checkpoint import Checkpoint, Span, file_length
from .errors import DowncycleError
from .filenames import CONFIG
from .plan import Plan, Shard, plan_write
from .sources import Progress, write_at
from .staging import MARK, check_name, publish, staging_folder, staging_path, target_path
from .transfer import copy_all, write_computed


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
    with staging_folder(out, plan.digest, _has_shards) as staging:
        check_free(out, overwrite)  # again, now that nobody else can take it
        for shard in plan.shards:
            _write_shard(shard, staging, progress)
        for path, data in plan.files.items():
            _write_file(staging / path, data)
            progress(file_length(data))
        (staging / MARK).unlink()
        publish(staging, out)
    return out


def check_target(out: Path, plan: Plan, overwrite: bool) -> None:
    """Refuse a target that must not be written or has no room, before the first byte.

    Raises:
        DowncycleError: the target is the source, holds it or lies in it, exists, cannot be written, or the disk is too small.
    """
    try:
        check_free(out, overwrite)
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


def check_free(out: Path, overwrite: bool) -> None:
    """Refuse a target that exists, unless it is a checkpoint that may be replaced."""
    check_name(out, overwrite, "checkpoint", CONFIG)


def _has_shards(staging: Path) -> bool:
    return any(staging.glob("*.safetensors*"))


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


def _reserve(file: int, size: int) -> None:
    """Ask for all blocks of a file at once, so that copying into it takes less time. Where the file system cannot, nothing is lost."""
    if fallocate := getattr(ctypes.CDLL(None), "fallocate", None):  # not os.posix_fallocate, which then writes every block
        fallocate(file, 0, ctypes.c_int64(0), ctypes.c_int64(size))

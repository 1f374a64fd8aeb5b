"""Write a checkpoint as a GGUF file: whole or not at all, in bounded memory. The only code that writes GGUF files.

Before each ternary map, transformers rounds a token to 8 bits by its largest number. llama.cpp does not do that for these architectures;
its kernels round the activations to 8 bits in blocks of 256. So the outputs agree within that rounding, and not exactly.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..filenames import CONFIG
from ..sources import Progress
from ..staging import staging_path, target_path, what_failed
from ..transfer import write_computed
from .architectures import architecture, metadata, window_note
from .kinds import TYPES, Kind
from .numbers import reading

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from .encode import Encoder

MAGIC = b"GGUF"


@dataclass(frozen=True)
class Written:
    """A file that was written: where it is, its size, how many tensors it has of each kind, and what must be said of it."""

    path: Path
    nbytes: int
    kinds: dict[str, int]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """A GGUF file that can be written: `writer` holds its header, `tensors` compute what follows; `notes` must be said of it."""

    kind: Kind
    writer: GGUFWriter
    tensors: tuple[Encoder, ...]
    notes: tuple[str, ...]

    @property
    def data_bytes(self) -> int:
        """Size of the tensors, each of which begins at a multiple of the alignment."""
        return sum(_padded(tensor.nbytes, self.writer) for tensor in self.tensors)


def plan_gguf(model: Checkpoint, kind: Kind) -> Plan:
    """Say what a GGUF file of a model holds.

    Args:
        kind: of the matrices; vectors are F32, and in a ternary file the embeddings and the head are F16.
    Raises:
        DowncycleError: llama.cpp cannot run it so, or the gguf package is missing.
    """
    if kind not in TYPES:
        raise DowncycleError(f"--type {kind}: no such type; choose one of {', '.join(TYPES)}")
    try:
        import numpy as np
        from gguf import GGUFWriter
    except ImportError as error:
        raise DowncycleError("writing GGUF files needs the gguf package: pip install 'downcycle[gguf]'") from error
    from .general import add_fields, general_fields
    from .layout import lay_out
    from .tokenizer import VOCABULARY, tokenizer_fields

    with reading(f"{model.name}/{CONFIG}"):
        arch, config = architecture(model)
        fields = metadata(arch, config)
    layout = lay_out(model, arch, config, kind)
    with reading(f"{model.name}/{VOCABULARY}"):
        tokenizer, differences = tokenizer_fields(model, config["vocab_size"])
    writer = GGUFWriter(None, arch.name)
    add_fields(writer, "general", general_fields(model, TYPES[kind].file, tokenizer["ggml.tokens"]))
    add_fields(writer, arch.name, fields)
    add_fields(writer, "tokenizer", tokenizer)

    for tensor in layout.tensors:
        number: Any = TYPES[tensor.kind].id
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.int8), tensor.nbytes, raw_dtype=number)
    notes = (*layout.notes, *filter(None, [window_note(arch, config)]), *differences)
    return Plan(kind, writer, layout.tensors, notes)


def write_gguf(
    model: Checkpoint,
    out: str | Path,
    kind: Kind,
    *,
    overwrite: bool = False,
    progress: Progress = lambda count: None,
    plan: Plan | None = None,
) -> Written:
    """Write a model as one GGUF file that appears under its name only when it is whole and was read back.

    Args:
        overwrite: replace an existing GGUF file; no other file is ever replaced.
        progress: called with the number of bytes of each step. plan: what `plan_gguf` made of the same model.
    Raises:
        DowncycleError: llama.cpp cannot run the model so; the target exists or cannot be written; the disk is full.
    """
    out = target_path(out)
    check_file(out, overwrite)
    plan = plan or plan_gguf(model, kind)
    with _staged(out, overwrite) as staged:
        free = shutil.disk_usage(staged.parent).free
        if plan.data_bytes > free:
            raise DowncycleError(
                f"{out.parent}: {plan.data_bytes / 1e6:,.1f} MB are needed and {free / 1e6:,.1f} MB are free; free some space"
            )
        sums = _write(plan, staged, progress)
        from .check import check_gguf

        check_gguf(staged, plan.tensors, sums)
        nbytes = staged.stat().st_size
    kinds = [tensor.kind for tensor in plan.tensors]
    return Written(out, nbytes, {kind: kinds.count(kind) for kind in TYPES if kind in kinds}, (*plan.notes, *_rounding(plan)))


def check_file(out: Path, overwrite: bool) -> None:
    """Refuse a target that stands there already, unless it is a GGUF file that may be replaced."""
    try:
        if out.is_symlink():
            raise DowncycleError(f"--out {out}: is a symbolic link; give the file that it leads to, or another name")
        if not out.exists():
            return
        if not out.is_file():
            raise DowncycleError(f"--out {out}: exists and is no file; choose another name")
        if not overwrite:
            raise DowncycleError(f"--out {out}: exists already; choose another name, or give --overwrite to replace it")
        with open(out, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                raise DowncycleError(f"--out {out}: exists and is no GGUF file; --overwrite replaces those only")
    except OSError as error:
        raise DowncycleError(f"--out {out}: {error.strerror}; choose another name") from error


@contextmanager
def _staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """Give a locked, empty file beside the target; flush it and give it the target's name when all went well, delete it when not."""
    staged = staging_path(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = os.open(staged, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    except OSError as error:
        raise DowncycleError(f"--out {out}: {error.strerror}; choose a folder that can be written") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(lock), staged.stat())
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise DowncycleError(f"--out {out}: another run is writing it; wait for it or choose another name")
        try:
            os.truncate(lock, 0)
            yield staged
            os.fsync(lock)
            check_file(out, overwrite)
            staged.rename(out)
        except BaseException:
            staged.unlink(missing_ok=True)
            raise
        _flush(out.parent)
    except OSError as error:
        raise DowncycleError(f"{out.name} is not written: {what_failed(error)}") from error
    finally:
        os.close(lock)


def _write(plan: Plan, staged: Path, progress: Progress) -> dict[str, int]:
    """Write header and tensors; return the checksum of each tensor's bytes."""
    from zlib import crc32

    writer, sums = plan.writer, dict.fromkeys((tensor.name for tensor in plan.tensors), 0)
    writer.write_header_to_file(staged)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    offset = _padded(staged.stat().st_size, writer)
    os.truncate(staged, offset + plan.data_bytes)
    computed = []

    def summed(name: str, chunks: Any) -> Any:
        def give() -> Iterator[bytes]:
            for chunk in chunks():
                sums[name] = crc32(chunk, sums[name])
                yield chunk

        return give

    for tensor in plan.tensors:
        computed.append((offset, Tensor("U8", (tensor.nbytes,), summed(tensor.name, tensor.chunks))))
        offset += _padded(tensor.nbytes, writer)
    with open(staged, "r+b", buffering=0) as file:
        write_computed(computed, file.fileno(), progress)
    return sums


def _padded(size: int, writer: GGUFWriter) -> int:
    return writer.ggml_pad(size, writer.data_alignment)


def _rounding(plan: Plan) -> Iterator[str]:
    """Say which numbers are not exactly what they were."""
    for kind in TYPES:
        changed = [tensor for tensor in plan.tensors if tensor.kind == kind and tensor.rounded]
        if changed:
            count, whole = sum(tensor.rounded for tensor in changed), sum(tensor.numbers for tensor in changed)
            yield f"{count:,} of {whole:,} numbers of {len(changed)} tensors were rounded to {kind.upper()}"
    if scales := [tensor.rescaled for tensor in plan.tensors if tensor.rescaled]:
        yield f"the scales of {len(scales)} ternary tensors were rounded to float16, which changes them by {100 * max(scales):.2g}% at most"


def _flush(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)

"""What will be written, known before a weight is read: shards with their headers, and the byte ranges that go into them.

A pure function of a Checkpoint: opens and writes no file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Any

from .checkpoint import Checkpoint, Span, Tensor, file_length
from .errors import DowncycleError
from .filenames import CONFIG, INDEX, LINEAGE, SINGLE
from .header import DTYPE_BITS, build_header


@dataclass(frozen=True)
class Shard:
    """One safetensors file to be written."""

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    @cached_property
    def header(self) -> bytes:
        """The file's first bytes."""
        return build_header({name: (tensor.dtype, tensor.shape) for name, tensor in self.tensors.items()}, self.metadata)

    @cached_property
    def size(self) -> int:
        """Size of the whole file in bytes."""
        return len(self.header) + sum(tensor.nbytes for tensor in self.tensors.values())

    def placed(self) -> Iterator[tuple[int, Tensor]]:
        """Yield each tensor with its offset in the file."""
        offset = len(self.header)
        for tensor in self.tensors.values():
            yield offset, tensor
            offset += tensor.nbytes

    def copies(self) -> Iterator[tuple[int, Span]]:
        """Yield offsets and the byte ranges that go there, ranges that touch in both files joined into one."""
        last: tuple[int, Span] | None = None
        for offset, tensor in self.placed():
            if not isinstance(tensor.data, Span):
                continue
            span = tensor.data
            if last and _touch(*last, offset, span):
                last = last[0], Span(span.source, span.path, last[1].start, last[1].length + span.length)
            else:
                if last:
                    yield last
                last = offset, span
        if last:
            yield last


@dataclass(frozen=True)
class Plan:
    """What `write` will write, known before a weight is read."""

    shards: tuple[Shard, ...]
    files: Mapping[str, Span | bytes]

    @property
    def write_bytes(self) -> int:
        """Bytes that the folder will hold."""
        return sum(shard.size for shard in self.shards) + sum(file_length(data) for data in self.files.values())

    @property
    def download_bytes(self) -> int:
        """Bytes that come from the Hub."""
        return sum(span.length for span in self.spans() if not span.source.local_path(span.path))

    @property
    def read_bytes(self) -> int:
        """Bytes that are read from the source, wherever it is."""
        return sum(span.length for span in self.spans())

    def spans(self) -> Iterator[Span]:
        """Yield every byte range that is copied, or read to compute a tensor."""
        for shard in self.shards:
            yield from (span for _, span in shard.copies())
            yield from (span for tensor in shard.tensors.values() for span in tensor.inputs)
        yield from (data for data in self.files.values() if isinstance(data, Span))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the output: a staging folder with the same digest holds a part of it."""
        digest = sha256()
        for shard in self.shards:
            digest.update(shard.name.encode() + shard.header)
            inputs = ((-1, span) for tensor in shard.tensors.values() for span in tensor.inputs)
            for offset, span in (*shard.copies(), *inputs):
                digest.update(repr((offset, span.source.name, span.path, span.source.identity(span.path), span.start)).encode())
        for path, data in self.files.items():
            digest.update(repr((path, data if isinstance(data, bytes) else (data.path, data.source.identity(data.path)))).encode())
        return digest.hexdigest()


def plan_write(checkpoint: Checkpoint, max_shard_size: int = 5_000_000_000) -> Plan:
    """Lay a checkpoint out in shards of at most `max_shard_size` bytes of tensors each (a larger tensor gets its own)."""
    if max_shard_size < 1:
        raise DowncycleError(f"--max-shard-size {max_shard_size}: give a size such as 5GB")
    groups: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in checkpoint.tensors.items():
        if groups[-1] and filled + tensor.nbytes > max_shard_size:
            groups.append({})
            filled = 0
        groups[-1][name] = tensor
        filled += tensor.nbytes
    names = [SINGLE] if len(groups) == 1 else [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    shards = tuple(Shard(name, _aligned(group), checkpoint.metadata) for name, group in zip(names, groups, strict=True))
    files: dict[str, Span | bytes] = {**checkpoint.files, CONFIG: _json(checkpoint.config)}
    if checkpoint.lineage:
        files[LINEAGE] = _json(checkpoint.lineage)
    if len(shards) > 1:
        weight_map = {name: shard.name for shard in shards for name in shard.tensors}
        files[INDEX] = _json({"metadata": {"total_size": checkpoint.nbytes}, "weight_map": weight_map})
    return Plan(shards, files)


def _aligned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Put wide dtypes first, as safetensors does: a reader may map a tensor only at a multiple of its element size."""
    return dict(sorted(tensors.items(), key=lambda item: -DTYPE_BITS[item[1].dtype]))


def _touch(offset: int, span: Span, next_offset: int, following: Span) -> bool:
    same = span.source is following.source and span.path == following.path
    return same and span.start + span.length == following.start and offset + span.length == next_offset


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"

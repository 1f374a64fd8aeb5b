"""Read a GGUF file back and see that it holds what was to be written. Writes nothing."""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any
from zlib import crc32

from gguf import GGUFReader, GGUFValueType

from ..errors import DowncycleError
from ..sources import CHUNK
from .encode import Encoder
from .kinds import TYPES


class HeaderReader(GGUFReader):
    """The package's reader, but it passes over lists: a vocabulary would take it seconds and hundreds of megabytes."""

    def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
        if raw_type != GGUFValueType.ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        data: Any = self.data
        kind, count = struct.unpack_from("<IQ", data, orig_offs)
        end = orig_offs + 12
        if kind == GGUFValueType.STRING:
            for _ in range(count):
                end += 8 + struct.unpack_from("<Q", data, end)[0]
        else:
            end += count * self.gguf_scalar_to_np[GGUFValueType(kind)]().itemsize
        return end - orig_offs, [data[orig_offs:end]], [], [GGUFValueType.ARRAY, GGUFValueType(kind)]


def check_gguf(path: Path, tensors: tuple[Encoder, ...], sums: dict[str, int]) -> None:
    """See, with the gguf package's reader, that each tensor stands where the header says, with its type, its shape and its bytes.

    What the bytes mean was seen while they were made: `encode` decodes each block of TQ2_0 and TQ1_0 with that package. A file with
    I2_S, which the reader refuses, is checked from its end, as tensors lie in order and end with the file.

    Args:
        sums: CRC-32 of the bytes of each tensor.
    """
    unknown = any(tensor.kind == "i2_s" for tensor in tensors)
    places = _from_end(path, tensors) if unknown else _from_header(path, tensors)
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors:
            if _sum(file.fileno(), places[tensor.name], tensor.nbytes) != sums[tensor.name]:
                raise _differs(path, tensor.name)


def _from_header(path: Path, tensors: tuple[Encoder, ...]) -> dict[str, int]:
    found = {tensor.name: tensor for tensor in HeaderReader(path).tensors}
    for wanted in tensors:
        there = found.get(wanted.name)
        if there is None or (int(there.tensor_type), tuple(reversed(there.shape.tolist()))) != (TYPES[wanted.kind].id, wanted.shape):
            raise _differs(path, wanted.name)
    if len(found) != len(tensors):
        raise _differs(path, "the number of tensors")
    return {name: tensor.data_offset for name, tensor in found.items()}


def _from_end(path: Path, tensors: tuple[Encoder, ...]) -> dict[str, int]:
    offset, places = path.stat().st_size, {}
    for tensor in reversed(tensors):
        offset -= (tensor.nbytes + 31) // 32 * 32
        places[tensor.name] = offset
    return places


def _sum(file: int, offset: int, length: int) -> int:
    total = 0
    for done in range(0, length, CHUNK):
        total = crc32(os.pread(file, min(CHUNK, length - done), offset + done), total)
    return total


def _differs(path: Path, what: str) -> DowncycleError:
    return DowncycleError(f"{path}: {what} is not what was written; the disk or its file system is faulty; check it and try again")

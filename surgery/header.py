"""The safetensors header: parse one from bytes that nobody vouches for, and build one.

Format: 8 bytes little-endian length n, n bytes of JSON, then the data. The JSON maps each tensor's name to its dtype, shape and
data_offsets, relative to the end of the header. Reads no data and opens no files.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any, NamedTuple

from .errors import DowncycleError

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
MAX_DIMENSIONS = 64  # NumPy's and PyTorch's limit; a hostile shape of millions would take hours to multiply
DTYPE_BITS = {
    **dict.fromkeys(("C64", "F64", "I64", "U64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}


class Entry(NamedTuple):
    """One tensor of a file: its bytes are [start, end) of the whole file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def tensor_nbytes(dtype: str, shape: Iterable[int]) -> int:
    """Return how many bytes a tensor takes; sub-byte dtypes are packed and rounded up."""
    return (prod(shape) * DTYPE_BITS[dtype] + 7) // 8


def header_length(first: bytes, file_size: int, where: str) -> int:
    """Read the length from a file's first 8 bytes and check it against the file's size."""
    if len(first) < LENGTH_BYTES:
        raise DowncycleError(f"{where}: {len(first)} bytes long, too short for a safetensors file; fetch it again")
    (length,) = struct.unpack("<Q", first[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES or LENGTH_BYTES + length > file_size:
        raise DowncycleError(
            f"{where}: claims a header of {length} bytes in a file of {file_size}; not a safetensors file, or truncated: fetch it again"
        )
    return length


def parse_header(text: bytes, file_size: int, where: str) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parse the JSON part of a header; return the tensors in the order of their data, and the metadata.

    Raises:
        DowncycleError: the header is not JSON, names a tensor twice, or its offsets overlap, leave a gap, run past the end of the
            file or disagree with dtype and shape.
    """

    def fault(what: str) -> DowncycleError:
        return DowncycleError(f"{where}: {what}; the file is damaged, fetch it again")

    try:
        fields = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise fault(f"unreadable safetensors header ({str(error)[:80]})") from error
    if not isinstance(fields, dict):
        raise fault("the safetensors header is not a JSON object")
    metadata = fields.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise fault("the header's __metadata__ is not a map of strings")
    data_start = LENGTH_BYTES + len(text)
    try:
        entries = {name: _entry(name, field, data_start) for name, field in fields.items()}
        for text_part in (*entries, *metadata, *metadata.values()):
            text_part.encode()
    except ValueError as error:
        raise fault(str(error)[:200]) from error
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)))
    end = data_start
    for name, entry in ordered.items():
        if entry.start != end:
            raise fault(f"tensor {_short(name)} {'overlaps' if entry.start < end else 'leaves a gap after'} the one before it")
        end = entry.end
    if end != file_size:
        more = "is truncated" if end > file_size else "has bytes that no tensor claims"
        raise fault(f"{file_size} bytes long, but its header describes {end}: it {more}")
    return ordered, metadata


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Return a whole header, length included, for tensors (dtype, shape) laid out in this order; padded to 8 bytes."""
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for name, (dtype, shape) in tensors.items():
        end = start + tensor_nbytes(dtype, shape)
        fields[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _entry(name: str, field: Any, data_start: int) -> Entry:
    """Check one tensor's field; raise ValueError with what is wrong."""
    if not isinstance(field, dict) or not {"dtype", "shape", "data_offsets"} <= set(field):
        raise ValueError(f"tensor {_short(name)} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = field["dtype"], field["shape"], field["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"tensor {_short(name)} has the unknown dtype {_short(dtype)}")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS or not _counts(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {_short(name)} has a shape or offsets that are no lists of whole numbers")
    start, end = offsets
    if end - start != tensor_nbytes(dtype, shape):
        raise ValueError(f"tensor {_short(name)}: dtype and shape do not fit its {end - start} bytes")
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and 0 <= number < 2**63 for number in value)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{_short(twice)} stands in it twice")
    return fields


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def _short(value: object) -> str:
    return ascii(value)[:80]

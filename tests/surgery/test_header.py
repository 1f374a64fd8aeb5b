"""The header parser believes nothing: what it accepts the safetensors library reads too, and all else is one clear error."""

import json
import random
import struct
import time

import pytest
from safetensors import SafetensorError, deserialize

from downcycle.surgery.errors import DowncycleError
from downcycle.surgery.header import DTYPE_BITS, build_header, header_length, parse_header, tensor_nbytes

PAIR = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [8, 16]}}


def parse(file: bytes):
    length = header_length(file[:8], len(file), "x.safetensors")
    return parse_header(file[8 : 8 + length], len(file), "x.safetensors")


def file_of(text: str | bytes, data: int = 16) -> bytes:
    text = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(text)) + text + bytes(range(data))


def changed(name: str = "b", **fields) -> str:
    return json.dumps(PAIR | {name: PAIR[name] | fields})


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_the_library_reads_every_dtype_that_is_built(dtype):
    tensors = {"é/../\n": (dtype, (3, 8)), "empty": (dtype, (0, 8)), "scalar-like": (dtype, (8,))}
    header = build_header(tensors, {"format": "pt"})
    sizes = [tensor_nbytes(*tensor) for tensor in tensors.values()]
    file = header + random.Random(0).randbytes(sum(sizes))
    assert len(header) % 8 == 0
    read = dict(deserialize(file))
    assert {name: (tensor["dtype"], tuple(tensor["shape"])) for name, tensor in read.items()} == tensors
    entries, metadata = parse(file)
    assert metadata == {"format": "pt"}
    assert {name: file[entry.start : entry.end] for name, entry in entries.items()} == {name: bytes(t["data"]) for name, t in read.items()}
    assert [entry.end - entry.start for entry in entries.values()] == sizes


def test_tensors_come_in_the_order_of_their_data_and_unknown_fields_are_passed_over():
    entries, metadata = parse(file_of(json.dumps(dict(reversed((PAIR | {"b": PAIR["b"] | {"more": 1}}).items())))))
    assert list(entries) == ["a", "b"]
    assert metadata == {}


TWICE = file_of(json.dumps(PAIR)[:-1] + "," + json.dumps(PAIR)[1:])
BAD = {
    "cut off inside the JSON": (file_of(json.dumps(PAIR)[:-5]), "unreadable"),
    "no JSON": (file_of("{'a': 1}"), "unreadable"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "unreadable"),
    "a byte-order mark": (file_of(b"\xef\xbb\xbf" + json.dumps(PAIR).encode()), "unreadable"),
    "UTF-16": (file_of(json.dumps(PAIR).encode("utf-16")), "unreadable"),
    "NaN": (file_of('{"a": NaN}'), "NaN"),
    "nested without end": (file_of("[" * 100_000), "unreadable"),
    "a number of 5000 digits": (file_of('{"a": %s}' % ("9" * 5000)), "unreadable"),
    "a list": (file_of("[]"), "not a JSON object"),
    "metadata that is a list": (file_of('{"__metadata__": []}'), "__metadata__"),
    "metadata that is not text": (file_of('{"__metadata__": {"a": 1}}'), "__metadata__"),
    "a tensor twice": (TWICE, "'a' stands in it twice"),
    "a tensor that is a number": (file_of('{"a": 1}'), "lacks"),
    "a tensor without shape": (file_of('{"a": {"dtype": "F32", "data_offsets": [0, 8]}}'), "lacks"),
    "an unknown dtype": (file_of(changed(dtype="F33")), "unknown dtype 'F33'"),
    "a dtype that is a list": (file_of(changed(dtype=["F32"])), "unknown dtype"),
    "a negative size": (file_of(changed(shape=[-2, -2])), "whole numbers"),
    "a fraction": (file_of(changed(shape=[2.0, 2])), "whole numbers"),
    "true": (file_of(changed(shape=[True, 4])), "whole numbers"),
    "a size beyond 64 bits": (file_of(changed(shape=[2**64])), "whole numbers"),
    "three offsets": (file_of(changed(data_offsets=[8, 12, 16])), "whole numbers"),
    "offsets in reverse": (file_of(changed(data_offsets=[16, 8])), "do not fit"),
    "shape against length": (file_of(changed(shape=[2, 3])), "do not fit"),
    "dtype against length": (file_of(changed(dtype="F32")), "do not fit"),
    "overlapping tensors": (file_of(changed(data_offsets=[4, 12])), "overlaps"),
    "two tensors at one place": (file_of(changed(data_offsets=[0, 8])), "overlaps"),
    "a gap": (file_of(changed(data_offsets=[10, 18]), 18), "gap"),
    "a gap before the first": (file_of(changed("a", data_offsets=[1, 9])), "gap"),
    "offsets out of the file": (file_of(changed(shape=[2**40], data_offsets=[8, 8 + 2**41])), "truncated"),
    "a truncated file": (file_of(json.dumps(PAIR), 15), "truncated"),
    "bytes behind the last tensor": (file_of(json.dumps(PAIR), 17), "no tensor claims"),
    "a surrogate in a name": (file_of(json.dumps(PAIR).replace('"a"', r'"\ud800"')), "surrogates"),
    "a header longer than the file": (struct.pack("<Q", 999) + b"{}", "claims a header of 999 bytes"),
    "a header of 2**64 - 1 bytes": (b"\xff" * 8 + b"{}", "claims a header"),
    "an empty file": (b"", "too short"),
    "seven bytes": (bytes(7), "too short"),
    "no header": (bytes(8), "unreadable"),
}


@pytest.mark.parametrize(("file", "says"), BAD.values(), ids=BAD)
def test_a_bad_header_is_refused_in_one_line(file, says):
    with pytest.raises(DowncycleError, match=says) as refusal:
        parse(file)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400
    assert str(refusal.value).startswith("x.safetensors: ")
    assert "fetch it again" in str(refusal.value)
    if file != TWICE:  # of these the library takes the last
        with pytest.raises(SafetensorError):
            deserialize(file)


@pytest.mark.parametrize(
    "text",
    [
        changed(shape=[2**62] * 200_000),
        "{" + ",".join(f'"{number}":0' for number in range(300_000)) + ',"299999":0}',
    ],
    ids=["a shape of 200,000 sizes", "300,000 names, the last one twice"],
)
def test_a_header_made_to_keep_us_busy_is_refused_soon(text):
    start = time.process_time()
    with pytest.raises(DowncycleError):
        parse(file_of(text))
    assert time.process_time() - start < 5


def mutate(text: bytes, rng: random.Random) -> bytes:
    """Damage a header in one to four places: bytes, numbers, whole pieces."""
    for _ in range(rng.randint(1, 4)):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in range(2))
        piece = rng.choice([b"", rng.randbytes(3), b"0", b"-1", b"1e3", b"null", b"{", b"]", b'"', b"\\ud800", b"9" * 20, text[at:to]])
        match rng.randrange(4):
            case 0:
                text = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
            case 1:
                text = text[:at] + piece + text[at:]
            case 2:
                text = text[:at] + piece + text[min(to, at + 8) :]
            case 3:
                number, other = (str(rng.choice([0, 1, 2, 4, 8, 16, 24, 2**31, 2**63, 2**64])).encode() for _ in range(2))
                text = text.replace(number, other, 1)
    return text


def test_ten_thousand_damaged_headers():
    rng = random.Random(7)
    whole = build_header({"a": ("F32", (2,)), "b": ("BF16", (2, 2)), "é": ("F4", (16,)), "none": ("I8", (0, 4))}, {"format": "pt"})[8:]
    accepted = 0
    for _ in range(10_000):
        text = mutate(whole, rng)
        length = (
            len(text)
            if rng.random() < 0.9
            else rng.choice([0, 1, len(text) - 1, len(text) + 1, len(text) + 24, 2**63, rng.randrange(2**64)])
        )
        file = struct.pack("<Q", length) + text + bytes(range(24))
        try:
            entries, _ = parse(file)
        except DowncycleError as refusal:
            assert "\n" not in str(refusal)
            continue
        accepted += 1
        read = dict(deserialize(file))
        assert {name: (entry.dtype, list(entry.shape), file[entry.start : entry.end]) for name, entry in entries.items()} == {
            name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in read.items()
        }
    assert 20 < accepted < 5000

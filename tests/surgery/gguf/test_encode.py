"""The bytes of a tensor against the gguf package's own quantisers, torch's roundings, and layouts spelled out weight by weight."""

import struct

import pytest

gguf = pytest.importorskip("gguf")
import numpy as np  # noqa: E402

from downcycle.surgery.checkpoint import Tensor  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf.encode import Encoder  # noqa: E402
from downcycle.surgery.gguf.rows import Matrix  # noqa: E402

SCALE = np.float32(0.0173)
TYPES = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


def codes_of(rows, width, seed=0):
    codes = np.random.default_rng(seed).integers(0, 3, (rows, width)).astype(np.uint8)
    codes[0, :256] = 1  # a block of zeros
    return codes


def tensor_of(values, dtype):
    data = bf16(values) if dtype == "BF16" else values.astype(TYPES[dtype])
    return Tensor(dtype, values.shape, lambda: [data.tobytes()])


def bf16(values):
    """Cut float32 to bf16: the numbers of these tests are exact in it."""
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def packed(codes, scale, inverse=False, stored="F32"):
    """Spell transformers' packed layout: row r of a quarter in bits 0-1, the same row of the next quarter in bits 2-3, and so on."""
    quarter = len(codes) // 4
    weight = np.zeros((quarter, codes.shape[1]), np.uint8)
    for row, line in enumerate(codes):
        weight[row % quarter] |= line << (2 * (row // quarter))
    number = np.array([1 / scale if inverse else scale], np.float32)
    return Matrix(Tensor("U8", weight.shape, lambda: [weight.tobytes()]), tensor_of(number, stored), inverse)


def encoded(kind, *matrices, **options):
    tensor = Encoder("weight", kind, matrices, **options)
    data = b"".join(tensor.chunks())
    assert len(data) == tensor.nbytes
    return data, tensor


def i2_s(codes, scale):
    """Spell I2_S: 128 weights in 32 bytes, byte j with the weights j, j + 32, j + 64 and j + 96 from its highest bits down."""
    flat, data = codes.ravel(), bytearray()
    for block in range(0, len(flat), 128):
        for j in range(32):
            four = [int(flat[block + j + 32 * k]) for k in range(4)]
            data.append(four[0] << 6 | four[1] << 4 | four[2] << 2 | four[3])
    return bytes(data) + struct.pack("<f", scale) + bytes(28)


@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0"])
@pytest.mark.parametrize("inverse", [False, True])
def test_packed_weights_become_what_the_package_makes_of_the_numbers(kind, inverse):
    codes = codes_of(600, 512)  # more than one block is read
    scale = np.float32(1) / np.float32(1 / SCALE) if inverse else SCALE
    values = (codes.astype(np.float32) - 1) * scale
    expected = gguf.quantize(values, gguf.GGMLQuantizationType[kind.upper()])
    assert encoded(kind, packed(codes, SCALE, inverse))[0] == expected.tobytes()
    decoded = gguf.dequantize(expected, gguf.GGMLQuantizationType[kind.upper()])
    assert np.array_equal(decoded, (codes.astype(np.float32) - 1) * np.float32(np.float16(scale)))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F64"])
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "i2_s"])
def test_three_values_become_the_same_in_every_dtype(kind, dtype):
    codes, scale = codes_of(8, 512), np.float32(0.0078125)
    matrix = Matrix(tensor_of((codes.astype(np.float32) - 1) * scale, dtype))
    assert encoded(kind, matrix)[0] == encoded(kind, packed(codes, scale))[0]


def test_i2_s_is_as_documented():
    codes = codes_of(8, 384)
    assert encoded("i2_s", packed(codes, SCALE))[0] == i2_s(codes, SCALE)


def test_nothing_but_zeros_is_zero():
    matrix = Matrix(tensor_of(np.zeros((2, 256), np.float32), "F32"))
    for kind in ("tq2_0", "tq1_0"):
        data = np.frombuffer(encoded(kind, matrix)[0], np.uint8).reshape(2, -1)
        assert not gguf.dequantize(data, gguf.GGMLQuantizationType[kind.upper()]).any()
    assert encoded("i2_s", matrix)[0] == b"\x55" * 128 + bytes(32)


def test_negative_zeros_are_zeros():
    values = np.where(codes_of(2, 256) == 1, -0.0, 0.5).astype(np.float32)
    codes = np.where(values == 0, 1, 2).astype(np.uint8)
    assert (
        encoded("tq2_0", Matrix(tensor_of(values, "F32")))[0]
        == gguf.quantize((codes.astype(np.float32) - 1) * 0.5, gguf.GGMLQuantizationType.TQ2_0).tobytes()
    )


def test_rows_come_in_the_order_asked_for():
    codes, order = codes_of(16, 256), np.random.default_rng(1).permutation(16)
    for matrix in (packed(codes, SCALE), Matrix(tensor_of((codes.astype(np.float32) - 1) * SCALE, "F32"))):
        turned = Matrix(matrix.weight, matrix.scale, matrix.inverse, order)
        data = np.frombuffer(encoded("f32", turned)[0], np.float32).reshape(16, 256)
        assert np.array_equal(data, ((codes.astype(np.float32) - 1) * SCALE)[order])


def test_experts_lie_one_after_the_other():
    values = np.random.default_rng(0).standard_normal((3, 4, 8)).astype(np.float32)
    data, tensor = encoded("f32", *(Matrix(tensor_of(one, "F32")) for one in values))
    assert data == values.tobytes()
    assert tensor.shape == (3, 4, 8)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_floats_are_rounded_as_torch_rounds_them(kind, dtype):
    torch = pytest.importorskip("torch")
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    random = torch.Generator().manual_seed(0)
    values = torch.randn(500, 33, generator=random, dtype=torch.float64).to(names[dtype])
    values[0, :4] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 2**-24, 0.0], dtype=torch.float64).to(names[dtype])  # ties to even, tiny
    raw = values.view(torch.uint8).numpy().tobytes()
    data, tensor = encoded(kind, Matrix(Tensor(dtype, (500, 33), lambda: [raw])))
    expected = values.float().to(names[kind.upper()])
    assert data == expected.contiguous().view(torch.uint8).numpy().tobytes()
    assert tensor.rounded == int((expected.double() != values.double()).sum())


def test_norms_are_moved():
    values = np.random.default_rng(0).standard_normal(64).astype(np.float32)
    assert np.array_equal(np.frombuffer(encoded("f32", Matrix(tensor_of(values, "F32")), add=1.0)[0], np.float32), values + 1)


@pytest.mark.parametrize("number", [1e5, float("inf"), float("nan")])
def test_what_a_kind_cannot_hold_is_refused_by_name(number):
    values = np.ones((2, 4), np.float32)
    values[1, 2] = number
    with pytest.raises(DowncycleError, match="weight: .* that F16 cannot hold"):
        encoded("f16", Matrix(tensor_of(values, "F32")))


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_what_is_not_finite_is_refused_in_every_kind(kind, dtype, number):
    values = np.ones((3000, 100))  # more than one block
    values[0, 0] = 3.3e38 if dtype != "F16" and kind != "f16" else 6e4
    assert len(encoded(kind, Matrix(tensor_of(values, dtype)))[0]) == values.size * (4 if kind == "f32" else 2)
    values[2999, 99] = number
    with pytest.raises(DowncycleError, match="weight: holds NaN"):
        encoded(kind, Matrix(tensor_of(values, dtype)))


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.parametrize("kind", ["tq2_0", "tq1_0", "i2_s"])
def test_what_rounding_does_to_a_scale_is_counted(kind, stored):
    scale, codes = np.float32(0.75) if stored else SCALE, codes_of(8, 256)
    change = 0.0 if stored or kind == "i2_s" else abs(float(np.float16(scale)) / float(scale) - 1)
    assert encoded(kind, packed(codes, scale))[1].rescaled == pytest.approx(change)
    assert encoded(kind, Matrix(tensor_of((codes.astype(np.float32) - 1) * scale, "F32")))[1].rescaled == pytest.approx(change)
    assert (change > 1e-5) == (not stored and kind != "i2_s")


@pytest.mark.parametrize("size", [1, 7, 4096, 1 << 22])
@pytest.mark.parametrize("turned", [False, True])
def test_a_computed_tensor_comes_in_pieces_of_any_size(turned, size):
    values = np.random.default_rng(0).standard_normal((700, 3) if size == 1 else (700, 1000)).astype(np.float32)
    data = values.tobytes()
    order = np.random.default_rng(1).permutation(700) if turned else None
    tensor = Tensor("F32", values.shape, lambda: (data[place : place + size] for place in range(0, len(data), size)))
    assert encoded("f32", Matrix(tensor, order=order))[0] == (values[order] if turned else values).tobytes()


def test_a_computed_tensor_is_not_computed_further_than_is_asked_for():
    row, given = np.ones(1 << 18, np.float32).tobytes(), []

    def pieces():
        for place in range(4):
            given.append(place)
            yield row

    blocks = Matrix(Tensor("F32", (4, 1 << 18), pieces)).blocks()
    assert next(blocks).shape == (1, 1 << 18)
    assert given == [0]
    assert len(list(blocks)) == 3


@pytest.mark.parametrize("place", [0, 255, 600 * 512 - 1])
@pytest.mark.parametrize("number", [0.5, -0.25, float("nan"), float("inf")])
def test_one_number_that_is_not_ternary_is_found(place, number):
    values = (codes_of(600, 512).astype(np.float32) - 1) * np.float32(0.125)
    values.ravel()[place] = number
    with pytest.raises(DowncycleError, match="weight: .*downcycle ternarize"):
        encoded("tq2_0", Matrix(tensor_of(values, "F32")))


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf"), 1e6, 1e-9])
def test_a_scale_that_is_none_is_refused(scale):
    with pytest.raises(DowncycleError, match="weight: has the scale"):
        encoded("tq2_0", packed(codes_of(8, 256), scale))


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0", "i2_s", "f16", "f32", "bf16"])
def test_a_code_that_is_none_is_refused(kind):
    codes = codes_of(8, 256)
    codes[5, 7] = 3
    with pytest.raises(DowncycleError, match="codes that are no ternary weights"):
        encoded(kind, packed(codes, SCALE))

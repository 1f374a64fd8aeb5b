"""Packed codes are those of the formula in transformers' layout, whatever pieces a matrix comes in; the scale is summed up once."""

import json
import struct

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")

from downcycle import DowncycleError, open_checkpoint  # noqa: E402
from downcycle.surgery.checkpoint import Tensor  # noqa: E402
from downcycle.surgery.ternary import packing  # noqa: E402
from downcycle.surgery.ternary.packing import Scale, packed, scale_tensor  # noqa: E402

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def weights(rows, columns, dtype="F32", seed=0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02).to(KINDS[dtype])


def as_tensor(weight, dtype="F32", piece=1000):
    """A tensor whose bytes come in pieces of so many numbers."""
    flat = weight.flatten()
    return Tensor(dtype, tuple(weight.shape), lambda: (bytes(some.view(torch.uint8).numpy().data) for some in flat.split(piece)))


def codes_by_hand(weight):
    weight = weight.double().numpy()
    scale = np.float32(max(np.abs(weight).mean(), 1e-5))
    return np.clip(np.round(weight / scale), -1, 1).astype(int), scale


def unpack_by_hand(data, rows, columns):
    """Bits 0-1 of a byte are a weight of the first quarter of the rows, 6-7 of the last."""
    found = np.zeros((rows, columns), int)
    data = np.frombuffer(data, np.uint8).reshape(rows // 4, columns)
    for row in range(rows):
        found[row] = (data[row % (rows // 4)] // 4 ** (row // (rows // 4)) % 4).astype(int) - 1
    return found


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("shape", "piece"), [((8, 6), 5), ((4, 3), 1), ((12, 50), 1000), ((64, 33), 128)])
def test_codes_and_scale(dtype, shape, piece, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 7)  # blocks end anywhere
    weight = weights(*shape, dtype)
    scale = Scale(as_tensor(weight, dtype, piece), "w")
    tensor = packed(scale)
    codes, wanted = codes_by_hand(weight)
    data = b"".join(tensor.chunks())
    assert (tensor.dtype, tensor.shape, len(data)) == ("U8", (shape[0] // 4, shape[1]), tensor.nbytes)
    assert (unpack_by_hand(data, *shape) == codes).all()
    assert scale.value() == pytest.approx(wanted, rel=2e-7)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("shape", [(8, 6), (4, 3), (12, 50), (64, 33)])
def test_a_matrix_in_a_file_is_packed_as_one_that_is_computed(dtype, shape, monkeypatch, tmp_path):
    from safetensors.torch import save_file

    weight = weights(*shape, dtype)
    save_file({"a": torch.zeros(3, dtype=torch.uint8), "w": weight}, tmp_path / "model.safetensors")
    config = {"model_type": "llama", "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    stored = open_checkpoint(tmp_path).tensors["w"]
    whole = b"".join(packed(Scale(as_tensor(weight, dtype), "w")).chunks())
    monkeypatch.setattr(packing, "BLOCK", 7)
    counts = []
    pieces = list(packed(Scale(stored, "w"), lambda name, tally: counts.append((tally.minus, tally.zero, tally.plus))).chunks())
    assert b"".join(pieces) == whole and max(map(len, pieces)) <= 7
    codes, _ = codes_by_hand(weight)
    assert counts == [((codes == -1).sum(), (codes == 0).sum(), (codes == 1).sum())]


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("size", [0.5, 0.0123])
def test_weights_that_are_ternary_already_stay_what_they_are(dtype, size, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 7)
    codes = torch.randint(-1, 2, (16, 9), generator=torch.Generator().manual_seed(1))
    weight = (codes * torch.tensor(size).to(KINDS[dtype])).to(KINDS[dtype])
    found = []
    scale = Scale(as_tensor(weight, dtype), "w")
    data = b"".join(packed(scale, lambda name, tally: found.append(tally)).chunks())
    assert (unpack_by_hand(data, 16, 9) == codes.numpy()).all()
    assert scale.value() == np.float32(float(weight.abs().max()))
    assert found[0].error < 1e-7
    nearly = weight.clone()
    nearly[3, 3] = size / 3
    assert Scale(as_tensor(nearly, dtype), "w").value() == pytest.approx(float(nearly.double().abs().mean()), rel=1e-6)


@pytest.mark.parametrize(("dtype", "least"), [("F32", 1e-40), ("F64", 1e-60), ("F32", 0.0)])
def test_a_scale_is_never_next_to_nothing(dtype, least):
    weight = torch.zeros(4, 4, dtype=KINDS[dtype])
    weight[1, 2] = least
    scale = Scale(as_tensor(weight, dtype), "w")
    assert scale.value() == np.float32(1e-5)
    assert b"".join(scale_tensor(scale, inverse=True).chunks()) == struct.pack("<f", 1 / scale.value())
    assert (unpack_by_hand(b"".join(packed(scale).chunks()), 4, 4) == 0).all()


def test_transformers_packs_the_same():
    integration = pytest.importorskip("transformers.integrations.bitnet")
    weight = weights(64, 48)
    data = b"".join(packed(Scale(as_tensor(weight), "w")).chunks())
    wanted = integration.pack_weights(torch.from_numpy(codes_by_hand(weight)[0]).float())
    assert data == wanted.numpy().tobytes()


@pytest.mark.parametrize("inverse", [True, False])
def test_the_scale_is_a_vector_of_one_number(inverse):
    weight = weights(8, 8)
    tensor = scale_tensor(Scale(as_tensor(weight), "w"), inverse)
    (found,) = struct.unpack("<f", b"".join(tensor.chunks()))
    plain = codes_by_hand(weight)[1]
    assert (tensor.dtype, tensor.shape) == ("F32", (1,))
    assert found == pytest.approx(1 / plain if inverse else plain, rel=3e-7)


def test_a_half_rounds_to_even():
    """0.5 s is 0, and what is a little more is 1."""
    weight = torch.tensor([[1.0, 0.5, 0.75, -0.5], [0.25, 1.0, 2.0, 2.0]] * 2)  # mean 1
    weight = torch.cat([weight, torch.tensor([[1.0, 1.0, 1.0, 1.0]] * 4)])
    scale = Scale(as_tensor(weight), "w")
    assert scale.value() == 1
    assert unpack_by_hand(b"".join(packed(scale).chunks()), 8, 4)[0].tolist() == [1, 0, 1, 0]


def test_weights_of_zeros():
    scale = Scale(as_tensor(torch.zeros(4, 4)), "w")
    assert scale.value() == pytest.approx(1e-5) and not unpack_by_hand(b"".join(packed(scale).chunks()), 4, 4).any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_refused_by_name(bad):
    weight = weights(8, 8)
    weight[3, 5] = bad
    with pytest.raises(DowncycleError, match=r"^model.layers.3.up.weight: holds NaN or infinity"):
        list(packed(Scale(as_tensor(weight), "model.layers.3.up.weight")).chunks())


def test_the_scale_is_summed_up_once():
    reads = []
    weight = weights(8, 8)

    def chunks():
        reads.append(1)
        yield bytes(weight.view(torch.uint8).numpy().data)

    scale = Scale(Tensor("F32", (8, 8), chunks), "w")
    for tensor in (packed(scale), scale_tensor(scale, True), scale_tensor(scale, False)):
        b"".join(tensor.chunks())
    assert len(reads) == 2

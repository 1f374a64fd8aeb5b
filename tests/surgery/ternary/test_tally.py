"""What is counted while a matrix is packed, and what is counted in the packed file, is what numpy counts in the whole matrices."""

import json
import shutil

import pytest

torch = pytest.importorskip("torch")
np = pytest.importorskip("numpy")
from safetensors.torch import load_file, save_file  # noqa: E402

from downcycle import DowncycleError, keep_layers, open_checkpoint, write  # noqa: E402
from downcycle.surgery.checkpoint import Tensor  # noqa: E402
from downcycle.surgery.ternary import packing, tally  # noqa: E402
from downcycle.surgery.ternary.packing import Scale, packed  # noqa: E402
from downcycle.surgery.ternary.rule import Rule  # noqa: E402
from downcycle.surgery.ternary.tally import Tally, add_up, by_layer, tally_packed  # noqa: E402
from downcycle.surgery.ternary.ternarize import LINEAR, ternarize  # noqa: E402

KINDS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


def by_hand(weight, scale=None):
    """Counts and error of a whole matrix, in float64."""
    weight = weight.double().numpy()
    scale = np.float32(np.abs(weight).mean()) if scale is None else scale
    codes = np.clip(np.round(weight.astype(np.float32) / np.float32(scale)), -1, 1)
    counts = tuple(int((codes == value).sum()) for value in (-1, 0, 1))
    return counts, float(np.linalg.norm(weight - float(scale) * codes) / np.linalg.norm(weight))


def random(rows, columns, dtype="F32", seed=0):
    """More positive numbers than negative ones, so that no two counts are alike."""
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.02 + 0.004).to(KINDS[dtype])


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Three layers of the built-in model, in float32, one of their matrices with a weight that outweighs all."""
    folder = write(keep_layers(open_checkpoint("demo"), [0, 1, 2]), tmp_path_factory.mktemp("tally") / "m")
    tensors = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = 100.0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("shape", "piece"), [((8, 6), 5), ((12, 50), 1000), ((64, 33), 128)])
def test_counted_while_it_is_packed(dtype, shape, piece, monkeypatch):
    monkeypatch.setattr(packing, "BLOCK", 7)
    weight = random(*shape, dtype)
    data = [bytes(some.view(torch.uint8).numpy().data) for some in weight.flatten().split(piece)]
    tensor, told = Tensor(dtype, shape, lambda: data), []
    list(packed(Scale(tensor, "w"), lambda *one: told.append(one)).chunks())
    ((name, found),) = told
    counts, error = by_hand(weight)
    assert name == "w" and (found.minus, found.zero, found.plus) == counts and len(set(counts)) == 3
    assert found.error == pytest.approx(error, rel=1e-6)
    assert (found.before, found.after) == (tensor.nbytes, shape[0] * shape[1] // 4 + 4)
    assert found.weights == shape[0] * shape[1] and sum(found.shares) == pytest.approx(1)
    assert found.shares[0] == pytest.approx(counts[0] / found.weights)


@pytest.mark.parametrize("linear", LINEAR)
def test_counted_in_the_packed_file_beside_its_source(linear, model, tmp_path, monkeypatch):
    monkeypatch.setattr(tally, "BLOCK", 1000)  # ends in no row
    source, told = open_checkpoint(model), {}
    value = ternarize(source, linear=linear, tell=told.__setitem__)
    folder = write(value, tmp_path / "packed")
    weights = load_file(model / "model.safetensors")
    found = tally_packed(open_checkpoint(folder), source)
    assert found.keys() == told.keys() == {name for name in weights if "_proj" in name}
    for name, one in found.items():
        counts, error = by_hand(weights[name])
        assert (one.minus, one.zero, one.plus) == counts == (told[name].minus, told[name].zero, told[name].plus)
        assert one.error == pytest.approx(error, rel=1e-6) == pytest.approx(told[name].error, rel=1e-6)
        assert (one.before, one.after) == (told[name].before, told[name].after)
    assert found["model.layers.1.mlp.up_proj.weight"].error > 0.9  # all but one are 0


def test_without_its_source_nothing_is_said_of_the_error(model, tmp_path):
    folder = write(ternarize(open_checkpoint(model)), tmp_path / "packed")
    alone, beside = tally_packed(open_checkpoint(folder)), tally_packed(open_checkpoint(folder), open_checkpoint(model))
    for name, one in alone.items():
        assert (one.minus, one.zero, one.plus, one.after) == tuple(getattr(beside[name], key) for key in ("minus", "zero", "plus", "after"))
        assert one.error is one.before is one.lost is one.squares is None


def test_weights_that_are_ternary_lose_nothing():
    weight = torch.tensor([[0.25, -0.25, 0.25, 0.25], [-0.25, 0.25, 0.25, 0.25]] * 2)
    told = []
    list(packed(Scale(Tensor("F32", (4, 4), lambda: [bytes(weight.numpy().data)]), "w"), lambda *one: told.append(one[1])).chunks())
    assert (told[0].minus, told[0].zero, told[0].plus, told[0].error) == (4, 0, 12, 0.0)


def test_weights_of_zeros_lose_nothing():
    told = []
    list(packed(Scale(Tensor("F32", (4, 4), lambda: [bytes(64)]), "w"), lambda *one: told.append(one[1])).chunks())
    assert (told[0].zero, told[0].error) == (16, 0.0)


def test_layers_are_added_up(model, tmp_path):
    source = open_checkpoint(model)
    value = ternarize(source, rule=Rule(include=["lm_head"]) if "lm_head.weight" in source.tensors else Rule(include=["embed"]))
    folder = write(value, tmp_path / "packed")
    weights = load_file(model / "model.safetensors")
    found = by_layer(open_checkpoint(folder), tally_packed(open_checkpoint(folder), source))
    assert list(found) == [0, 1, 2, None]
    for layer in range(3):
        own = [weight for name, weight in weights.items() if f"layers.{layer}." in name and weight.ndim == 2]
        hands = [by_hand(weight) for weight in own]
        assert (found[layer].minus, found[layer].zero, found[layer].plus) == tuple(sum(one[0][i] for one in hands) for i in range(3))
        lost = sum((error * float(weight.double().norm())) ** 2 for (_, error), weight in zip(hands, own, strict=True))
        assert found[layer].error == pytest.approx((lost / sum(float(weight.double().norm()) ** 2 for weight in own)) ** 0.5, rel=1e-6)
        assert (found[layer].before, found[layer].after) == (sum(w.numel() * 4 for w in own), sum(w.numel() // 4 + 4 for w in own))
    total = add_up(found.values())
    assert total.weights == sum(one.weights for one in found.values()) and total.before == sum(one.before for one in found.values())


def test_where_one_source_is_unknown_so_is_the_sum():
    known, unknown = Tally(1, 2, 3, 10, 48, 0.5, 2.0), Tally(2, 2, 2, 10)
    assert add_up([known, unknown]) == Tally(3, 4, 5, 20) and add_up([known]) == known


def test_codes_that_are_no_ternary_weights_are_refused(model, tmp_path):
    folder = write(ternarize(open_checkpoint(model)), tmp_path / "packed")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] |= 0b11000000
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(DowncycleError, match=r"model.layers.2.mlp.up_proj.weight holds 1 codes that are no ternary weights; .*fetch"):
        tally_packed(open_checkpoint(folder))


def test_another_source_is_refused(model, tmp_path):
    folder = write(ternarize(open_checkpoint(model)), tmp_path / "packed")
    shutil.copytree(model, tmp_path / "other")
    tensors = load_file(model / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name][:-4].clone()}, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    with pytest.raises(DowncycleError, match=f"holds no {name} that .*packed can have been made from"):
        tally_packed(open_checkpoint(folder), open_checkpoint(tmp_path / "other"))


def test_a_model_that_is_not_packed_has_none(model):
    assert tally_packed(open_checkpoint(model)) == {}
    assert json.loads((model / "config.json").read_text()).get("quantization_config") is None

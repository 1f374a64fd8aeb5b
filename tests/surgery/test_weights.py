"""How many weights a checkpoint holds: four in each byte that holds ternary ones, whatever else is packed."""

import pytest

from downcycle import open_checkpoint
from downcycle.surgery.describe import describe
from downcycle.surgery.weights import is_inverse, num_parameters, ternary_matrices, weights_in

BITNET = {"quant_method": "bitnet", "modules_to_not_convert": ["lm_head"]}


@pytest.fixture
def pair(make, stored, tmp_path):
    """A model of two layers, and its shape with packed matrices."""
    make(tmp_path / "m", layers=2)
    names = [name for name in open_checkpoint(tmp_path / "m").tensors if "_proj" in name]
    shapes = {name: open_checkpoint(tmp_path / "m").tensors[name].shape for name in names}
    packed = {name: stored("U8", (rows // 4, columns)) for name, (rows, columns) in shapes.items()}
    scales = {f"{name}_scale": stored("F32", (1,)) for name in names}
    make(tmp_path / "p", layers=2, extra=packed | scales, config={"quantization_config": BITNET})
    return open_checkpoint(tmp_path / "m"), open_checkpoint(tmp_path / "p")


def test_a_packed_model_has_as_many_as_its_parent(pair):
    parent, packed = pair
    assert num_parameters(parent) == parent.num_elements == num_parameters(packed) > packed.num_elements
    assert list(ternary_matrices(packed)) == [name for name in parent.tensors if "_proj" in name] and ternary_matrices(parent) == {}
    assert {name: count for name, count in weights_in(packed).items() if not name.endswith("_scale")} == weights_in(parent)


def test_inspect_says_so(pair):
    parent, packed = (describe(one) for one in pair)
    assert (packed["elements"], packed["layer_elements"]) == (parent["elements"], parent["layer_elements"])
    assert packed["dtypes"]["U8"] == sum(parent["layer_elements"]) // 4 - 2 * 2 * 4 // 4  # numbers as they are stored; norms are not packed


def test_bytes_of_other_quantisers_are_numbers(make, stored, tmp_path):
    extra = {"model.layers.0.mlp.up_proj.weight": stored("U8", (2, 4)), "model.layers.0.mlp.up_proj.weight_scale": stored("F32", (1,))}
    make(tmp_path / "q", extra=extra, config={"quantization_config": {"quant_method": "other"}})
    checkpoint = open_checkpoint(tmp_path / "q")
    assert num_parameters(checkpoint) == checkpoint.num_elements and ternary_matrices(checkpoint) == {}


@pytest.mark.parametrize(
    ("linear", "inverse"), [({}, True), ({"linear_class": "bitlinear"}, True), ({"linear_class": "autobitlinear"}, False)]
)
def test_which_way_round_the_scales_are(linear, inverse):
    assert is_inverse({"quantization_config": BITNET | linear}) is inverse

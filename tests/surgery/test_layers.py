"""A cut keeps the bytes of the layers it names, in their new order, and nothing else changes."""

import json
from copy import deepcopy

import pytest

from downcycle import DowncycleError, keep_layers, open_checkpoint, write

FILES = ["chat_template.jinja", "config.json", "downcycle.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
CUTS = [[0, 1, 2], [3], [0, 5], [5, 0], [2, 2, 2], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 1, 2, 3, 4, 5]]


def as_bytes(checkpoint):
    return {name: (tensor.dtype, tensor.shape, b"".join(tensor.chunks())) for name, tensor in checkpoint.tensors.items()}


@pytest.mark.parametrize("kept", CUTS, ids=str)
@pytest.mark.parametrize("tied", [False, True], ids=["head", "tied"])
def test_a_cut_keeps_exactly_these_layers(make, cut_by_hand, read_back, tmp_path, kept, tied):
    tensors = make(tmp_path / "m", layers=6, shards=2, dtypes=("BF16", "F32"), tied=tied)
    expected = cut_by_hand(tensors, kept)
    child = keep_layers(open_checkpoint(tmp_path / "m"), kept)
    assert as_bytes(child) == expected
    assert child.num_layers == len(kept)
    write(child, tmp_path / "c")
    assert read_back(tmp_path / "c") == expected
    assert ("lm_head.weight" in expected) is not tied
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == sorted([*FILES, "model.safetensors"])


def test_the_config_differs_in_depth_alone(make, tmp_path):
    make(tmp_path / "m", layers=6, config={"rope_theta": 5e5, "x": [1, None, {"é": float("inf")}]})
    parent = open_checkpoint(tmp_path / "m")
    before = deepcopy(parent.config)
    child = keep_layers(parent, [0, 5])
    assert child.config == before | {"num_hidden_layers": 2}
    assert parent.config == before
    assert child.files == parent.files


def test_cutting_twice_is_cutting_once(make, tmp_path):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    once = keep_layers(parent, [1, 4])
    twice = keep_layers(keep_layers(parent, [0, 1, 3, 4]), [1, 3])
    assert as_bytes(once) == as_bytes(twice)
    assert once.config == twice.config
    assert twice.lineage["parent_lineage"]["layers"] == [0, 1, 3, 4]


def test_the_lineage_says_how_to_make_it_again(make, tmp_path):
    make(tmp_path / "m", layers=6)
    parent = open_checkpoint(tmp_path / "m")
    write(keep_layers(parent, [0, 2], "even"), tmp_path / "c")
    lineage = json.loads((tmp_path / "c" / "downcycle.json").read_text())
    assert lineage.pop("downcycle")
    assert lineage == {
        "parent": str(tmp_path / "m"),
        "revision": None,
        "fingerprint": parent.fingerprint,
        "parent_layers": 6,
        "layers": [0, 2],
        "rule": "even",
    }


@pytest.mark.parametrize(("kept", "says"), [([], "no layers to keep"), ([6], "layer 6 does not exist; .*6 layers"), ([0, -1], "layer -1")])
def test_layers_that_are_not_there(make, tmp_path, kept, says):
    make(tmp_path / "m", layers=6)
    with pytest.raises(DowncycleError, match=says):
        keep_layers(open_checkpoint(tmp_path / "m"), kept)


def test_a_config_that_states_more_layers_than_there_are(make, tmp_path):
    make(tmp_path / "m", layers=6, config={"num_hidden_layers": 7})
    with pytest.raises(DowncycleError, match=r"found no parts with the config's 7 numbered layers; numbered parts: model.layers.\* \(6\)"):
        keep_layers(open_checkpoint(tmp_path / "m"), [0])


STRANGE = [
    "../../etc/x",
    "model.layers",
    "model.layers.",
    "model.layers.x.y",
    "a\nb",
    "a\x00b",
    "🦙.0.x",
    "",
    " ",
    "model.layers.-1.x",
    "con.weight",
]


def test_strange_names_stay_as_they_are(make, stored, cut_by_hand, read_back, tmp_path):
    extra = {name: stored("I8", (3,), seed) for seed, name in enumerate(STRANGE)}
    extra |= {f"model.layers.{layer}.🦙\n../x": stored("U8", (2,), layer) for layer in range(4)}
    tensors = make(tmp_path / "m", extra=extra)
    write(keep_layers(open_checkpoint(tmp_path / "m"), [1, 3]), tmp_path / "c", max_shard_size=100)
    assert read_back(tmp_path / "c") == cut_by_hand(tensors, [1, 3])


@pytest.mark.parametrize("number", ["00", "9" * 5000, "٣"], ids=["00", "5000 digits", "Arabic"])
def test_numbers_that_no_model_has_lose_nothing(make, stored, cut_by_hand, tmp_path, number):
    """A tensor whose number is not spelled as numbers are belongs to no layer."""
    tensors = make(tmp_path / "m", extra={f"model.layers.{number}.mlp.down_proj.weight": stored("I8", (3,))})
    assert as_bytes(keep_layers(open_checkpoint(tmp_path / "m"), [0, 3])) == cut_by_hand(tensors, [0, 3])


@pytest.mark.parametrize("text", [b"[", b"\xff", b'"x"', b'{"a": {}}'])
@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_a_quantiser_file_is_read_with_care(make, tmp_path, name, text):
    make(tmp_path / "m")
    (tmp_path / "m" / name).write_bytes(text)
    parent = open_checkpoint(tmp_path / "m")
    try:
        json.loads(text)
    except ValueError:
        with pytest.raises(DowncycleError, match=f"{name}: not valid JSON"):
            keep_layers(parent, [0])
    else:
        assert keep_layers(parent, [0]).files[name] == parent.files[name]


# What a config may say by mistake or by malice: the cut is refused or right, never a traceback.
FIELDS = [
    "layer_types",
    "mlp_layer_types",
    "no_rope_layers",
    "mlp_only_layers",
    "moe_layers",
    "first_k_dense_replace",
    "num_kv_shared_layers",
]
FIELDS += ["quantization_config", "text_config", "decoder", "architectures", "rope_parameters", "max_window_layers"]


@pytest.mark.parametrize("value", [5, -1, "abc", True, [], [None], [[1]], ["a"] * 4, {}, {"layers": 5}, 1.5, 10**30], ids=repr)
@pytest.mark.parametrize("field", FIELDS)
def test_config_fields_of_the_wrong_type(make, tmp_path, field, value):
    make(tmp_path / "m", config={field: value})
    parent = open_checkpoint(tmp_path / "m")
    try:
        child = keep_layers(parent, [0, 3])
    except DowncycleError as refusal:
        assert "\n" not in str(refusal)
    else:
        assert child.num_layers == 2

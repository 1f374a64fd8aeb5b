"""Module names in a quantiser's config: renumbered, left alone or refused; never wrong."""

import pytest

from downcycle import DowncycleError
from downcycle.surgery.quantizer import packed_by, renumber_config, renumber_modules

MOVED = {0: [0], 2: [1], 5: [2, 3], 11: [4]}


@pytest.mark.parametrize(
    ("name", "becomes"),
    [
        ("lm_head", ["lm_head"]),
        ("model.layers.2.mlp", ["model.layers.1.mlp"]),
        ("model.layers.2", ["model.layers.1"]),
        ("model.layers.5.mlp", ["model.layers.2.mlp", "model.layers.3.mlp"]),
        ("model.layers.3.mlp", []),
        ("model.layers.1*", ["model.layers.4.*"]),
        ("model.layers.1*.mlp", ["model.layers.4.*.mlp", "model.layers.4.mlp"]),
        ("model.layers.*.mlp", ["model.layers.*.mlp"]),
        ("model.layers.2.block_sparse_moe.experts.0.w1", ["model.layers.1.block_sparse_moe.experts.0.w1"]),
        (r"-:model\.layers\.2\.mlp", [r"-:model\.layers\.1\.mlp"]),
        (r"re:.*layers\.2\..*experts\.0\.w1", [r"re:.*layers\.1\..*experts\.0\.w1"]),
        (r"re:.*layers\.[0-9]+\.mlp", [r"re:.*layers\.[0-9]+\.mlp"]),
        (r"re:.*layers\.\d+\.self_attn", [r"re:.*layers\.\d+\.self_attn"]),
        ("re:.*mlp.gate$", ["re:.*mlp.gate$"]),
        ("vision_tower.encoder.layers.3.self_attn", ["vision_tower.encoder.layers.3.self_attn"]),
        ("re:visual.*", ["re:visual.*"]),
    ],
)
def test_names(name, becomes):
    assert renumber_modules([name], "layers", MOVED) == becomes
    assert renumber_modules({name: {"bits": 8}}, "layers", MOVED) == dict.fromkeys(becomes, {"bits": 8})


@pytest.mark.parametrize(
    "name",
    [
        r"+:.*\.11\..*gate.*",
        "re:model.layers.1[0-9].mlp",
        r"re:.*\.layers\.1\d\..*",
        "layers.2|layers.3",
        r"(model\.layers\.2|model\.layers\.3)\.x",
        r"model\.layers\.(2|5)\.x",
        "model.layers.2-5",
    ],
)
def test_patterns_that_nobody_can_renumber_are_refused(name):
    with pytest.raises(DowncycleError, match="cannot be renumbered"):
        renumber_modules([name], "layers", MOVED)


def test_sections_and_other_values():
    inner = {"quantization_config": {"ignore": ["layers.2"], "bits": 4, "scheme": "layers.2", "groups": [{"targets": ["layers.0"]}]}}
    config = {"quantization_config": {"ignore": ["layers.3"]}, "text_config": inner, "num_hidden_layers": 12}
    renumber_config(config, "layers", MOVED)
    assert config["quantization_config"] == {"ignore": []}
    expected = {"ignore": ["layers.1"], "bits": 4, "scheme": "layers.2", "groups": [{"targets": ["layers.0"]}]}
    assert config["text_config"]["quantization_config"] == expected


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, ""),
        ({"quantization_config": None}, ""),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq"),
        ({"quantization_config": {"bits": 4}}, "a quantiser"),
        ({"quantization_config": "odd"}, "a quantiser"),
        ({"text_config": {"quantization_config": {"quant_method": "fp8"}}}, "fp8"),
    ],
)
def test_what_packed_a_model_is_named_by_its_config(config, name):
    assert packed_by({"model_type": "llama", **config}) == name

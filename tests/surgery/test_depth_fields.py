"""Each rule by hand: what a field of eight layers says of those that are kept, or the refusal. What models make of it: test_families.py."""

import math
import struct

import pytest

from downcycle import DowncycleError
from downcycle.surgery.depth_fields import Cut, cut_fields

KINDS = list("abcdefgh")


def cut(kept: list[int], **fields: object) -> dict:
    return cut_fields({"model_type": "some", **fields}, Cut(8, kept))


@pytest.mark.parametrize(
    ("fields", "kept", "expected"),
    [
        ({"layer_types": KINDS}, [0, 3, 7], {"layer_types": ["a", "d", "h"]}),
        ({"layer_types": KINDS}, [3, 3, 0], {"layer_types": ["d", "d", "a"]}),
        ({"compress_ratios": [0, 1, 2, 3, 4, 5, 6, 7, 99]}, [0, 7], {"compress_ratios": [0, 7, 99]}),  # the last is beyond the depth
        ({"hybrid_override_pattern": "abcdefgh"}, [1, 6], {"hybrid_override_pattern": "bg"}),
        ({"intermediate_size": 64}, [1, 6], {"intermediate_size": 64}),
        ({"intermediate_size": [1, 2, 3, 4, 5, 6, 7, 8]}, [1, 6], {"intermediate_size": [2, 7]}),
        ({"per_layer_config": {"02": {"x": 1}, "05": {"x": 2}}}, [0, 5], {"per_layer_config": {"1": {"x": 2}}}),
        ({"moe_layers": [1, 3, 5, 7]}, [0, 3, 7], {"moe_layers": [1, 2]}),
        ({"moe_layers": []}, [0, 3], {"moe_layers": []}),
        ({"first_k_dense_replace": 3}, [0, 2, 5], {"first_k_dense_replace": 2}),
        ({"mlp_only_layers": [2], "decoder_sparse_step": 2}, [1, 2, 3, 4], {"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}),
        ({"block_types": ["r", "r", "a"]}, [0, 2, 5, 7], {"block_types": ["r", "a", "a", "r"]}),
        ({"attention_types": [[["g", "l"], 4]]}, [0, 2, 3], {"attention_types": [[["g", "g", "l"], 1]]}),
        ({"linear_attn_config": {"kda_layers": [1, 4], "head_dim": 8}}, [3, 5], {"linear_attn_config": {"kda_layers": [1], "head_dim": 8}}),
        ({"moe_layer_freq": 1}, [3], {"moe_layer_freq": 1}),
        ({"ple_layer_ids": [2, 4, 7]}, [0, 1, 3], {"ple_layer_ids": [2, 3]}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [0, 1, 2, 3], {"attn_layer_period": 4, "attn_layer_offset": 2}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [1, 2, 5, 6], {"attn_layer_period": 2, "attn_layer_offset": 1}),
        ({"attn_layer_period": 4, "attn_layer_offset": 2}, [0, 1], {"attn_layer_period": 4, "attn_layer_offset": 2}),
        ({"attn_layer_period": 4, "attn_layer_offset": 0}, [1, 2], {"attn_layer_period": 3, "attn_layer_offset": 2}),
        ({"n_layers_per_attn_res_block": 4}, [0, 1, 4, 5], {"n_layers_per_attn_res_block": 2}),
    ],
)
def test_what_is_left_can_be_said(fields, kept, expected):
    found = cut(kept, **fields)
    assert {name: found[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("fields", "kept"),
    [
        ({"layer_types": KINDS[:7]}, [0]),
        ({"first_k_dense_replace": 2}, [4, 0]),
        ({"num_kv_shared_layers": 2, "layer_types": ["a"] * 8}, [0, 1, 6]),
        ({"num_kv_shared_layers": 2, "layer_types": ["a"] * 8}, [7, 0, 5]),
        ({"num_kv_shared_layers": 2, "layer_types": list("ababaaba")}, [4, 5, 6]),
        ({"scale_attn_by_inverse_layer_idx": True}, [0, 2]),
        ({"expert_layer_period": 2, "expert_layer_offset": 1}, [0, 1, 4, 5, 7]),
        ({"moe_layer_start_index": 0, "moe_layer_end_index": -1, "moe_layer_interval": 2}, [0, 1, 3, 4, 7]),
        ({"n_layers_per_attn_res_block": 4}, [1, 2]),
        ({"n_layers_per_attn_res_block": 4}, [0, 4, 5]),
        ({"ple_layer_ids": [2, 4, 7]}, [0, 3]),
        ({"indexer_types": ["full", "shared"] * 4}, [1, 2]),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(fields, kept):
    with pytest.raises(DowncycleError, match=f"some cannot be cut like this: .*({'|'.join(fields)})"):
        cut(kept, **fields)


def test_shared_keys_follow_their_source():
    kinds = list("ababaaba")  # layers 6 and 7 use the keys and values of layers 3 and 5
    assert cut([3, 5, 6, 7], num_kv_shared_layers=2, layer_types=kinds)["num_kv_shared_layers"] == 2
    assert cut([0, 3, 6], num_kv_shared_layers=2, layer_types=kinds)["num_kv_shared_layers"] == 1
    assert cut([0, 1], num_kv_shared_layers=2, layer_types=kinds)["num_kv_shared_layers"] == 0


@pytest.mark.parametrize("kept", range(1, 9))
def test_residuals_keep_their_scale(kept):
    scale = cut(list(range(kept)), scale_depth=1.4)["scale_depth"] / math.sqrt(kept)
    assert struct.pack("f", scale) == struct.pack("f", 1.4 / math.sqrt(8))


@pytest.mark.parametrize("start", [0, 1, 3])
@pytest.mark.parametrize("end", [-1, 5, 7])
@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3, 5, 7], [0, 4, 5], [2, 3, 6, 7], [0]])
def test_layers_with_experts_are_the_same_or_it_is_refused(start, end, interval, kept):
    def experts(depth: int, start: int, end: int, interval: int) -> list[bool]:
        last = depth - 1 if end == -1 else end
        return [(layer + 1) % interval == 0 and start <= layer <= last for layer in range(depth)]

    before = experts(8, start, end, interval)
    try:
        found = cut(kept, moe_layer_start_index=start, moe_layer_end_index=end, moe_layer_interval=interval)
    except DowncycleError as refusal:
        assert "moe_layer_interval" in str(refusal)
        return
    after = experts(len(kept), found["moe_layer_start_index"], found["moe_layer_end_index"], found["moe_layer_interval"])
    assert after == [before[layer] for layer in kept]

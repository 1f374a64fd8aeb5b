"""Which maps become ternary: those of decoder layers, but routers and experts; patterns widen and narrow it."""

import pytest

from downcycle import DowncycleError
from downcycle.surgery.ternary.rule import Rule

TAKEN = [
    "model.layers.0.self_attn.q_proj",
    "model.layers.31.mlp.gate_proj",
    "transformer.h.3.mlp.dense_4h_to_h",
    "model.language_model.layers.2.mlp.down_proj",
    "model.layers.4.mlp.shared_experts.up_proj",
    "model.layers.4.mlp.shared_expert.up_proj",
    "gpt_neox.layers.5.attention.query_key_value",
]
LEFT = [
    "lm_head",
    "model.embed_tokens",
    "model.norm",
    "model.layers.3.mlp.gate",
    "model.layers.3.block_sparse_moe.gate",
    "model.layers.3.block_sparse_moe.experts.7.w1",
    "model.layers.3.mlp.experts.gate_up_proj",
    "model.layers.3.mlp.shared_expert_gate",
    "model.layers.3.mlp.router",
    "model.layers.3.router.proj",
    "model.visual.blocks.0.attn.qkv",
    "vision_tower.encoder.layers.0.mlp.fc1",
]


@pytest.mark.parametrize("module", TAKEN)
def test_linear_maps_of_decoder_layers_are_taken(module):
    assert Rule().takes(module)


@pytest.mark.parametrize("module", LEFT)
def test_all_else_is_left(module):
    assert not Rule().takes(module)


def test_patterns_narrow_and_widen():
    assert not Rule(exclude=["down_proj$"]).takes("model.layers.0.mlp.down_proj")
    assert Rule(exclude=["down_proj$"]).takes("model.layers.0.mlp.up_proj")
    assert Rule(include=["^lm_head$"]).takes("lm_head")
    assert not Rule(include=["lm_head"], exclude=["head"]).takes("lm_head")
    assert not Rule(exclude=[r"layers\.(0|31)\."]).takes("model.layers.31.mlp.up_proj")
    assert Rule(exclude=[r"layers\.(0|31)\."]).takes("model.layers.30.mlp.up_proj")


def test_what_no_program_runs_is_never_taken():
    for module in ("model.embed_tokens", "model.layers.3.mlp.gate", "model.layers.3.block_sparse_moe.experts.7.w1", "transformer.wte"):
        assert not Rule(include=["."]).takes(module)
    assert Rule(include=["."]).takes("lm_head")


def test_patterns_that_do_nothing():
    names = ["lm_head", "model.embed_tokens", "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate"]
    assert Rule(["^lm_head$"], ["up_proj"]).idle(names) == []
    assert Rule(["embed", "up_proj"], ["down_proj"]).idle(names) == ["embed", "down_proj"]
    assert Rule(["head"], ["head"]).idle(names) == ["head"]


@pytest.mark.parametrize("patterns", [{"include": ["*proj"]}, {"exclude": ["(up"]}])
def test_what_is_no_pattern_is_refused(patterns):
    with pytest.raises(DowncycleError, match=r"is no regular expression \("):
        Rule(**patterns)

"""Each family in real llama.cpp against transformers: the probabilities of the next token, after short and long prompts."""

import json
from dataclasses import replace

import pytest

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
pytest.importorskip("xllamacpp")

import numpy as np  # noqa: E402

from downcycle.surgery.checkpoint import open_checkpoint  # noqa: E402
from downcycle.surgery.choose import first  # noqa: E402
from downcycle.surgery.errors import DowncycleError  # noqa: E402
from downcycle.surgery.gguf.architectures import ARCHITECTURES, STATED, metadata, whole_config  # noqa: E402
from downcycle.surgery.gguf.export import write_gguf  # noqa: E402
from downcycle.surgery.gguf.general import general_fields  # noqa: E402
from downcycle.surgery.gguf.tensors import LAYERS  # noqa: E402
from downcycle.surgery.layers import keep_layers  # noqa: E402
from downcycle.surgery.model import load_model  # noqa: E402
from downcycle.surgery.write import write  # noqa: E402

import llama_cpp  # noqa: E402

LLAMA31 = {
    **{"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
EXPERTS = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 16}
GEMMA = {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 8}
SCALES = {"attention_multiplier": 0.1, "embedding_multiplier": 3.0, "residual_multiplier": 0.5, "logits_scaling": 2.0}
TIED = {"tie_word_embeddings": True}
TURNED = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
EXACT, GELU = 1e-4, 1e-2  # llama.cpp looks GELU up in a table of float16
CASES = {
    "llama": ("llama", {}, EXACT),
    "llama, biases, tied, wide heads": (
        "llama",
        {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "head_dim": 32},
        EXACT,
    ),
    "llama 3.1": ("llama", {"rope_parameters": LLAMA31}, EXACT),
    "llama, linear": ("llama", {"rope_parameters": LINEAR}, EXACT),
    "llama, yarn": ("llama", {"rope_parameters": YARN}, EXACT),
    "llama, yarn with a factor": ("llama", {"rope_parameters": {**YARN, "attention_factor": 1.3}}, EXACT),
    "mistral": ("mistral", {"sliding_window": 128, "head_dim": 16}, EXACT),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": None}, EXACT),
    "qwen2": ("qwen2", {}, EXACT),
    "qwen3": ("qwen3", {"head_dim": 32}, EXACT),
    "qwen3_moe": ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True}, EXACT),
    "qwen2_moe": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 48}, EXACT),
    "gemma": ("gemma", {"head_dim": 32}, GELU),
    "gemma2": ("gemma2", GEMMA, GELU),
    "gemma2, layers cut out": ("gemma2", {**GEMMA, "sliding_window": 128, "layer_types": TURNED}, GELU),
    "gemma3_text": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7}, GELU),
    "phi3": ("phi3", {}, EXACT),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": 4}, GELU),
    "starcoder2": ("starcoder2", {"sliding_window": None}, GELU),
    "olmo2": ("olmo2", {}, EXACT),
    "smollm3": ("smollm3", {}, EXACT),
    "arcee": ("arcee", {}, EXACT),
    "seed_oss": ("seed_oss", {"head_dim": 16}, EXACT),
    "granite": ("granite", SCALES, EXACT),
    "stablelm": ("stablelm", {}, EXACT),
    "granite, biases": ("granite", {**SCALES, "attention_bias": True, "mlp_bias": True}, EXACT),
    "seed_oss, no biases": ("seed_oss", {"head_dim": 16, "attention_bias": False}, EXACT),
    "gemma3_text, not tied": ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "tie_word_embeddings": False}, GELU),
    "phi3, tied": ("phi3", TIED, EXACT),
    "gpt_neox, tied": ("gpt_neox", {**TIED, "num_key_value_heads": 4}, GELU),
    "olmo2, tied": ("olmo2", TIED, EXACT),
    "qwen2_moe, tied, no biases": ("qwen2_moe", {**TIED, **EXPERTS, "shared_expert_intermediate_size": 48, "qkv_bias": False}, EXACT),
    "stablelm, tied": ("stablelm", TIED, EXACT),
    "qwen3, tied": ("qwen3", {**TIED, "head_dim": 32}, EXACT),
    "stablelm, parallel": ("stablelm", {"use_parallel_residual": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5}, EXACT),
}
PROMPTS = [np.random.default_rng(3).integers(10, 4000, length).tolist() for length in (5, 120)]


@pytest.mark.parametrize("name", CASES)
def test_llama_cpp_computes_what_transformers_does(saved, scores, name, tmp_path, quiet):
    family, fields, tolerance = CASES[name]
    model, folder = saved(family, **fields)
    file = tmp_path / "model.gguf"
    write_gguf(open_checkpoint(folder), file, "f32")
    found = np.array(llama_cpp.run(file, PROMPTS, 4096)["scores"])
    expected = np.array(scores(model, PROMPTS))
    assert expected.std() > 0.5
    assert np.abs(found - expected).max() < tolerance


def test_every_family_is_tried():
    assert {family for family, _, _ in CASES.values()} == set(ARCHITECTURES) == set(LAYERS)


@pytest.mark.parametrize("name", ["phi3", "My-Phi-3-mini"])
def test_a_name_changes_nothing(name, saved, scores, tmp_path, quiet):
    """llama.cpp handles the tokens of a model so named as Phi-3's, and breaks off where those are missing."""
    model, folder = saved("llama", name)
    write_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f32")
    found = np.array(llama_cpp.run(tmp_path / "model.gguf", PROMPTS[:1], 4096)["scores"])
    assert np.abs(found - np.array(scores(model, PROMPTS[:1]))).max() < EXACT


def test_only_a_phi3_is_called_so():
    demo = open_checkpoint("demo")
    named = replace(demo, name="MS/Phi-3-mini")
    phi3 = replace(named, config={**demo.config, "model_type": "phi3"})
    tokens = ["</s>", "<unk>", "<s>", "<|endoftext|>", "a"]
    names = [general_fields(model, 1, tokens)["name"] for model in (named, phi3, demo)]
    assert names == ["Phi_3-mini", "Phi-3-mini", "demo"]
    assert general_fields(phi3, 1, tokens[1:])["name"] == "Phi_3-mini"


@pytest.mark.parametrize("count", [9, 12])
def test_the_built_in_model_and_its_child_run(count, scores, tmp_path, quiet):
    parent = open_checkpoint("demo")
    child = keep_layers(parent, first(12, count))
    write(child, tmp_path / "child")
    write_gguf(open_checkpoint(tmp_path / "child"), tmp_path / "child.gguf", "f32")
    found = np.array(llama_cpp.run(tmp_path / "child.gguf", PROMPTS, 4096)["scores"])
    expected = np.array(scores(load_model(child, dtype=torch.float32), PROMPTS))
    assert np.abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("family", STATED)
def test_a_config_that_states_all_is_read_as_transformers_reads_it(family, saved, quiet):
    fields = next(fields for name, fields, _ in CASES.values() if name == family)
    _, folder = saved(family, **fields)
    model = open_checkpoint(folder)
    config = whole_config(model)
    assert "_name_or_path" not in config and set(config) <= set(model.config) | {"rope_parameters"}  # transformers was not asked
    short = json.loads((folder / "config.json").read_text())
    del short["max_position_embeddings"]  # now it is asked, and finds its default
    (folder / "config.json").write_text(json.dumps(short))
    asked = whole_config(open_checkpoint(folder))
    asked["max_position_embeddings"] = config["max_position_embeddings"]
    assert metadata(ARCHITECTURES[family], config) == metadata(ARCHITECTURES[family], asked)


@pytest.mark.parametrize(
    ("family", "fields", "says"),
    [
        ("opt", {}, "opt is no family whose GGUF was verified"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act is 'gelu', and llama.cpp runs llama with 'silu' or 'swish' only"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "rope_type dynamic"),
        ("llama", {"rope_parameters": {**YARN, "beta_fast": 16.0}}, "other betas"),
        ("gemma2", {**GEMMA, "query_pre_attn_scalar": 7}, "query_pre_attn_scalar is 7"),
        ("gemma3_text", {**GEMMA, "layer_types": TURNED}, "layer_types"),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": False}, "norm_topk_prob is False"),
        ("qwen3_moe", {**EXPERTS, "norm_topk_prob": True, "mlp_only_layers": [1]}, "mlp_only_layers"),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers"),
        ("starcoder2", {"use_bias": False}, "use_bias"),
        ("gemma", {"head_dim": 32, "attention_bias": True}, r"no place for model.layers.\d.self_attn.\w_proj.bias in the family gemma"),
        ("gemma2", {**GEMMA, "attention_bias": True}, "no place for .* in the family gemma2"),
        ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "attention_bias": True}, "no place for .* in the family gemma3_text"),
        ("arcee", {"attention_bias": True}, "no place for .* in the family arcee"),
        ("arcee", {"mlp_bias": True}, "no place for .* in the family arcee"),
        ("smollm3", {"attention_bias": True}, "no place for .* in the family smollm3"),
        ("smollm3", {"mlp_bias": True}, "no place for .* in the family smollm3"),
        ("seed_oss", {"head_dim": 16, "attention_out_bias": True}, "no place for .*o_proj.bias in the family seed_oss"),
        ("seed_oss", {"head_dim": 16, "mlp_bias": True}, "no place for .* in the family seed_oss"),
        ("gpt_neox", {"num_key_value_heads": 4, "attention_bias": False}, "needs blk.0.attn_qkv.bias, which is not there"),
        ("gemma", {"head_dim": 32, "tie_word_embeddings": False}, "no place for lm_head.weight"),
        ("llama", {"partial_rotary_factor": 0.5}, r"turns only 50% of each head \(partial_rotary_factor\)"),
        ("qwen2", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("phi3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "use_bidirectional_attention": True}, "use_bidirectional_attention is True"),
        ("gemma3_text", {**GEMMA, "num_hidden_layers": 7, "attn_logit_softcapping": 5.0}, "attn_logit_softcapping is 5.0"),
        ("gemma2", {**GEMMA, "attn_logit_softcapping": None}, "has attn_logit_softcapping 'None', where a number is needed"),
        ("gemma2", {**GEMMA, "final_logit_softcapping": None}, "has final_logit_softcapping 'None', where a number is needed"),
    ],
)
def test_what_its_graph_lacks_is_refused(family, fields, says, saved, tmp_path, quiet):
    if family == "opt":
        _, folder = saved("llama")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "opt"}))
    else:
        _, folder = saved(family, **fields)
    with pytest.raises(DowncycleError, match=says):
        write_gguf(open_checkpoint(folder), tmp_path / "model.gguf", "f32")
    assert list(tmp_path.iterdir()) == []

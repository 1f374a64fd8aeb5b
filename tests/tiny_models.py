"""Tiny random models of every causal-LM family of the installed transformers: 8 layers, each of which matters.

A config class says which of its fields are sizes by their names; the tables below say the rest. Knows nothing of the package.
"""

from __future__ import annotations

import dataclasses
import os
import re
from copy import deepcopy
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

Config = dict[str, Any]
NEW = tuple(int(part) for part in transformers.__version__.split(".")[:2]) >= (5, 23)  # before, Zamba 2's blocks were told apart by layer
FAMILIES: dict[str, str] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
KINDS_OF_MODEL = ("TEXT_TO_WAVEFORM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "CAUSAL_LM")  # the whole before its text part
DEPTH, VOCAB, TOKENS = 8, 96, 13

SIZES: list[tuple[int, str]] = [
    (DEPTH, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers num_encoder_layers depth"),
    (DEPTH, "conf_num_hidden_layers num_blocks"),
    (VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size shape_vocab_size"),
    (VOCAB, "audio_vocab_size encoder_hash_byte_group_vocab"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length original_max_position_embeddings rel_extent prompt_length"),
    (
        64,
        "max_target_positions max_source_positions model_max_length attention_hidden_size num_position_embeddings position_embedding_size",
    ),
    (48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim n_inner d_inner dff dim_ff d_ff ffn_hidden_size feed_forward_size"),
    (48, "intermediate_size_mlp dense_intermediate_size mlp_dim prompt_mid_dim prefix_dense_intermediate_size"),
    (32, "hidden_size d_model n_embd embedding_dim embedding_size emb_dim word_embed_proj_dim dim_model input_embedding_size lru_width"),
    (32, "output_embedding_size hidden_size_global text_hidden_size out_hidden_size vision_output_dim projector_input_dim image_size"),
    (32, "projector_output_dim output_channels adapter_in_dim adapter_out_dim adapter_input_size pronunciation_embed_dim shape_embed_dim"),
    (32, "ple_embed_dim backbone_hidden_size dim_model_base crop_size nemo_conv_channels ext_pw_out_channel"),
    (32, "depthwise_separable_out_channel classifier_proj_size base_channels"),
    (24, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size shared_experts_intermediate_size"),
    (24, "expert_ffn_hidden_size moe_shared_expert_intermediate_size"),
    (16, "q_lora_rank kv_lora_rank qk_head_dim o_lora_rank d_rel hc_lowrank adapter_rank router_hidden_size mamba_d_head laurel_rank"),
    (16, "mamba_headdim gated_norm_rank patch_size attention_head_dim num_mel_bins embed_dim_vq codebook_size lambda_std_dim"),
    (8, "head_dim d_head dim_head kv_channels attention_head_size d_kv qk_nope_head_dim qk_rope_head_dim v_head_dim index_head_dim"),
    (8, "linear_key_head_dim linear_value_head_dim linear_head_dim mamba_head_dim swa_head_dim swa_v_head_dim query_pre_attn_scalar"),
    (8, "rotary_dim mamba_d_state state_size ssm_state_size time_step_rank mamba_dt_rank chunk_size mamba_chunk_size block_size"),
    (8, "hidden_size_per_layer_input block_multiple_of ffn_round_up_to_multiple_of index_block_size"),
    (4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads num_experts"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads linear_num_heads linear_num_key_heads"),
    (4, "mamba_n_heads mamba_num_heads swa_num_attention_heads num_query_groups n_routed_experts num_local_experts moe_num_experts"),
    (4, "sliding_window sliding_window_size attention_window_size window_size local_attention attention_chunk_size index_topk"),
    (4, "zero_expert_num conf_num_attention_heads num_codebooks"),
    (2, "num_key_value_heads n_head_kv num_kv_heads swa_num_key_value_heads index_n_heads num_experts_per_tok moe_k moe_topk"),
    (2, "index_topk_blocks"),
    (2, "top_k_experts num_experts_per_token num_kv_shared_layers first_k_dense_replace num_dense_layers num_global_layers"),
    (1, "n_group topk_group n_groups mamba_n_groups"),
]
SMALL: Config = {name: size for size, names in SIZES for name in names.split()}
LINEAR, FULL, SLIDING = "linear_attention", "full_attention", "sliding_attention"
TWO_KINDS = [FULL, SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL]
SPARSE = ["dense", "sparse", "dense", "sparse", "sparse", "dense", "sparse", "sparse"]
HYBRID = [LINEAR, "hybrid", LINEAR, "hybrid", "hybrid", LINEAR, "hybrid", LINEAR]

# What a family's class needs beside small sizes, and patterns in place of defaults under which all layers are alike.
OVERRIDES: dict[str, Config] = {
    "bailing_hybrid": {"layer_group_size": 3},
    "bamba": {"attn_layer_indices": [2, 5], "mamba_d_head": 16},
    "big_bird": {"attention_type": "original_full"},
    "bloom": {"n_layer": DEPTH},
    "blt_global_transformer": {"num_hidden_layers": DEPTH},
    "cohere2_moe": {"first_k_dense_replace": 2, "prefix_dense_intermediate_size": 48},
    "cohere_compass_text": {
        "layer_types": TWO_KINDS,
        "rope_parameters": {FULL: {"rope_type": "default", "rope_theta": 10000.0}, SLIDING: {"rope_type": "default", "rope_theta": 100.0}},
    },
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"sliding_window": 4},
    "dots1": {"max_window_layers": 3, "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_head_dim": 16,
        "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
    },
    "encodec": {"num_filters": 4, "codebook_dim": 32},
    "ernie4_5_moe": {"moe_layer_start_index": 1, "moe_layer_end_index": -1},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], DEPTH // 2]]},
    "gemma4_text": {"global_head_dim": 16},
    "gemma4_unified_text": {"global_head_dim": 16},
    "glm_moe_dsa": {"indexer_types": ["full", "full", "shared", "full", "shared", "shared", "full", "shared"]},
    "granite_swa": {"layer_rope_theta": [0, 1e4, 1e4, 1e4, 0, 1e4, 1e4, 100.0]},
    "granitemoe_swa": {"layer_rope_theta": [0, 1e4, 1e4, 1e4, 0, 1e4, 1e4, 100.0]},
    "granitemoehybrid": {"layer_types": [LINEAR, LINEAR, FULL, LINEAR, FULL, LINEAR, LINEAR, FULL]},
    "hrm_text": {"H_cycles": 1, "L_cycles": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8, "num_experts": 4, "moe_topk": [1, 2, 1, 2, 2, 1, 2, 1]},
    "inkling_text": {"dense_mlp_idx": 2},
    "inkling2_text": {"n_layers_per_attn_res_block": 3},
    "jamba": {"attn_layer_period": 4, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": [LINEAR, FULL, LINEAR, LINEAR, FULL, LINEAR, LINEAR, FULL]},
    "laguna": {"layer_types": TWO_KINDS, "num_attention_heads_per_layer": [4, 8, 4, 8, 8, 4, 4, 8]},
    "lfm2": {"full_attn_idxs": [2, 4, 7]},
    "lfm2_moe": {"layer_types": ["conv", "conv", FULL, "conv", FULL, "conv", "conv", FULL]},
    "longcat_flash": {"expert_ffn_hidden_size": 24},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "mellum": {"layer_types": TWO_KINDS, "mlp_layer_types": SPARSE},
    "minimax_m3_vl_text": {
        "layer_types": [FULL, "minimax_m3_sparse", FULL, "minimax_m3_sparse", "minimax_m3_sparse", FULL, "minimax_m3_sparse", FULL],
        "mlp_layer_types": SPARSE,
    },
    "ministral": {"head_dim": 8},
    "mllama_text_model": {"cross_attention_layers": [1, 4, 6]},
    "mpt": {"max_seq_len": 64},
    "modernbert-decoder": {"layer_types": [FULL, SLIDING] * (DEPTH // 2)},
    "moshi": {"sliding_window": 64},
    "nemotron": {"num_key_value_heads": 2},
    "nemotron_h": {"layers_block_type": [LINEAR, "moe", FULL, "mlp", FULL, "moe", LINEAR, "moe"]},
    "qwen2": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 3},
    "qwen2_moe": {
        "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 5, "mlp_only_layers": [3], "decoder_sparse_step": 2,
    },
    "qwen3_moe": {"mlp_only_layers": [3], "decoder_sparse_step": 2},
    "qwen3_next": {"mlp_only_layers": [1], "layer_types": [LINEAR, FULL] * (DEPTH // 2)},
    "qwen4_exp_text": {
        "ple_layer_ids": [2, 7], "ngram_vocab_size_base": 50, "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
        "indexer_budget": 8, "indexer_compress_ratio": 4, "make_ngram_vocab_size_divisible_by": 8,
    },
    "reformer": {
        "attn_layers": ["local", "lsh"] * (DEPTH // 2), "axial_pos_shape": [8, 8], "axial_pos_embds_dim": [8, 24],
        "local_attn_chunk_length": 4, "lsh_attn_chunk_length": 4, "num_buckets": 4, "hash_seed": 0, "head_dim": 8,
    },
    "rwkv": {"attention_hidden_size": 32},
    "smollm3": {"use_sliding_window": True, "sliding_window": 4},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"layers_block_type": HYBRID},
    "zamba2": {
        "layers_block_type": HYBRID, "num_mem_blocks": 2 if NEW else 1, "num_key_value_heads": 4, "use_shared_attention_adapter": True,
    },
    "zaya": {"layer_types": ["hybrid", "hybrid_sliding"] * (DEPTH // 2), "sliding_window": 4, "num_experts_per_tok": 1},
}  # fmt: skip
# Further models of a family, which its fields make another case.
VARIANTS: dict[str, tuple[str, Config]] = {
    **{  # with a small index, transformers' own cached generation differs
        f"{family}, index_topk 64": (family, {"index_topk": 64})
        for family in ("axk2", "deepseek_v32", "dots3_note_text", "glm_moe_dsa", "hy_v4")
        if family in FAMILIES
    },
    "ernie4_5_moe, moe_layer_interval 2": ("ernie4_5_moe", {"moe_layer_interval": 2}),
    "gemma4_text, use_double_wide_mlp": ("gemma4_text", {"use_double_wide_mlp": True}),
    "gpt2, scale_attn_by_inverse_layer_idx": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    "jamba, expert_layer_period 1": ("jamba", {"expert_layer_period": 1, "expert_layer_offset": 0}),
    "zamba2, num_mem_blocks 1": ("zamba2", {"num_mem_blocks": 1}),
}
# Configs whose defaults the class itself refuses, or that leave a tower out.
ASSISTANT = {"num_hidden_layers": DEPTH, "num_kv_shared_layers": DEPTH}
SOUND: Config = {"text_encoder": {"model_type": "t5"}, "audio_encoder": {"model_type": "encodec"}}
EXPERTS_IN_VISION: Config = {"mlp_layer_types": SPARSE, "num_hidden_layers": DEPTH, "per_layer_config": {"3": {"num_local_experts": 2}}}
NOTHING_PER_LAYER = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
STARTS: dict[str, Config] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "dots3_note": {"vision_config": EXPERTS_IN_VISION},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|extra_200|>": 91, "<|visual token 000000|>": 92}},
    "gemma4": {"vision_config": {"model_type": "gemma4_vision"}},
    "gemma4_unified": {"vision_config": {"model_type": "gemma4_unified_vision", "mm_embed_dim": 32, "mm_posemb_size": 16}},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", **NOTHING_PER_LAYER, **ASSISTANT}},
    "gemma4_unified_assistant": {"text_config": {"model_type": "gemma4_unified_text", **ASSISTANT}},
    "musicgen": {**SOUND, "decoder": {"model_type": "musicgen_decoder"}},
    "musicgen_melody": {**SOUND, "decoder": {"model_type": "musicgen_melody_decoder"}},
}  # fmt: skip


def tiny_config(name: str) -> PreTrainedConfig:
    """Return a config of a family (or variant) with small sizes, 8 layers, and in every tower as many layers as in the decoder."""
    model_type, special = VARIANTS.get(name, (name, {}))
    config_class = CONFIG_MAPPING[model_type]
    start = deepcopy(STARTS.get(model_type, {}))  # a config class may take its arguments apart
    return config_class(**_merged(_shrunk(config_class(**deepcopy(start))), {**start, **special}))


def _merged(under: Config, over: Config) -> Config:
    both = {name: _merged(under[name], over[name]) for name in under.keys() & over.keys() if isinstance(under[name], dict)}
    return {**under, **over, **both}


def _shrunk(config: PreTrainedConfig) -> Config:
    """Return the arguments that make a small config of the same class."""
    small: Config = {}
    values = vars(config)
    names = {field.name for field in dataclasses.fields(config)}
    for name in sorted(names):
        value = values.get(config.attribute_map.get(name, name))
        if isinstance(value, PreTrainedConfig):
            small[name] = {**_shrunk(value), "model_type": value.model_type}
        elif name in SMALL and value and not isinstance(value, bool | str):
            small[name] = SMALL[name]
    if "kv_lora_rank" in names and values.get("num_key_value_heads"):
        small["num_key_value_heads"] = SMALL["num_attention_heads"]
    if "is_decoder" in names:
        small["is_decoder"] = True
    return {**small, **_special_tokens(names, values), **OVERRIDES.get(config.model_type, {})}


def _special_tokens(names: set[str], values: Config) -> Config:
    """Put every special token inside the small vocabulary: the text's own at its start, the others at its end."""
    common = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2, "decoder_start_token_id": 1}
    others = sorted(name for name in names - set(common) if re.search("token_(id|index)$", name) and type(values.get(name)) is int)
    return {**{name: common[name] for name in names & set(common)}, **{name: VOCAB - 1 - i for i, name in enumerate(others)}}


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class that a checkpoint of this family holds: with its towers, where the family has any."""
    names = (getattr(modeling_auto, f"MODEL_FOR_{kind}_MAPPING_NAMES", {}).get(config.model_type) for kind in KINDS_OF_MODEL)
    classes = [getattr(transformers, name) for name in names if name]
    return next((found for found in classes if found.config_class is type(config)), classes[-1])


def tiny_model(name: str) -> PreTrainedModel:
    """Return a random model of a family (or variant)."""
    config = tiny_config(name)
    found = model_class(config)
    torch.manual_seed(0)
    if not isinstance(config, found.config_class):
        config = config.get_text_config(decoder=True)
    model = found(config).float().eval()
    _randomise(model)
    return model


def stand_in_for_timm() -> None:
    """Give Gemma 3n a vision tower of torch's own layers, since the real one is timm's; all else of it stays stock."""
    from transformers.models.gemma3n import modeling_gemma3n

    class Towers:
        @staticmethod
        def from_config(config: PreTrainedConfig) -> nn.Module:
            return Tower() if config.model_type == "gemma3n_vision" else transformers.AutoModel.from_config(config)

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(DEPTH))

    modeling_gemma3n.AutoModel = Towers


def _randomise(model: PreTrainedModel) -> None:
    """Matrices from N(0, 0.15), vectors moved by N(0, 0.1); of the buffers only biases and hash tables."""
    random = torch.Generator().manual_seed(1)

    def normal(tensor: Tensor, std: float) -> Tensor:
        return torch.randn(tensor.shape, generator=random) * std

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.copy_(normal(parameter, 0.15) if parameter.ndim > 1 else parameter + normal(parameter, 0.1))
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.randint(0, SMALL["n_routed_experts"], buffer.shape, generator=random))
            elif re.search("bias(es)?$", name) and buffer.is_floating_point():
                buffer.add_(normal(buffer, 0.1))


def inputs(model: PreTrainedModel) -> Config:
    """Return what the forward of this model takes."""
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(10, 60, (1, TOKENS), generator=random)
    kind = model.config.model_type
    if kind in ("musicgen", "musicgen_melody"):
        return {"input_ids": ids, "decoder_input_ids": torch.randint(10, 60, (4, TOKENS), generator=random)}
    if kind == "mllama":
        return {"input_ids": ids, "cross_attention_states": torch.randn(1, 5, 32, generator=random)}
    if kind.endswith("_assistant"):
        text = model.config.get_text_config()
        heads = {layer_type: text.per_layer_config[layer_type] for layer_type in set(text.layer_types)}
        shapes = {key: (1, of.num_key_value_heads, TOKENS, of.head_dim) for key, of in sorted(heads.items())}
        states = {key: (torch.randn(shape, generator=random), torch.randn(shape, generator=random)) for key, shape in shapes.items()}
        return {
            "inputs_embeds": torch.randn(1, 1, 2 * model.config.backbone_hidden_size, generator=random),
            "position_ids": torch.tensor([[TOKENS]]),
            "shared_kv_states": states,
        }
    return {"input_ids": ids}


def logits(model: PreTrainedModel) -> Tensor:
    """Run a model without a cache: [1, tokens, vocabulary]."""
    assistant = model.config.model_type.endswith("_assistant")
    with torch.no_grad():
        return model(**inputs(model), **({} if assistant else {"use_cache": False})).logits

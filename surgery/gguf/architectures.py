"""What llama.cpp must be told of a model, family by family: its name for the architecture, the metadata, and the order of rows.

Works on configs and names; reads no weight. A family is here once its logits in llama.cpp were compared with those of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checkpoint import Checkpoint
from ..errors import DowncycleError
from ..families import read_config
from ..quantizer import packed_by
from .numbers import number, whole
from .rope import rope_fields, rotary_part, stated_rope

Config = dict[str, Any]
Fields = dict[str, Any]

SLIDING = "sliding_attention"
PART = ("gpt_neox", "stablelm")  # where a part of each head's dimensions may be turned
NEEDED = "hidden_size intermediate_size vocab_size num_hidden_layers num_attention_heads max_position_embeddings"
OTHERS = "num_key_value_heads head_dim sliding_window num_local_experts num_experts num_experts_per_tok moe_intermediate_size"
OTHERS += " shared_expert_intermediate_size"


def _nothing(config: Config) -> Fields:
    return {}


@dataclass(frozen=True)
class Architecture:
    """name: llama.cpp's. rotated: it turns neighbours by RoPE, and so wants q's and k's rows in another order. add: to each norm's weight.

    fields: metadata beyond what all have. agrees: settings that its graph takes for granted, and what they are by its reckoning; a tuple
    lists several. period: one in so many layers sees everything, and the others a sliding window; 0 where its graph slides none.
    """

    name: str
    rotated: bool = False
    add: float = 0.0
    fields: Callable[[Config], Fields] = _nothing
    agrees: Callable[[Config], Fields] = _nothing
    period: int = 0


def architecture(model: Checkpoint) -> tuple[Architecture, Config]:
    """Return what llama.cpp calls this model, and its config with all that config.json leaves to its class.

    Raises:
        DowncycleError: a family that is not known here, or a setting that llama.cpp's graph of it does not have.
    """
    family = str(model.config.get("model_type"))
    if family not in ARCHITECTURES:
        raise DowncycleError(
            f"{model.name}: {family} is no family whose GGUF was verified in llama.cpp; those are {', '.join(ARCHITECTURES)}"
        )
    config, found = _checked(whole_config(model)), ARCHITECTURES[family]
    for name, needed in {**found.agrees(config), "use_bidirectional_attention": False}.items():
        if config.get(name) not in (needed if isinstance(needed, tuple) else (needed, None)):
            wanted = " or ".join(map(repr, needed)) if isinstance(needed, tuple) else repr(needed)
            raise DowncycleError(f"{model.name}: {name} is {config.get(name)!r}, and llama.cpp runs {family} with {wanted} only")
    if rotary_part(config) != 1 and family not in PART:
        raise DowncycleError(
            f"{model.name}: turns only {rotary_part(config):.0%} of each head (partial_rotary_factor), and llama.cpp all of it"
        )
    if packed_by(model.config) not in ("", "bitnet"):
        raise DowncycleError(f"{model.name}: its weights are packed by {packed_by(model.config)}; give the model as it was before")
    return found, config


def whole_config(model: Checkpoint) -> Config:
    """Return config.json with all that it leaves to its class; transformers, whose import takes seconds and memory, is asked only then."""
    config = model.config
    if all(name in config for name in STATED.get(str(config.get("model_type")), "unknown").split()) and (rope := stated_rope(config)):
        return {**config, "rope_parameters": rope}
    known = read_config(config)
    if known is None:
        raise DowncycleError(f"{model.name}: transformers refuses its config.json; mend it")
    whole: Config = known.to_dict()
    return whole


def _checked(config: Config) -> Config:
    """Return a config whose counts are whole numbers; those that are 0 or null are left as they are where a family can do without."""
    names = [*NEEDED.split(), *(name for name in OTHERS.split() if config.get(name))]
    return {**config, **{name: whole(config, name) for name in names}}


def metadata(arch: Architecture, config: Config) -> Fields:
    """Return the metadata of an architecture by key, without its name in front; whole numbers are uint32, others float32.

    Raises:
        DowncycleError: a rope that llama.cpp does not have.
    """
    heads, width = config["num_attention_heads"], config["hidden_size"]
    head = config.get("head_dim") or width // heads
    fields = {
        "block_count": config["num_hidden_layers"],
        "context_length": _context(arch, config),
        "embedding_length": width,
        "feed_forward_length": config["intermediate_size"],
        "vocab_size": config["vocab_size"],
        "attention.head_count": heads,
        "attention.head_count_kv": config.get("num_key_value_heads") or heads,
        "attention.key_length": head,
        "attention.value_length": head,
        **_epsilon(config),
        **rope_fields(config, head),
        **({"attention.sliding_window": config["sliding_window"]} if arch.period else {}),
    }
    return {**fields, **arch.fields(config)}


def window_note(arch: Architecture, config: Config) -> str:
    """Say that the context was shortened to a sliding window that llama.cpp does not apply; empty where it was not."""
    if (context := _context(arch, config)) < config["max_position_embeddings"]:
        return f"llama.cpp slides no window over these layers, so the context is given as the window: {context:,} tokens"
    return ""


def _context(arch: Architecture, config: Config) -> int:
    """Return the longest context in which llama.cpp and the model see the same."""
    longest, window, kinds = config["max_position_embeddings"], config.get("sliding_window"), config.get("layer_types")
    slides = SLIDING in kinds if kinds else config.get("use_sliding_window", True)
    return min(longest, window) if window and slides and not (arch.period and kinds == _every(config, arch.period)) else longest


def _epsilon(config: Config) -> Fields:
    name = next((name for name in ("layer_norm_eps", "layer_norm_epsilon", "norm_epsilon", "norm_eps") if name in config), "")
    if not name or "rms_norm_eps" in config:
        return {"attention.layer_norm_rms_epsilon": number(config, "rms_norm_eps")}
    return {"attention.layer_norm_epsilon": number(config, name)}


def _experts(config: Config) -> Fields:
    count = whole(config, "num_local_experts" if config.get("num_local_experts") else "num_experts")
    sizes = {"expert_feed_forward_length": "moe_intermediate_size", "expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    inner = {key: config[name] for key, name in sizes.items() if config.get(name)}
    return {"expert_count": count, "expert_used_count": whole(config, "num_experts_per_tok"), **inner}


def _all_sparse(config: Config) -> Fields:
    return {"decoder_sparse_step": 1, "mlp_only_layers": ([], None), "norm_topk_prob": True}


def _gemma2(config: Config) -> Fields:
    return {
        "attn_logit_softcapping": number(config, "attn_logit_softcapping"),
        "final_logit_softcapping": number(config, "final_logit_softcapping"),
    }


def _gemma_scale(config: Config, whole: int) -> Fields:
    """Llama.cpp knows the attention's scale by the head, and, of the model with so many layers, by the width."""
    by_width = config["num_hidden_layers"] == whole
    return {"query_pre_attn_scalar": config["hidden_size"] // config["num_attention_heads"] if by_width else config["head_dim"]}


def _gemma3(config: Config) -> Fields:
    return {"rope.freq_base_swa": number(config["rope_parameters"][SLIDING], "rope_theta")}


def _every(config: Config, period: int) -> list[str]:
    """Return the kinds of layers where one in so many sees everything."""
    return ["full_attention" if (layer + 1) % period == 0 else SLIDING for layer in range(config["num_hidden_layers"])]


def _granite(config: Config) -> Fields:
    names = {"attention.scale": "attention_multiplier", "embedding_scale": "embedding_multiplier"}
    names |= {"residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}
    return {key: number(config, name) for key, name in names.items()}


def _neox(config: Config) -> Fields:
    return {"use_parallel_residual": bool(config["use_parallel_residual"])}


def _smollm3(config: Config) -> list[int]:
    """Every fourth layer has no rope."""
    return [int((layer + 1) % 4 != 0) for layer in range(config["num_hidden_layers"])]


SILU = {"hidden_act": ("silu", "swish")}
TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
GELU = {"hidden_activation": TANH}
# What a config must state that nothing else need be asked of; without a head_dim these families divide the width by the heads.
USUAL = "hidden_size intermediate_size vocab_size num_hidden_layers num_attention_heads num_key_value_heads max_position_embeddings "
USUAL += "rms_norm_eps hidden_act tie_word_embeddings"
STATED = {
    "llama": USUAL,
    "mistral": f"{USUAL} sliding_window",
    "mixtral": f"{USUAL} sliding_window num_local_experts num_experts_per_tok",
    "qwen2": f"{USUAL} use_sliding_window sliding_window",
    "qwen3": f"{USUAL} use_sliding_window sliding_window attention_bias head_dim",
    "olmo2": f"{USUAL} attention_bias",
}
ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture("llama", rotated=True, agrees=lambda c: SILU),
    "mistral": Architecture("llama", rotated=True, agrees=lambda c: SILU),
    "mixtral": Architecture("llama", rotated=True, fields=_experts, agrees=lambda c: SILU),
    "qwen2": Architecture("qwen2", agrees=lambda c: SILU),
    "qwen3": Architecture("qwen3", agrees=lambda c: {**SILU, "attention_bias": False}),
    "qwen3_moe": Architecture("qwen3moe", fields=_experts, agrees=lambda c: {**SILU, **_all_sparse(c), "attention_bias": False}),
    "gemma": Architecture("gemma", add=1.0, agrees=lambda c: {"hidden_act": TANH}),
    "gemma2": Architecture("gemma2", add=1.0, fields=_gemma2, agrees=lambda c: {**GELU, **_gemma_scale(c, 46)}, period=2),
    "gemma3_text": Architecture(
        "gemma3",
        add=1.0,
        fields=_gemma3,
        agrees=lambda c: {
            **GELU,
            **_gemma_scale(c, 62),
            "layer_types": _every(c, 6),
            "final_logit_softcapping": None,
            "attn_logit_softcapping": None,
        },
        period=6,
    ),
    "smollm3": Architecture("smollm3", rotated=True, agrees=lambda c: {**SILU, "no_rope_layers": _smollm3(c)}),
    "qwen2_moe": Architecture("qwen2moe", fields=_experts, agrees=lambda c: {**SILU, **_all_sparse(c), "norm_topk_prob": False}),
    "arcee": Architecture("arcee", rotated=True, agrees=lambda c: {"hidden_act": "relu2"}),
    "seed_oss": Architecture("seed_oss", agrees=lambda c: SILU),
    "phi3": Architecture("phi3", agrees=lambda c: SILU),
    "gpt_neox": Architecture("gptneox", fields=_neox, agrees=lambda c: {"hidden_act": ("gelu", *TANH)}),
    "starcoder2": Architecture("starcoder2", agrees=lambda c: {"hidden_act": TANH, "use_bias": True}),
    "olmo2": Architecture("olmo2", agrees=lambda c: {**SILU, "attention_bias": False}),
    "granite": Architecture("granite", rotated=True, fields=_granite, agrees=lambda c: SILU),
    "stablelm": Architecture("stablelm", fields=_neox, agrees=lambda c: {**SILU, "qk_layernorm": False}),
}

"""Which tensors llama.cpp's graph of a family takes, and of what shapes, by what the config says. Reads no weight, but to see whether a
head is the embeddings once more.

A layer is spelled in llama.cpp's names: after `!` a part must have a bias, after `?` it may. What is not named its graph has no place for.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError

Config = dict[str, Any]
Shape = tuple[int, ...]

EMBEDDINGS, HEAD = ("model.embed_tokens.weight", "gpt_neox.embed_in.weight"), ("lm_head.weight", "embed_out.weight")
BIASES = str.maketrans("", "", "!?")
ATTENTION, GATED = "attn_norm attn_q attn_k attn_v attn_output", "ffn_norm ffn_gate ffn_up ffn_down"
BIASED = "attn_norm attn_q? attn_k? attn_v? attn_output? ffn_norm ffn_gate? ffn_up? ffn_down?"
QK_NORMS, POST_NORMS = "attn_q_norm attn_k_norm", "post_attention_norm post_ffw_norm"
EXPERTS = "ffn_norm ffn_gate_inp ffn_gate_exps ffn_up_exps ffn_down_exps"
SHARED = "ffn_gate_inp_shexp ffn_gate_shexp ffn_up_shexp ffn_down_shexp"
LAYERS = {
    "llama": BIASED,
    "mistral": f"{ATTENTION} {GATED}",
    "mixtral": f"{ATTENTION} {EXPERTS}",
    "qwen2": f"attn_norm attn_q! attn_k! attn_v! attn_output {GATED}",
    "qwen3": f"{ATTENTION} {QK_NORMS} {GATED}",
    "qwen3_moe": f"{ATTENTION} {QK_NORMS} {EXPERTS}",
    "gemma": f"{ATTENTION} {GATED}",
    "gemma2": f"{ATTENTION} {GATED} {POST_NORMS}",
    "gemma3_text": f"{ATTENTION} {QK_NORMS} {GATED} {POST_NORMS}",
    "smollm3": f"{ATTENTION} {GATED}",
    "qwen2_moe": f"attn_norm attn_q? attn_k? attn_v? attn_output {EXPERTS} {SHARED}",
    "arcee": f"{ATTENTION} ffn_norm ffn_up ffn_down",
    "seed_oss": "attn_norm attn_q? attn_k? attn_v? attn_output post_attention_norm ffn_gate ffn_up ffn_down",
    "phi3": "attn_norm attn_qkv attn_output ffn_norm ffn_up ffn_down",
    "gpt_neox": "attn_norm! attn_qkv! attn_output! ffn_norm! ffn_up! ffn_down!",
    "starcoder2": "attn_norm! attn_q! attn_k! attn_v! attn_output! ffn_norm! ffn_up! ffn_down!",
    "olmo2": f"attn_q attn_k attn_v attn_output {QK_NORMS} ffn_gate ffn_up ffn_down {POST_NORMS}",
    "granite": BIASED,
    "stablelm": "attn_norm! attn_q? attn_k? attn_v? attn_output ffn_norm! ffn_gate ffn_up ffn_down",
}
BIASED_NORM = ("gpt_neox", "starcoder2", "stablelm")  # the last one
OWN_HEAD = ("phi3", "gpt_neox", "olmo2", "qwen2_moe", "stablelm")  # whose graph never takes the embeddings for a head

# By words of `_sizes`.
SHAPES = {
    **dict.fromkeys(("token_embd", "output"), "vocab width"),
    **dict.fromkeys(("output_norm", "attn_norm", "ffn_norm", *POST_NORMS.split()), "width"),
    **{"attn_q": "query width", "attn_k": "key width", "attn_v": "key width", "attn_qkv": "all width", "attn_output": "width query"},
    **{"attn_q_norm": "head", "attn_k_norm": "head", "ffn_gate": "inner width", "ffn_up": "inner width", "ffn_down": "width inner"},
    **{"ffn_gate_inp": "experts width", "ffn_gate_exps": "expert width", "ffn_up_exps": "expert width", "ffn_down_exps": "width expert"},
    **{
        "ffn_gate_inp_shexp": "one width",
        "ffn_gate_shexp": "shared width",
        "ffn_up_shexp": "shared width",
        "ffn_down_shexp": "width shared",
    },
}
OTHER_SHAPES = {
    "olmo2": {"attn_q_norm": "query", "attn_k_norm": "key"},
    "phi3": {"ffn_up": "twice width"},
}


def check_tensors(model: Checkpoint, config: Config, found: Mapping[str, Mapping[str, Shape]]) -> None:
    """See that a model has the tensors that llama.cpp's graph of its family takes, in every layer, of the config's shapes, and no others.

    Args:
        found: by llama.cpp's names, the model's own with their shapes: several are experts.
    Raises:
        DowncycleError: one is missing, of another shape, or has no place.
    """
    must, may = _expected(config)
    if missing := [name for name in must if name not in found]:
        name = "lm_head.weight, as embeddings and head are not tied" if missing[0] == "output.weight" else missing[0]
        raise DowncycleError(
            f"{model.name}: llama.cpp needs {name}, which is not there; config.json counts {config['num_hidden_layers']} layers. Mend it, "
            "or fetch the model again"
        )
    for new, parts in found.items():
        wanted = must.get(new) or may.get(new)
        for name, shape in parts.items():
            if wanted is None:
                raise DowncycleError(
                    f"{model.name}: llama.cpp has no place for {name} in the family {config['model_type']}; its GGUF would be wrong"
                )
            if shape != wanted:
                raise DowncycleError(
                    f"{model.name}: {name} is {list(shape)}, and by config.json it is {list(wanted)}; they do not belong together"
                )


def _expected(config: Config) -> tuple[dict[str, Shape], dict[str, Shape]]:
    """Return the shapes of the tensors that must be there, and of those that may."""
    family, sizes = config["model_type"], _sizes(config)
    must: dict[str, Shape] = {}
    may: dict[str, Shape] = {}
    shapes = SHAPES | OTHER_SHAPES.get(family, {})
    left_out = "ffn_norm" if family == "stablelm" and config["use_parallel_residual"] else ""
    layer = [part for part in LAYERS[family].split() if part.translate(BIASES) != left_out]
    last = "output_norm!" if family in BIASED_NORM else "output_norm"
    for part in ("token_embd", last, "output", *(f"blk.{n}.{part}" for n in range(config["num_hidden_layers"]) for part in layer)):
        name = part.translate(BIASES)
        shape = tuple(sizes[word] for word in shapes[name.rpartition(".")[2]].split())
        (may if name == "output" and config.get("tie_word_embeddings") else must)[f"{name}.weight"] = shape
        if name != part:
            (must if part.endswith("!") else may)[f"{name}.bias"] = shape[:1]
    return must, may


def _sizes(config: Config) -> dict[str, int]:
    heads, width, inner = config["num_attention_heads"], config["hidden_size"], config["intermediate_size"]
    head, groups = config.get("head_dim") or width // heads, config.get("num_key_value_heads") or heads
    return {
        **{"vocab": config["vocab_size"], "width": width, "inner": inner, "twice": 2 * inner, "one": 1},
        **{"head": head, "query": heads * head, "key": groups * head, "all": (heads + 2 * groups) * head},
        "experts": config.get("num_local_experts") or config.get("num_experts") or 1,
        "expert": config.get("moe_intermediate_size") or inner,
        "shared": config.get("shared_expert_intermediate_size") or inner,
    }


def repeated_head(model: Checkpoint, config: Config) -> str:
    """Name the head of a tied model where it is stored and the embeddings once more; a head that differs is used by transformers."""
    head = next((name for name in HEAD if name in model.tensors), "")
    embeddings = next((name for name in EMBEDDINGS if name in model.tensors), "")
    if not (config.get("tie_word_embeddings") and head and embeddings):
        return ""
    return head if _same(model.tensors[head], model.tensors[embeddings]) else ""


def _same(first: Tensor, second: Tensor) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return first.data == second.data or _digest(first) == _digest(second)


def _digest(tensor: Tensor) -> bytes:
    total = sha256()
    for chunk in tensor.chunks():
        total.update(chunk)
    return total.digest()

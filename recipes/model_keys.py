"""The keys that follow the model: its pad token, the parameters of its head and last layers, the kernels that know its family, and how it
was trained ternary before.

Reads config, tokenizer files and tensor names only.
"""

from __future__ import annotations

import json
import re
from typing import Any

from ..surgery.checkpoint import Checkpoint, file_bytes
from ..surgery.errors import DowncycleError
from ..surgery.stack import split_layers
from ..surgery.ternary.record import read_record

# Families whose kernels Liger has in the version that Axolotl 0.19 installs, and those whose attention and MLP the LoRA kernels fit.
LIGER = frozenset((
    "exaone4", "falcon_h1", "gemma", "gemma2", "gemma3", "gemma3_text", "glm4", "gpt_oss", "granite", "hunyuan_v1_dense", "llama",
    "llama4", "llama4_text", "ministral", "mistral", "mixtral", "nemotron", "olmo2", "olmo3", "phi3", "qwen2", "qwen3", "qwen3_moe",
    "qwen3_next", "smollm3",
))  # fmt: skip
LORA_KERNELS = frozenset(("llama", "mistral", "qwen2", "qwen3", "smollm3"))


def pad_token(checkpoint: Checkpoint) -> str | None:
    """Return a token for padding that the vocabulary has already, or None where the tokenizer names one itself.

    A reserved token where there is one (Llama 3's `<|reserved_special_token_0|>`), else the end of text: a new token would grow the
    embeddings, and the child would no longer be its parent's layers.
    """
    config = _read(checkpoint, "tokenizer_config.json")
    special = config | _read(checkpoint, "special_tokens_map.json")
    if special.get("pad_token") or not any(path.startswith("tokenizer") for path in checkpoint.files):
        return None
    decoder = config.get("added_tokens_decoder")
    added = decoder.values() if isinstance(decoder, dict) else _read(checkpoint, "tokenizer.json").get("added_tokens")
    names = [_spelled(token) for token in added or ()]
    reserved = [name for name in names if re.search(r"pad|reserved|unused", name, re.IGNORECASE)]
    return next(iter(sorted(reserved, key=lambda name: "pad" not in name.lower())), _spelled(special.get("eos_token"))) or None


def tail_parameters(checkpoint: Checkpoint, layers: int) -> list[str]:
    """Return Axolotl's patterns for the head (the embeddings where they are tied), the final norm and the last `layers` decoder layers.

    Axolotl takes a dot for a dot.
    """
    stack = split_layers(checkpoint)
    depth = len(stack.layers)
    if not 1 <= layers <= depth:
        raise DowncycleError(f"cannot train the last {layers} layers of {depth}")
    heads = [name for name in stack.rest if re.search(r"(^|\.)(lm_head|embed_out)\.", name)]
    heads = heads or [name for name in stack.rest if re.search(r"(^|\.)(embed_tokens|wte|embed_in|word_embeddings)\.", name)]
    norms = [name for name in stack.rest if re.search(r"norm|ln_f|layernorm", name.rpartition(".")[0].rpartition(".")[2], re.IGNORECASE)]
    return [f"^{name}$" for name in (*heads, *norms)] + [f"^{stem}{n}." for stem in stack.stems for n in range(depth - layers, depth)]


def unfit_keys(model_type: str, config: dict[str, Any], gpus: int) -> list[str]:
    """Return the kernels' keys that do not suit a family, or a machine without a GPU, which Triton's kernels need."""
    liger = [key for key in config if key.startswith("liger_")]
    kernels = [key for key in config if re.fullmatch(r"lora_(mlp|qkv|o|embedding)_kernel", key)]
    return (liger if not gpus or model_type not in LIGER else []) + (kernels if not gpus or model_type not in LORA_KERNELS else [])


def ternary_keys(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what of an earlier ternary training must stay as it was: its maps and norms; nothing where there was none."""
    before = read_record(checkpoint.config, checkpoint.name)
    kept = {"include": list(before.rule.include), "exclude": list(before.rule.exclude), "norm": before.norm} if before else {}
    return {key: value for key, value in kept.items() if value}


def check_trained(checkpoint: Checkpoint, preset: str) -> None:
    """Refuse to go on with a model that no ternary training left, or one that was stopped in its warm-up.

    Raises:
        DowncycleError: says what to run before.
    """
    before = read_record(checkpoint.config, checkpoint.name)
    first = f"--preset {preset} goes on where --preset ternary ended"
    if before is None:
        raise DowncycleError(f"{checkpoint.name}: was never trained ternary; {first}: run that first, and give its output_dir")
    if not before.whole:
        raise DowncycleError(f"{checkpoint.name}: its warm-up stopped at a lambda of {before.strength:g}; {first}: let that end first")


def _read(checkpoint: Checkpoint, path: str) -> dict[str, Any]:
    try:
        value = json.loads(file_bytes(checkpoint.files[path]))
    except (KeyError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _spelled(token: Any) -> str:
    """A token's text: transformers writes it as a string or as an object with content."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else ""

"""What a model needs in memory: its weights, its KV cache and its training, in bytes, from config and headers alone.

Estimates, each with its formula; knows no recipe and no machine. GiB are 2**30 bytes, as makers of GPUs count.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import prod
from typing import Any

from ..surgery.checkpoint import Checkpoint
from ..surgery.families import WITHOUT_ATTENTION
from ..surgery.stack import Layer, split_layers

GIB = 2**30
# NF4 with double quantisation, bits a weight: 4, an 8-bit scale for 64 weights, a float32 one for 256 of those (QLoRA,
# arXiv 2305.14314, section 3).
NF4_BITS = 4 + 8 / 64 + 32 / (64 * 256)
ADAM_BYTES = {8: 2, 16: 4, 32: 8}  # two moments of 8, 16 or 32 bits for each trained parameter
OVERHEAD = 1.0 * GIB  # CUDA context, cuBLAS workspace
FRAGMENTED = 1.05  # what the caching allocator cannot use
WINDOW_EVERYWHERE = ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")  # a sliding_window in other families' configs binds some layers


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory, in numbers (not bytes).

    elements: all parameters. linear: those in the matrices of decoder layers, which NF4, int8 and LoRA apply to; linear_rows: the outputs
    of these matrices in all; lora_width: their inputs plus outputs, the LoRA parameters per unit of rank. layer_elements: of each layer.
    layer_outputs: what the matrices of the widest layer give for one token. cache: for each layer that has a KV cache, the numbers
    that it keeps for one token, and its window in tokens (0: no limit).
    """

    elements: int
    linear: int
    linear_rows: int
    lora_width: int
    layer_elements: tuple[int, ...]
    layer_outputs: int
    hidden: int
    vocab: int
    head: int
    tied: bool
    packed: bool
    cache: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_elements)


@dataclass(frozen=True)
class Training:
    """What training needs on one GPU, in bytes."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float

    @property
    def total(self) -> float:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """Read off a checkpoint what decides its memory."""
    config = _text_config(checkpoint.config)
    stack = split_layers(checkpoint)
    active = _active_share(config)
    matrices = [matrix for layer in stack.layers for matrix in _matrices(layer)]
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    vocab = _first(config, "vocab_size")
    tied = bool(checkpoint.config.get("tie_word_embeddings", config.get("tie_word_embeddings", not _has_head(checkpoint))))
    return ModelSize(
        elements=checkpoint.num_elements,
        linear=sum(count * out * inp for _, count, out, inp in matrices),
        linear_rows=sum(count * out for _, count, out, _ in matrices),
        lora_width=sum(out + inp for name, count, out, inp in matrices if not _routed(name, count)),
        layer_elements=tuple(sum(prod(tensor.shape) for tensor in layer.values()) for layer in stack.layers),
        layer_outputs=max(
            int(sum(count * out * (active if _routed(name, count) else 1) for name, count, out, _ in _matrices(layer)))
            for layer in stack.layers
        ),
        hidden=hidden,
        vocab=vocab,
        head=hidden * vocab,
        tied=tied,
        packed=isinstance(checkpoint.config.get("quantization_config"), dict),
        cache=_cache(config, checkpoint.num_layers, hidden),
    )


def weight_bytes(size: ModelSize, dtype: str) -> float:
    """Bytes of the weights when loaded as bf16, fp32, int8 (LLM.int8: one float32 scale a row) or nf4 (double quantisation).

    int8 and nf4 apply to the matrices of decoder layers; embeddings, head and norms stay bf16.
    """
    rest = size.elements - size.linear
    if dtype == "int8":
        return size.linear + 4 * size.linear_rows + 2 * rest
    if dtype == "nf4":
        return size.linear * NF4_BITS / 8 + 2 * rest
    return size.elements * {"bf16": 2, "fp32": 4}[dtype]


def kv_cache_bytes(size: ModelSize, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes of the KV cache of one sequence: 2 x KV heads x head size x tokens in each layer; windowed layers keep their window."""
    return sum(kept * min(tokens, window or tokens) * dtype_bytes for kept, window in size.cache)


def training_bytes(
    size: ModelSize,
    method: str,
    *,
    tokens: int,
    rank: int = 0,
    trained_layers: int = 0,
    adam_bits: int = 32,
    fused_loss: bool = False,
    checkpointing: bool = True,
    shards: int = 1,
) -> Training:
    """Estimate what one GPU needs to train with Axolotl in bf16.

    full: bf16 weights and gradients; sharded (FSDP2, ZeRO-3): float32 ones, as accelerate keeps them, and one layer gathered in bf16.
    tail: the same for head and last layers, the rest frozen. lora, qlora: frozen bf16 or NF4 weights, float32 adapters.
    Activations with checkpointing: the bf16 input of each layer, and of the widest layer its outputs and their gradients (the sb(…)
    terms of Korthikanti et al., arXiv 2205.05198, eq. 2-4, without attention scores, which flash attention never stores).
    Logits: 12 bytes for each token and vocabulary entry (bf16, float32, log-softmax, gradient), next to nothing with a fused loss.

    Args:
        tokens: micro-batch x sequence length.
        rank: of LoRA, over all matrices of decoder layers that are nn.Linear.
        trained_layers: of `tail`.
        adam_bits: of each of the optimiser's two moments.
        shards: GPUs over which weights, gradients and optimiser are sharded.
    """
    float_bytes = 4 if shards > 1 else 2
    if method in ("lora", "qlora"):
        trained = rank * size.lora_width
        frozen = weight_bytes(size, "nf4" if method == "qlora" else "bf16")
        weights, gradients = frozen + 4 * trained, 4 * trained
    elif method == "tail":
        trained = size.head + sum(sorted(size.layer_elements)[-trained_layers:] if trained_layers else ())
        weights, gradients = 2 * (size.elements - trained) + float_bytes * trained, float_bytes * trained
    else:
        trained = size.elements
        weights, gradients = float_bytes * trained, float_bytes * trained
    gathered = 2 * (max(size.layer_elements) + size.head) if shards > 1 else 0
    layer = tokens * 2 * (2 * size.layer_outputs + 12 * size.hidden)
    stored = tokens * 2 * size.hidden * size.layers if checkpointing else layer * size.layers
    unpacked = 2 * max(size.layer_elements) if method == "qlora" else 0
    return Training(
        weights=weights / shards + gathered,
        gradients=gradients / shards,
        optimizer=trained * ADAM_BYTES[adam_bits] / shards,
        activations=stored + layer + unpacked,
        logits=tokens * (size.hidden * 8 if fused_loss else size.vocab * 12),
        overhead=OVERHEAD,
    )


def needed_bytes(training: Training) -> float:
    """What the GPU must have for it: the estimate and what the allocator cannot use."""
    return training.total * FRAGMENTED


def memory_table(size: ModelSize) -> dict[str, Any]:
    """Return the bytes that `downcycle inspect` shows: weights by dtype, KV cache by context, training by method on one GPU.

    Training: one sequence of 8192 tokens, checkpointing, a fused loss, 32-bit Adam; LoRA of rank 128.
    """
    if size.packed:
        return {"kv_cache": {tokens: kv_cache_bytes(size, tokens) for tokens in (1024, 16_384, 131_072)} if size.cache else {}}
    return {
        "weights": {dtype: round(weight_bytes(size, dtype)) for dtype in ("bf16", "int8", "nf4")},
        "kv_cache": {tokens: kv_cache_bytes(size, tokens) for tokens in (1024, 16_384, 131_072)} if size.cache else {},
        "training": {
            method: round(needed_bytes(training_bytes(size, method, tokens=8192, rank=128, fused_loss=True)))
            for method in ("full", "lora", "qlora")
        },
    }


def format_gib(count: float) -> str:
    """Write bytes in GiB, or MiB below one."""
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    for section in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(section), dict):
            return {**config, **config[section]}
    return config


def _first(config: dict[str, Any], *names: str) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _has_head(checkpoint: Checkpoint) -> bool:
    return any(name.endswith(("lm_head.weight", "embed_out.weight", "output.weight")) for name in checkpoint.tensors)


def _matrices(layer: Layer) -> list[tuple[str, int, int, int]]:
    """The matrices of a layer: name, how many lie in one tensor (fused experts), rows, columns."""
    return [
        (name, prod(tensor.shape[:-2]), tensor.shape[-2], tensor.shape[-1])
        for (_, name), tensor in layer.items()
        if len(tensor.shape) >= 2 and min(tensor.shape[-2:]) > 1 and "conv" not in name
    ]


def _routed(name: str, count: int) -> bool:
    """Whether a matrix belongs to experts of which a token sees some."""
    return count > 1 or ".experts." in f".{name}"


def _active_share(config: dict[str, Any]) -> float:
    """The share of the routed experts that one token sees."""
    experts = _first(config, "num_local_experts", "num_experts", "n_routed_experts")
    return min(1.0, _first(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "top_k") / experts) if experts else 1.0


def _cache(config: dict[str, Any], depth: int, hidden: int) -> tuple[tuple[int, int], ...]:
    """Numbers that the KV cache keeps for one token, and the window, of each layer; empty where the config does not say."""
    heads = _first(config, "num_attention_heads", "n_head", "num_heads", "n_heads")
    if not heads:
        return ()
    kv_heads = 1 if config.get("multi_query") else _first(config, "num_key_value_heads", "num_kv_heads", "n_head_kv") or heads
    head_dim = _first(config, "head_dim", "attention_head_dim") or hidden // heads
    kept = 2 * kv_heads * head_dim
    if _first(config, "kv_lora_rank"):  # multi-head latent attention; transformers keeps the expanded keys and values
        kept = heads * (_first(config, "qk_nope_head_dim") + _first(config, "qk_rope_head_dim") + _first(config, "v_head_dim"))
    listed = config.get("layer_types") or config.get("layers_block_type")
    kinds = listed if isinstance(listed, list) else ["full_attention"] * depth
    window = _first(config, "sliding_window")
    everywhere = window if config.get("model_type") in WINDOW_EVERYWHERE else 0
    return tuple(
        (kept, window if "sliding" in str(kind) or "chunked" in str(kind) else everywhere)
        for kind in kinds
        if str(kind) not in WITHOUT_ATTENTION
    )

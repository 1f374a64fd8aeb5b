"""What a model needs in memory: its weights, its KV cache and its training, in bytes, from config and headers alone.

Estimates, each with its formula; knows no recipe and no machine. GiB are 2**30 bytes, as makers of GPUs count.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property, partial
from math import inf, prod
from typing import Any

from ..surgery.checkpoint import Checkpoint
from ..surgery.families import WITHOUT_ATTENTION
from ..surgery.quantizer import packed_by
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
class Matrix:
    """A matrix of a decoder layer, or `count` of them in one tensor (fused experts). routed: a token sees some of these only."""

    module: str
    count: int
    rows: int
    columns: int
    routed: bool

    @property
    def elements(self) -> int:
        """Numbers in all."""
        return self.count * self.rows * self.columns


@dataclass(frozen=True)
class ModelSize:
    """What of a model decides its memory, in numbers (not bytes).

    parameters: of each tensor. matrices: those of decoder layers, which NF4, int8 and LoRA apply to. layer_elements: of each layer.
    layer_outputs, layer_inputs: what the matrices of the widest layer give for one token, and what they take, each for itself. cache: for
    each layer that has a KV cache, the numbers that it keeps for one token, and its window in tokens (0: no limit).
    """

    parameters: Mapping[str, int]
    matrices: tuple[Matrix, ...]
    layer_elements: tuple[int, ...]
    layer_outputs: int
    layer_inputs: int
    hidden: int
    vocab: int
    packed: bool
    cache: tuple[tuple[int, int], ...]

    @property
    def layers(self) -> int:
        """How many decoder layers there are."""
        return len(self.layer_elements)

    @cached_property
    def elements(self) -> int:
        """All parameters."""
        return sum(self.parameters.values())

    @cached_property
    def linear(self) -> int:
        """Parameters in the matrices."""
        return sum(matrix.elements for matrix in self.matrices)

    @property
    def widest(self) -> int:
        """Parameters of the largest matrix of a layer."""
        return max((matrix.rows * matrix.columns for matrix in self.matrices), default=0)

    @property
    def head(self) -> int:
        """Parameters of the head, or of the embeddings."""
        return self.hidden * self.vocab

    def lora_width(self, targeted: Callable[[str], bool] = lambda module: True) -> int:
        """Inputs plus outputs of the matrices that LoRA is put on, by their modules' names: its parameters per unit of rank."""
        return sum(matrix.rows + matrix.columns for matrix in self.matrices if not matrix.routed and targeted(matrix.module))


@dataclass(frozen=True)
class Training:
    """What training needs on one GPU, in bytes.

    evaluation: what evaluating needs beyond that, for the fused loss is for training only. loading: what the loading needs beyond that.
    """

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    overhead: float
    evaluation: float = 0
    loading: float = 0

    @property
    def total(self) -> float:
        """Everything together."""
        return sum(getattr(self, field.name) for field in fields(self))


def model_size(checkpoint: Checkpoint) -> ModelSize:
    """Read off a checkpoint what decides its memory."""
    config = _text_config(checkpoint.config)
    stack = split_layers(checkpoint)
    active = _active_share(config)
    layers = [tuple(_matrices(number, layer)) for number, layer in enumerate(stack.layers)]
    hidden = _first(config, "hidden_size", "n_embd", "d_model", "dim")
    return ModelSize(
        parameters={name: prod(tensor.shape) for name, tensor in checkpoint.tensors.items()},
        matrices=tuple(matrix for matrices in layers for matrix in matrices),
        layer_elements=tuple(sum(prod(tensor.shape) for tensor in layer.values()) for layer in stack.layers),
        layer_outputs=max(int(sum(m.count * m.rows * (active if m.routed else 1) for m in matrices)) for matrices in layers),
        layer_inputs=max(int(sum(m.count * m.columns * (active if m.routed else 1) for m in matrices)) for matrices in layers),
        hidden=hidden,
        vocab=_first(config, "vocab_size"),
        packed=bool(packed_by(checkpoint.config)),
        cache=_cache(config, checkpoint.num_layers, hidden),
    )


def weight_bytes(size: ModelSize, dtype: str) -> float:
    """Bytes of the weights when loaded as bf16, fp32, int8 (LLM.int8: one float32 scale a row) or nf4 (double quantisation).

    int8 and nf4 apply to the matrices of decoder layers; embeddings, head and norms stay bf16.
    """
    rest = size.elements - size.linear
    if dtype == "int8":
        return size.linear + 4 * sum(matrix.count * matrix.rows for matrix in size.matrices) + 2 * rest
    if dtype == "nf4":
        return size.linear * NF4_BITS / 8 + 2 * rest
    return size.elements * {"bf16": 2, "fp32": 4}[dtype]


def kv_cache_bytes(size: ModelSize, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes of the KV cache of one sequence: 2 x KV heads x head size x tokens in each layer; windowed layers keep their window."""
    return sum(kept * min(tokens, window or tokens) * dtype_bytes for kept, window in size.cache)


def training_bytes(
    size: ModelSize,
    *,
    tokens: int,
    trained: int = 0,
    added: int = 0,
    frozen: str = "bf16",
    adam_bits: int | None = None,
    fused_loss: bool = False,
    checkpointing: bool = True,
    evaluated: int = 0,
    parallel: str = "none",
    shards: int = 1,
    offloaded: bool = False,
    ternary: bool = False,
    teacher: bool = False,
) -> Training:
    """Estimate what one GPU needs to train with Axolotl 0.19, which loads weights in bf16 and keeps them so; TernaryPlugin, in float32.

    DDP holds gradients twice, the second time in the buckets that are sent. ZeRO-3 keeps float32 weights and moments in its optimiser;
    FSDP2 does not. A sharded model is gathered layer by layer; sharded NF4 weights are loaded whole on each GPU first.
    Activations with checkpointing: the bf16 input of each layer, and of the widest layer its outputs and their gradients (the sb(…)
    terms of Korthikanti et al., arXiv 2205.05198, eq. 2-4, without attention scores, which flash attention never stores).
    Logits: 12 bytes for each token and vocabulary entry (bf16, float32, log-softmax, gradient), next to nothing with a fused loss; 10 in
    evaluation, where no loss is fused.

    Ternary: each map of a layer keeps its rounded inputs, of 16 bits, beside float32 ones of a moment, and its rounded weights, of 16
    bits too, beside a float32 copy of one. Where weights are not gathered in bf16, as FSDP2 does, what goes from layer to layer is float32.

    Args:
        tokens: micro-batch x sequence length; evaluated: the same in evaluation, 0 where there is none.
        trained: how many of the model's own parameters are trained; added: float32 ones beside them, as LoRA's are.
        frozen: bf16, int8 or nf4, how weights are held where none of them is trained.
        adam_bits: of each of the optimiser's two moments [default: as the parameters'].
        parallel: none, ddp, fsdp2 or zero3, over `shards` GPUs. offloaded: shards lie in CPU memory, gradients and optimiser too.
        ternary: trained by TernaryPlugin; teacher: with a whole second model in bf16 on each GPU, whose logits are stored too.
    """
    sharded = parallel in ("fsdp2", "zero3")
    over = inf if sharded and offloaded else shards if sharded else 1
    each = 4 if ternary else 2
    own = float(each * size.elements) if trained else weight_bytes(size, frozen)
    moments = (ADAM_BYTES[adam_bits or 8 * each] * trained) + ADAM_BYTES[adam_bits or 32] * added
    if parallel == "zero3":
        moments = 12 * trained + 8 * added
    gathered = 2 * (max(size.layer_elements) + size.head) if sharded else 0
    wide = ternary and not sharded  # what goes from layer to layer is float32
    layer = tokens * 2 * (2 * size.layer_outputs + (16 if wide else 12) * size.hidden) + ternary * tokens * 4 * size.layer_inputs
    stored = tokens * (4 if wide else 2) * size.hidden * size.layers if checkpointing else layer * size.layers
    rounded = 2 * max(size.layer_elements) * (1 if checkpointing else size.layers) + 4 * size.widest if ternary else 0
    unpacked = 2 * max(size.layer_elements) if frozen == "nf4" else 0
    needs = Training(
        weights=(own + 4 * added) / over + gathered + 2 * teacher * size.elements,
        gradients=(each * trained + 4 * added) * (2 if parallel == "ddp" else 1) / over,
        optimizer=moments / over,
        activations=stored + layer + unpacked + rounded,
        logits=tokens * (size.hidden * 8 if fused_loss else size.vocab * (16 if teacher else 12)),
        overhead=OVERHEAD,
    )
    evaluation = max(0, evaluated * size.vocab * 10 - needs.activations - needs.logits)
    loading = max(0.0, own - (needs.total - OVERHEAD + evaluation)) if sharded and frozen == "nf4" else 0
    return replace(needs, evaluation=evaluation, loading=loading)


def needed_bytes(training: Training) -> float:
    """What the GPU must have for it: the estimate and what the allocator cannot use."""
    return training.total * FRAGMENTED


def memory_table(size: ModelSize) -> dict[str, Any]:
    """Return the bytes that `downcycle inspect` shows: weights by dtype, KV cache by context, training by method on one GPU.

    Training: one sequence of 8192 tokens, checkpointing, a fused loss, no evaluation, Adam; LoRA of rank 128.
    """
    if size.packed:
        return {"kv_cache": {tokens: kv_cache_bytes(size, tokens) for tokens in (1024, 16_384, 131_072)} if size.cache else {}}
    needs = partial(training_bytes, size, tokens=8192, fused_loss=True)
    lora = 128 * size.lora_width()
    methods = {"full": needs(trained=size.elements), "lora": needs(added=lora), "qlora": needs(added=lora, frozen="nf4")}
    return {
        "weights": {dtype: round(weight_bytes(size, dtype)) for dtype in ("bf16", "int8", "nf4")},
        "kv_cache": {tokens: kv_cache_bytes(size, tokens) for tokens in (1024, 16_384, 131_072)} if size.cache else {},
        "training": {method: round(needed_bytes(training)) for method, training in methods.items()},
    }


def format_gib(count: float) -> str:
    """Write bytes in GiB, or in MiB below a tenth of one."""
    return f"{count / GIB:.3g} GiB" if count >= GIB / 10 else f"{count / 2**20:.3g} MiB"


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    for section in ("text_config", "llm_config", "language_config"):
        if isinstance(config.get(section), dict):
            return {**config, **config[section]}
    return config


def _first(config: dict[str, Any], *names: str) -> int:
    return next((config[name] for name in names if isinstance(config.get(name), int)), 0)


def _matrices(number: int, layer: Layer) -> Iterator[Matrix]:
    for (stem, name), tensor in layer.items():
        if len(tensor.shape) >= 2 and min(tensor.shape[-2:]) > 1 and "conv" not in name:
            count = prod(tensor.shape[:-2])
            module = f"{stem}{number}.{name.removesuffix('.weight')}"
            yield Matrix(module, count, tensor.shape[-2], tensor.shape[-1], routed=count > 1 or ".experts." in f".{name}")


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

"""Make Llama checkpoints of any size to measure on: plain file writing, no torch, and holes instead of data where only size matters."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

BLOCK = 1 << 20


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama; the defaults are a layer of Llama-3.2-1B, 32 of them and a head of its own: 4.94 GB."""

    layers: int = 32
    hidden: int = 2048
    intermediate: int = 8192
    heads: int = 32
    kv_heads: int = 8
    vocab: int = 128256
    family: str = "llama"

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield names and shapes in the order of the model."""
        wide, narrow, kv = self.hidden, self.intermediate, self.kv_heads * self.hidden // self.heads
        yield "model.embed_tokens.weight", (self.vocab, wide)
        for layer in range(self.layers):
            stem = f"model.layers.{layer}."
            yield f"{stem}input_layernorm.weight", (wide,)
            yield from ((f"{stem}mlp.{name}_proj.weight", (narrow, wide)) for name in ("gate", "up"))
            yield f"{stem}mlp.down_proj.weight", (wide, narrow)
            yield f"{stem}post_attention_layernorm.weight", (wide,)
            yield from ((f"{stem}self_attn.{name}_proj.weight", (wide, wide)) for name in "qo")
            yield from ((f"{stem}self_attn.{name}_proj.weight", (kv, wide)) for name in "kv")
        yield "model.norm.weight", (wide,)
        yield "lm_head.weight", (self.vocab, wide)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in bfloat16."""
        return 2 * sum(prod(shape) for _, shape in self.tensors())

    def scaled(self, nbytes: float) -> Shape:
        """The same model with wider MLPs, so that it has about this many bytes."""
        step = 2 * 3 * self.hidden * self.layers * 64
        return replace(self, intermediate=max(64, self.intermediate + 64 * round((nbytes - self.nbytes) / step)))

    def config(self) -> dict[str, object]:
        """config.json, complete."""
        return {
            "architectures": [f"{self.family.title()}ForCausalLM"], "model_type": self.family, "num_hidden_layers": self.layers,
            "hidden_size": self.hidden, "intermediate_size": self.intermediate, "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads, "head_dim": self.hidden // self.heads, "vocab_size": self.vocab,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False, "bos_token_id": 128000,
            "eos_token_id": 128001, "torch_dtype": "bfloat16",
        }  # fmt: skip


LLAMA_405B = Shape(layers=126, hidden=16384, intermediate=53248, heads=128)
QWEN3 = Shape(family="qwen3")  # a config that leaves fields to its class in transformers


def write_model(folder: Path, shape: Shape, shard_bytes: int, *, sparse: bool) -> None:
    """Write a checkpoint of finite random bfloat16 numbers, or of holes that take no disk."""
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in shape.tensors():
        if shards[-1] and filled + 2 * prod(dims) > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += 2 * prod(dims)
    folder.mkdir(parents=True)
    names = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
    block = b"" if sparse else finite_block()
    for file, tensors in zip(names, shards, strict=True):
        write_shard(folder / file, tensors, block)
    weight_map = {name: file for file, tensors in zip(names, shards, strict=True) for name in tensors}
    index = {"metadata": {"total_size": shape.nbytes}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def write_shard(path: Path, tensors: dict[str, tuple[int, ...]], block: bytes) -> None:
    """Write one safetensors file whose data is this block over and over, or a hole."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dims in tensors.items():
        fields[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [end, end + 2 * prod(dims)]}
        end += 2 * prod(dims)
    text = json.dumps(fields).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for done in range(0, end if block else 0, BLOCK):
            file.write(block[: end - done])
        file.truncate(8 + len(text) + end)


def finite_block() -> bytes:
    """Random bfloat16 numbers of magnitude below 2: bit 14, the top of the exponent, is 0."""
    mask = int.from_bytes(b"\xff\xbf" * (BLOCK // 2), "little")
    return (int.from_bytes(os.urandom(BLOCK), "little") & mask).to_bytes(BLOCK, "little")

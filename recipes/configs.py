"""The files of axolotl_configs: recipes for Llama-3-6B and the built-in model's child on common machines.

`python -m downcycle.recipes.configs` writes them anew. Nothing is fetched: a recipe needs a model's shape, not its weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..surgery.checkpoint import DEMO, Checkpoint, Tensor, open_checkpoint
from ..surgery.choose import first
from ..surgery.layers import keep_layers
from .machine import Machine
from .recipe import make_recipe
from .recipe_text import recipe_text
from .text_source import TextSource

FOLDER = Path(__file__).parent.parent / "axolotl_configs"

LLAMA_3_6B: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}
RESERVED = "<|reserved_special_token_0|>"

# `downcycle demo` puts both there.
DEMO_CHILD = "downcycle-demo/child"
DEMO_TEXT = TextSource({"path": "downcycle-demo/healing.jsonl", "ds_type": "json", "split": "train", "type": "completion"})
CPU_KEYS = {"sequence_len": 512, "gradient_checkpointing": False}
CPU = {"dataset": DEMO_TEXT, "batch": 4, "overrides": CPU_KEYS}
# A pass over the text, in a few minutes; so small a model takes, and needs, a greater rate.
FEW_STEPS = {
    **{"max_steps": 150, "downcycle_ternary.warmup_steps": 50, "learning_rate": 1e-3},
    **{"micro_batch_size": 4, "val_set_size": 0.02, "eval_steps": 50, "save_steps": 150},
}
TRAINED = {"downcycle_ternary": {"strength": 1.0}}  # what `ternary` leaves in config.json, as far as it is read here

# What each file is made with: preset, machine, and what else is asked.
FILES: dict[str, tuple[str, Machine, dict[str, Any]]] = {
    "llama-3-6b/llama-3-6b.yaml": ("llama-3-6b", Machine(4, 48, arch="sm_86"), {}),
    "llama-3-6b/qlora-1x16gb-t4.yaml": ("qlora", Machine(1, 16, arch="sm_75"), {"overrides": {"sequence_len": 2048}}),
    "llama-3-6b/qlora-1x24gb.yaml": ("qlora", Machine(1, 24, arch="sm_89"), {}),
    "llama-3-6b/qlora-4x48gb.yaml": ("qlora", Machine(4, 48, arch="sm_86"), {}),
    "llama-3-6b/qlora-2x4x24gb-ray.yaml": ("qlora", Machine(4, 24, 2, "sm_89"), {"ray": True}),
    "llama-3-6b/qlora-4x24gb-fsdp2.yaml": ("qlora", Machine(4, 24, arch="sm_89"), {"parallel": "fsdp2"}),
    "llama-3-6b/lora-1x80gb.yaml": ("lora", Machine(1, 80), {}),
    "llama-3-6b/tail-1x48gb.yaml": ("tail", Machine(1, 48, arch="sm_86"), {}),
    "llama-3-6b/full-8x80gb-fsdp2.yaml": ("full", Machine(8, 80), {"parallel": "fsdp2"}),
    "llama-3-6b/full-8x80gb-zero3.yaml": ("full", Machine(8, 80), {"parallel": "zero3"}),
    "llama-3-6b/full-2x8x80gb-fsdp2.yaml": ("full", Machine(8, 80, 2, "sm_90"), {"parallel": "fsdp2"}),
    "llama-3-6b/stream-4x48gb.yaml": ("stream", Machine(4, 48, arch="sm_86"), {}),
    "llama-3-6b/ternary-8x80gb-fsdp2.yaml": ("ternary", Machine(8, 80), {"parallel": "fsdp2"}),
    "llama-3-6b/ternary-long-8x80gb-fsdp2.yaml": ("ternary-long", Machine(8, 80), {"parallel": "fsdp2"}),
    "demo/qlora-cpu.yaml": ("qlora", Machine(0), CPU),
    "demo/tail-cpu.yaml": ("tail", Machine(0), CPU),
    "demo/ternary-cpu.yaml": ("ternary", Machine(0), CPU | {"overrides": CPU_KEYS | FEW_STEPS}),
}


def config_texts() -> dict[str, str]:
    """Return every file of axolotl_configs by its name in that folder."""
    demo = open_checkpoint(DEMO)
    models = {
        "llama-3-6b": (llama_shape(LLAMA_3_6B), "Llama-3-6B"),
        "llama-3-6b/ternary-long": (llama_shape(LLAMA_3_6B | TRAINED), "outputs/llama-3-6b-1.58"),
        "demo": (keep_layers(demo, first(demo.num_layers, 9)), DEMO_CHILD),
    }
    texts = {}
    for name, (preset, machine, options) in FILES.items():
        model, base_model = models.get(f"{name.split('/')[0]}/{preset}") or models[name.split("/")[0]]
        recipe = make_recipe(model, base_model, preset, machine=machine, **options)
        texts[name] = recipe_text(recipe, f"axolotl_configs/{name}")
    return texts


def llama_shape(config: dict[str, Any]) -> Checkpoint:
    """Return a Llama of this shape in bf16 that has no weights: enough to reckon with."""
    hidden, inner, vocab = (config[key] for key in ("hidden_size", "intermediate_size", "vocab_size"))
    kept = hidden * config["num_key_value_heads"] // config["num_attention_heads"]
    shapes: dict[str, tuple[int, ...]] = {
        f"self_attn.{name}_proj": (rows, hidden) for name, rows in zip("qkvo", (hidden, kept, kept, hidden), strict=True)
    }
    shapes |= {"mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden), "mlp.down_proj": (hidden, inner)}
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    named = {f"model.layers.{layer}.{name}.weight": shape for layer in range(config["num_hidden_layers"]) for name, shape in shapes.items()}
    named |= {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    tokenizer = {"eos_token": "<|end_of_text|>", "added_tokens_decoder": {"128002": {"content": RESERVED}}}
    files = {"tokenizer_config.json": json.dumps(tokenizer).encode()}
    return Checkpoint("shape", config, {name: Tensor("BF16", shape, lambda: ()) for name, shape in named.items()}, files)


def write_configs(folder: Path = FOLDER) -> None:
    """Write the files, and take away those that are no longer made."""
    texts = config_texts()
    for path in folder.rglob("*.yaml"):
        if str(path.relative_to(folder)) not in texts:
            path.unlink()
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


if __name__ == "__main__":
    write_configs()

"""The presets: which Axolotl keys a recipe sets, to what, and why. Values only; knows no model, data or machine.

They share what they agree on; `llama-3-6b` stands alone, as it was published.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .validation.own_plugins import SECTION, TERNARY

FINEWEB_1B = "prince-canuma/fineweb-CC-MAIN-2024-10-1B-en"  # what Llama-3-6B was healed on
RECIPE = "axolotl.yaml"  # where a recipe stands, unless its preset says otherwise
FINEWEB_EDU_10B = "HuggingFaceFW/fineweb-edu:sample-10BT"
LIGER = "axolotl.integrations.liger.LigerPlugin"


@dataclass(frozen=True)
class Setting:
    """The value of one key, and the reason that stands beside it in the file."""

    value: Any
    why: str = ""


@dataclass(frozen=True)
class Preset:
    """A way to train: its settings, and what they are worth by default.

    batch: sequences in one step, over all GPUs. micro_batch, gpus: what it was laid out for, where a user names no machine. file: the
    recipe's name. goes_on: whether it takes up a model that was trained ternary.
    """

    purpose: str
    settings: Mapping[str, Setting]
    batch: int = 64
    micro_batch: int = 2
    gpus: int = 1
    dataset: str = FINEWEB_1B
    trained_layers: int = 0  # of `tail`: how many of the last layers
    file: str = RECIPE
    goes_on: bool = False


def _plain(**values: Any) -> dict[str, Setting]:
    return {key: Setting(value) for key, value in values.items()}


SHARED = {
    "sequence_len": Setting(8192),
    "sample_packing": Setting(True, "documents share a sequence and do not see each other: no pad token is ever trained on"),
    "pad_to_sequence_len": Setting(True, "equal shapes: no fragmented memory"),
    "eval_sample_packing": Setting(True),
    "val_set_size": Setting(0.001),
    "num_epochs": Setting(1, "new text heals more than the same text again"),
    "optimizer": Setting("adamw_torch_fused"),
    "adam_beta2": Setting(0.95, "usual in pretraining; forgets the shock of the cut sooner than 0.999"),
    "max_grad_norm": Setting(1.0),
    "lr_scheduler": Setting("cosine"),
    "warmup_ratio": Setting(0.03, "a share of the run, so that it stays right when the data changes"),
    "bf16": Setting("auto"),
    "tf32": Setting(True),
    "gradient_checkpointing": Setting(True, "recomputes activations: a third more work for a tenth of their memory"),
    "gradient_checkpointing_kwargs": Setting({"use_reentrant": False}),
    "attn_implementation": Setting("flash_attention_2", "from the flash-attn package, or the kernels hub where it is not installed"),
    "plugins": Setting([LIGER]),
    "liger_rope": Setting(True),
    "liger_rms_norm": Setting(True),
    "liger_fused_linear_cross_entropy": Setting(True, "training stores no logits: 12 bytes x vocabulary saved for each token"),
    "eval_batch_size": Setting(1, "evaluation does store them"),
    "evals_per_epoch": Setting(4),
    "saves_per_epoch": Setting(4),
    "save_total_limit": Setting(2),
    "logging_steps": Setting(10),
    "seed": Setting(42),
}

ADAPTER = {
    "lora_r": Setting(128, "a cut must be healed in every matrix; small ranks, which are for style, do not"),
    "lora_alpha": Setting(16, "with rsLoRA the update is scaled by alpha / sqrt(r) = 1.4"),
    "peft_use_rslora": Setting(True, "keeps the scale right at high ranks (arXiv 2312.03732)"),
    "lora_dropout": Setting(0.0, "each text is seen once: nothing to overfit, and the kernels below are fastest without"),
    "lora_target_linear": Setting(True, "all matrices of the decoder layers"),
    "lora_mlp_kernel": Setting(True, "Triton kernels for LoRA: less memory and time, same values"),
    "lora_qkv_kernel": Setting(True),
    "lora_o_kernel": Setting(True),
    "learning_rate": Setting(2e-4),
    "weight_decay": Setting(0.0),
}

QLORA = {
    "adapter": Setting("qlora"),
    "load_in_4bit": Setting(True, "NF4 with double quantisation, as Axolotl does by default"),
    "optimizer": Setting("paged_adamw_32bit", "moves its state to CPU memory when the GPU's runs out"),
}

WHOLE = {
    "liger_glu_activation": Setting(True),
    "optimizer": Setting("adamw_torch_fused", "its state, as the weights, in bf16: Axolotl keeps no float32 copy"),
    "learning_rate": Setting(1e-4, "the peak rate of Minitron's healing (arXiv 2407.14679); halve it if the loss jumps"),
    "weight_decay": Setting(0.1),
}

STREAM = {
    "streaming": Setting(True, "text is read and tokenised while training; nothing is stored"),
    "val_set_size": Setting(0, "a stream has no end to take a part of; name test_datasets for a held-out loss"),
    "save_steps": Setting(500),
}
EPOCHS = ("num_epochs", "evals_per_epoch", "saves_per_epoch")
WITHOUT_EPOCHS = (*EPOCHS, "eval_sample_packing", "eval_batch_size")

# Ternary training of Llama-3-8B-Instruct, published: huggingface.co/blog/1_58_llm_extreme_quantization. Not published, and chosen here:
# schedule and warm-up of the rate, weight decay, moments.
TERNARY_BATCH = 256  # x 8192 tokens = 2M, published
LAMBDA = "lambda goes from 0, the model as it was, to 1, ternary weights and 8-bit activations, in so many steps: as published"
TERNARY_WEIGHTS = {
    "plugins": Setting([LIGER, TERNARY], "Liger's kernels work on what the ternary maps give, and the head stays as it is"),
    "bf16": Setting("auto", "of products; the weights themselves stay in float32, or updates of a millionth would be lost"),
    "liger_glu_activation": Setting(True),
    "optimizer": Setting("adamw_torch_fused", "its state in float32, as the weights"),
    "eval_steps": Setting(500),
    "save_steps": Setting(500),
}
ONCE_ROUNDED = {
    SECTION: Setting({"schedule": "linear", "warmup_steps": 1000}, LAMBDA),
    "max_steps": Setting(5000, "published, of 2M tokens each"),
    "learning_rate": Setting(1e-4, "the peak rate, published"),
    "cosine_min_lr_ratio": Setting(0.1, "ends where ternary-long begins"),
    "weight_decay": Setting(0.1, "keeps weights small enough to change sign; BitNet's authors drop it halfway"),
}
ROUNDED_ON = {
    SECTION: Setting({"schedule": "linear", "warmup_steps": 0}, "lambda is 1 from the first step on: no warm-up"),
    "max_steps": Setting(45_000, "published, of 2M tokens each"),
    "learning_rate": Setting(1e-5, "the best peak rate, published"),
    "warmup_ratio": Setting(0.01, "the optimizer's state begins anew"),
    "weight_decay": Setting(0.0, "as BitNet's authors have it late in training: weights may come to rest"),
}

PUBLISHED = _plain(
    load_in_4bit=True,
    adapter="qlora",
    sequence_len=8192,
    sample_packing=False,
    pad_to_sequence_len=False,
    lora_r=128,
    lora_alpha=128,
    lora_dropout=0.05,
    lora_target_linear=True,
    micro_batch_size=2,
    num_epochs=2,
    optimizer="paged_adamw_32bit",
    lr_scheduler="cosine",
    learning_rate=2e-4,
    warmup_steps=100,
    train_on_inputs=False,
    group_by_length=False,
    bf16="auto",
    tf32=False,
    gradient_checkpointing=True,
    evals_per_epoch=4,
    save_steps=4000,
    weight_decay=0.0,
    val_set_size=0.001,
    seed=42,
) | {
    "attn_implementation": Setting("flash_attention_2", "published as flash_attention: true, its old spelling"),
    "lora_mlp_kernel": Setting(False, "Axolotl now turns these four on unless told; the published run had none"),
    "lora_qkv_kernel": Setting(False),
    "lora_o_kernel": Setting(False),
    "lora_embedding_kernel": Setting(False),
    "wandb_project": Setting("llama-3-6b", "`wandb login` first; or WANDB_MODE=offline, or --set wandb_project=null"),
}

PRESETS = {
    "qlora": Preset("heal with LoRA on NF4 weights: least memory", SHARED | ADAPTER | QLORA),
    "lora": Preset("heal with LoRA on bf16 weights: exact weights beneath, more memory", SHARED | ADAPTER | _plain(adapter="lora")),
    "full": Preset("train every weight: heals best, needs most memory", SHARED | WHOLE),
    "tail": Preset(
        "train the head and the last layers in full, the rest frozen: cheap, and good after dropping the last layers",
        SHARED | WHOLE,
        trained_layers=3,
    ),
    "stream": Preset(
        "heal with QLoRA on text as it comes, FineWeb from the Hub unless told otherwise",
        {key: setting for key, setting in (SHARED | ADAPTER | QLORA | STREAM).items() if key not in WITHOUT_EPOCHS},
        dataset="HuggingFaceFW/fineweb:CC-MAIN-2024-10",
    ),
    "ternary": Preset(
        "train ternary weights (BitNet b1.58) out of the ones that are there, as Llama3-8B-1.58 was",
        {key: setting for key, setting in (SHARED | TERNARY_WEIGHTS | ONCE_ROUNDED).items() if key not in EPOCHS},
        batch=TERNARY_BATCH,
        micro_batch=1,
        gpus=8,
        dataset=FINEWEB_EDU_10B,
        file="axolotl-ternary.yaml",
    ),
    "ternary-long": Preset(
        "train ternary weights on, from where `ternary` ended",
        {
            key: setting
            for key, setting in (SHARED | STREAM | TERNARY_WEIGHTS | ROUNDED_ON).items()
            if key not in (*WITHOUT_EPOCHS, "eval_steps")
        },
        batch=TERNARY_BATCH,
        micro_batch=1,
        gpus=8,
        dataset="HuggingFaceFW/fineweb-edu:sample-100BT",
        file="axolotl-ternary-long.yaml",
        goes_on=True,
    ),
    "llama-3-6b": Preset("heal as Llama-3-6B was, value for value", PUBLISHED, gpus=4),
}

RECIPES = tuple(dict.fromkeys(preset.file for preset in PRESETS.values()))  # what recipes are called

# The file's blocks, in order: each key stands in the first that names it, and keys that none names stand in the last.
BLOCKS = {
    "model": ("base_model", "tokenizer_config", "trust_remote_code", "special_tokens"),
    "data": (
        *("datasets", "pretraining_dataset", "test_datasets", "streaming", "dataset_prepared_path", "sequence_len", "sample_packing"),
        *("pad_to_sequence_len", "eval_sample_packing", "eval_batch_size", "val_set_size", "train_on_inputs", "group_by_length"),
    ),
    "what is trained": (
        *("adapter", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha", "peft_use_rslora", "peft_use_dora", "lora_dropout"),
        *("lora_target_linear", "lora_target_modules", "lora_modules_to_save", "unfrozen_parameters", SECTION),
    ),
    "batch": ("micro_batch_size", "gradient_accumulation_steps", "num_epochs", "max_steps"),
    "optimisation": (
        "optimizer",
        "adam_beta2",
        "lr_scheduler",
        "learning_rate",
        "cosine_min_lr_ratio",
        "warmup_ratio",
        "warmup_steps",
        "weight_decay",
        "max_grad_norm",
    ),
    "precision, memory and speed": (
        *("bf16", "fp16", "tf32", "attn_implementation", "gradient_checkpointing", "gradient_checkpointing_kwargs", "plugins"),
        *("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy"),
        *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"),
    ),
    "machines": ("fsdp_version", "fsdp_config", "deepspeed", "use_ray", "ray_num_workers", "resources_per_worker"),
    "evaluation, saving, logging": (
        *(
            "output_dir",
            "evals_per_epoch",
            "eval_steps",
            "saves_per_epoch",
            "save_steps",
            "save_total_limit",
            "logging_steps",
            "wandb_project",
        ),
        "seed",
    ),
}

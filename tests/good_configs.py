"""Axolotl configs without a fault, one for each way to train, for the machine named with each."""

import copy
from typing import Any

TEXT = [{"path": "prince-canuma/fineweb-CC-MAIN-2024-10-1B-en", "type": "completion", "split": "train"}]
BASE: dict[str, Any] = {"base_model": "prince-canuma/Llama-3-6B-v0", "datasets": TEXT, "learning_rate": 2e-4, "output_dir": "./out"}
LORA = BASE | {"adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_target_linear": True}
QLORA = LORA | {"adapter": "qlora", "load_in_4bit": True}
FSDP = {
    "fsdp_version": 2,
    "fsdp_config": {
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "state_dict_type": "FULL_STATE_DICT",
        "reshard_after_forward": True,
        "offload_params": False,
    },
}
PUBLISHED = QLORA | {
    "model_type": "AutoModelForCausalLM",
    "tokenizer_type": "AutoTokenizer",
    "load_in_8bit": False,
    "strict": False,
    "dataset_prepared_path": None,
    "val_set_size": 0.001,
    "sequence_len": 8192,
    "sample_packing": False,
    "pad_to_sequence_len": False,
    "lora_r": 128,
    "lora_alpha": 128,
    "lora_dropout": 0.05,
    "lora_target_modules": None,
    "wandb_project": "llama-3-6b",
    "wandb_entity": None,
    "gradient_accumulation_steps": 8,
    "micro_batch_size": 2,
    "num_epochs": 2,
    "optimizer": "paged_adamw_32bit",
    "lr_scheduler": "cosine",
    "learning_rate": "2e-4",  # what YAML 1.1 reads where the file says 2e-4
    "train_on_inputs": False,
    "group_by_length": False,
    "bf16": "auto",
    "fp16": None,
    "tf32": False,
    "gradient_checkpointing": True,
    "early_stopping_patience": None,
    "resume_from_checkpoint": None,
    "local_rank": None,
    "logging_steps": 1,
    "attn_implementation": "flash_attention_2",
    "warmup_steps": 100,
    "evals_per_epoch": 4,
    "eval_table_size": None,
    "save_steps": 4000,
    "deepspeed": None,
    "weight_decay": 0.0,
    "fsdp_config": None,
    "seed": 42,
    "special_tokens": {"pad_token": "<|reserved_special_token_0|>"},
}
CPU = {"attn_implementation": "sdpa", "bf16": False, "tf32": False}
KERNELS_OFF = dict.fromkeys(("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel"), False)
STREAM = {
    "pretraining_dataset": [{"path": "a", "name": "b", "split": "train", "text_column": "content", "type": "pretrain"}],
    "streaming": True,
}
NO_DATA = {key: value for key, value in BASE.items() if key != "datasets"}

# name: (config, GPUs, architecture)
GOOD: dict[str, tuple[dict[str, Any], int, str]] = {
    "published": (PUBLISHED, 4, "sm_80"),
    "lora": (LORA | {"lora_dropout": 0.05, "sample_packing": True, "attn_implementation": "sdpa"}, 1, "sm_80"),
    "lora 8 bit": (LORA | {"load_in_8bit": True, "optimizer": "adamw_8bit"}, 1, "sm_75"),
    "qlora": (
        QLORA | {"optimizer": "paged_adamw_8bit", "lora_modules_to_save": ["embed_tokens", "lm_head"], "tokens": ["<x>"]},
        1,
        "sm_86",
    ),
    "dora": (QLORA | {"peft_use_dora": True}, 1, "sm_80"),
    "rslora, some layers": (
        LORA | {"peft_use_rslora": True, "peft_layers_to_transform": [0, 1], "lora_rank_pattern": {"q_proj": 8}},
        1,
        "sm_80",
    ),
    "relora": (LORA | {"relora": True, "jagged_restart_steps": 100, "jagged_restart_warmup_steps": 10}, 1, "sm_80"),
    "loraplus": (LORA | {"loraplus_lr_ratio": 16}, 1, "sm_80"),
    "full": (
        BASE | {"bf16": True, "tf32": True, "sample_packing": True, "attn_implementation": "flash_attention_2", "warmup_ratio": 0.03},
        8,
        "sm_90",
    ),
    "some parameters": (BASE | {"unfrozen_parameters": ["^model.layers.2[0-9]+.", "lm_head.weight$"], "embedding_lr": 1e-5}, 1, "sm_80"),
    "fp16 lora on a T4": (LORA | {"bf16": False, "fp16": True, "attn_implementation": "sdpa"}, 1, "sm_75"),
    "fsdp2": (
        BASE | FSDP | {"optimizer": "adamw_torch_8bit", "gradient_checkpointing": True, "dp_shard_size": 4, "dp_replicate_size": 2},
        8,
        "sm_80",
    ),
    "fsdp2 qlora": (QLORA | FSDP | {"optimizer": "adamw_torch_fused"}, 2, "sm_80"),
    "deepspeed": (BASE | {"deepspeed": "deepspeed_configs/zero3.json", "load_best_model_at_end": False}, 4, "sm_80"),
    "deepspeed inline": (BASE | {"deepspeed": {"zero_optimization": {"stage": 2}}}, 1, "sm_80"),
    "stream": (NO_DATA | STREAM | {"max_steps": 1000, "test_datasets": TEXT, "eval_steps": 100}, 1, "sm_80"),
    "packed stream": (
        BASE | {"streaming": True, "max_steps": 9, "sample_packing": True, "attn_implementation": "flex_attention"},
        1,
        "sm_80",
    ),
    "best model": (BASE | {"val_set_size": 100, "save_steps": 200, "eval_steps": 100, "load_best_model_at_end": True}, 1, "sm_80"),
    "early stop": (BASE | {"val_set_size": 0.1, "save_steps": 100, "eval_steps": 50, "early_stopping_patience": 3}, 1, "sm_80"),
    "minimal rate": (BASE | {"lr_scheduler": "cosine", "cosine_min_lr_ratio": 0.1, "cosine_constant_lr_ratio": 0.8}, 1, "sm_80"),
    "own dataset code": (BASE | {"datasets": [{"path": "a", "type": "mypackage.prompts.load_mine"}, {"path": "b"}]}, 1, "sm_80"),
    "custom prompt": (
        BASE | {"datasets": [{"path": "a", "type": {"field_instruction": "q", "field_output": "a", "format": "{instruction}"}}]},
        1,
        "sm_80",
    ),
    "chat": (
        BASE | {"chat_template": "llama3", "datasets": [{"path": "a", "type": "chat_template", "roles_to_train": ["assistant"]}]},
        1,
        "sm_80",
    ),
    "fp8": (BASE | {"fp8": True, "torch_compile": True, "bf16": True}, 1, "sm_90"),
    "ternary qat": (BASE | {"qat": {"weight_dtype": "ternary", "activation_dtype": "int8", "fake_quant_after_n_steps": 10}}, 1, "sm_80"),
    "hub kernel": (BASE | {"attn_implementation": "kernels-community/flash-attn3@v1", "sample_packing": True}, 1, "sm_90"),
    "offload": (BASE | {"gradient_checkpointing": True, "activation_offloading": "disk"}, 1, "sm_80"),
    "numbers as text": (LORA | {"lora_r": "8.0", "weight_decay": "1e-2", "num_epochs": "3"}, 1, "sm_80"),
    "cpu full": (BASE | CPU, 0, "sm_80"),
    "cpu qlora": (QLORA | CPU | KERNELS_OFF | {"optimizer": "paged_adamw_32bit", "val_set_size": 0}, 0, "sm_80"),
    "cpu lora, evaluated": (LORA | CPU | KERNELS_OFF | {"val_set_size": 0.1, "evals_per_epoch": 2}, 0, "sm_80"),
}
WITH_PLUGINS: dict[str, tuple[dict[str, Any], int, str]] = {
    "liger": (
        BASE
        | {"plugins": ["axolotl.integrations.liger.LigerPlugin"], "bf16": True}
        | dict.fromkeys(("liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_fused_linear_cross_entropy"), True),
        1,
        "sm_80",
    ),
    "cut cross entropy": (
        BASE | {"plugins": ["cut_cross_entropy.CutCrossEntropyPlugin"], "cut_cross_entropy": True, "bf16": True},
        1,
        "sm_80",
    ),
    "distillation": (
        BASE
        | {"plugins": ["axolotl.integrations.kd.KDPlugin"], "kd_trainer": True, "kd_ce_alpha": 0.1, "kd_alpha": 0.9, "kd_temperature": 1.0}
        | {"datasets": [{"path": "a", "type": "axolotl.integrations.kd.chat_template", "logprobs_field": "lp"}]},
        1,
        "sm_80",
    ),
    "foreign plugin": (BASE | {"plugins": ["mypackage.plugins.Mine"], "my_key": 3}, 1, "sm_80"),
    "own plugin": (
        BASE | {"plugins": ["downcycle.recipes.plugins.TernaryPlugin"], "downcycle_ternary": {"warmup_steps": 9, "norm": True}},
        1,
        "sm_80",
    ),
}


def good(name: str) -> tuple[dict[str, Any], int, str]:
    """One of them, free to be changed."""
    return copy.deepcopy((GOOD | WITH_PLUGINS)[name])

"""Names that people write and Axolotl does not read: its own former ones, and those of other trainers. Judges no value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from .axolotl_schema import load_keys

SLIP = 0.75  # how alike two keys are where one may be a slip of the pen for the other

# What Axolotl's schema does not say about its own old names; the rest of them is in axolotl_keys.json.
INSTEAD = {
    "evaluation_strategy": "eval_strategy",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dpo_beta": "rl_beta",
    "eval_table_size": "generate_samples: true",
    "eval_max_new_tokens": "generation_max_new_tokens",
    "sequence_parallel_degree": "context_parallel_size",
    "flash_attn_d512": "large_head_attention: auto",
    "liger_swiglu": "liger_glu_activation",
    "message_field_role": "message_property_mappings: {role: ...}",
    "message_field_content": "message_property_mappings: {content: ...}",
}
ATTENTION = ("xformers_attention", "sage_attention", "flex_attention", "flash_attention", "sdp_attention", "eager_attention")
# Old names that Axolotl puts under the new one itself, in its order ...
MAPPED = (
    *ATTENTION,
    "dataset_processes",
    "dpo_beta",
    "evaluation_strategy",
    "gc_steps",
    "liger_swiglu",
    "noisy_embedding_alpha",
    "pretrain_multipack_buffer_size",
    "sequence_parallel_degree",
)
# ... and those that it reads as they are.
STILL_READ = (*MAPPED, "eval_max_new_tokens", "eval_table_size", "flash_attn_d512", "message_field_content", "message_field_role")
REFUSED = {
    "max_packed_sequence_len": "sequence_len with sample_packing: true",
    "rope_scaling": "overrides_of_model_config: {rope_scaling: ...}",
    "unsloth_lora_mlp": "lora_mlp_kernel",
    "unsloth_lora_qkv": "lora_qkv_kernel",
    "unsloth_lora_o": "lora_o_kernel",
    "dpo_use_logits_to_keep": "",
    "dpo_generate_during_eval": "",
    "dpo_norm_loss": "",
    "rpo_alpha": "",
    "s2_attention": "",
    "flash_attn_rms_norm": "",
}
MEANT = {  # nested keys: (place, key): key
    ("datasets[]", "text_column"): "field",
    ("datasets[]", "field_text"): "field",
    ("datasets[]", "text_field"): "field",
    ("datasets[]", "dataset_text_field"): "field",
    ("datasets[]", "column"): "field",
    ("datasets[]", "train_on_split"): "split",
    ("datasets[]", "subset"): "name",
    ("datasets[]", "config_name"): "name",
    ("datasets[]", "file_name"): "data_files",
    ("datasets[]", "messages_field"): "field_messages",
    ("pretraining_dataset[]", "field"): "text_column",
    ("pretraining_dataset[]", "field_text"): "text_column",
}
FOREIGN = {  # Axolotl's key: what other trainers call it (transformers, TRL, PEFT, LLaMA-Factory, Unsloth, torchtune)
    "base_model": "model model_id model_name model_name_or_path pretrained_model_name_or_path base_model_name_or_path",
    "tokenizer_config": "tokenizer tokenizer_name tokenizer_name_or_path tokenizer_path",
    "micro_batch_size": "per_device_train_batch_size per_gpu_train_batch_size train_batch_size train_micro_batch_size_per_gpu",
    "eval_batch_size": "per_device_eval_batch_size per_gpu_eval_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation grad_accum grad_accumulation_steps accumulate_grad_batches",
    "num_epochs": "epochs num_train_epochs max_epochs",
    "max_steps": "max_train_steps max_iters num_steps train_steps",
    "sequence_len": "max_seq_length max_seq_len max_length model_max_length cutoff_len block_size seq_length seq_len context_length",
    "learning_rate": "lr",
    "lr_scheduler": "lr_scheduler_type scheduler scheduler_type",
    "optimizer": "optim optimizer_type",
    "max_grad_norm": "gradient_clipping gradient_clip_val clip_grad_norm grad_clip",
    "warmup_steps": "num_warmup_steps lr_warmup_steps",
    "adam_epsilon": "adam_eps epsilon",
    "bf16: true": "torch_dtype dtype mixed_precision compute_dtype precision",
    "use_wandb: true": "report_to log_with",
    "wandb_name": "run_name wandb_run_name",
    "datasets": "dataset dataset_name dataset_path data_path train_dataset train_file train_data",
    "test_datasets": "eval_dataset eval_datasets validation_dataset validation_file",
    "datasets: [{field: ...}]": "dataset_text_field text_field field_text",
    "dataset_num_proc": "preprocessing_num_workers num_proc",
    "val_set_size": "val_size test_size validation_split validation_split_percentage",
    "sample_packing": "packing",
    "train_on_inputs": "train_on_prompt train_on_input",
    "chat_template": "template conversation conversation_template",
    "gradient_checkpointing": "use_gradient_checkpointing enable_gradient_checkpointing activation_checkpointing",
    "attn_implementation": "attn_impl flash_attn use_flash_attention use_flash_attention_2 use_flash_attn _attn_implementation",
    "load_in_4bit: true": "quantization_bit use_4bit quantize",
    "load_in_8bit: true": "use_8bit",
    "adapter": "finetuning_type peft_type use_peft use_lora",
    "lora_r": "lora_rank r rank",
    "lora_target_modules": "lora_target target_modules lora_modules",
    "lora_modules_to_save": "modules_to_save additional_target",
    "lora_rank_pattern": "rank_pattern",
    "lora_alpha_pattern": "alpha_pattern",
    "peft_use_rslora": "use_rslora lora_use_rslora",
    "peft_use_dora": "use_dora lora_use_dora",
    "peft_layers_to_transform": "layers_to_transform lora_layers_to_transform",
    "peft_init_lora_weights": "init_lora_weights",
    "peft: {loftq_config: ...}": "loftq_config loftq_bits",
    "neftune_noise_alpha": "neftune_alpha",
    "plugins: [axolotl.integrations.liger.LigerPlugin]": "use_liger use_liger_kernel enable_liger_kernel",
    "deepspeed": "deepspeed_config ds_config",
    "fsdp_config: {transformer_layer_cls_to_wrap: ...}": "fsdp_transformer_layer_cls_to_wrap",
    "dp_shard_size": "data_parallel_size",
}
FOREIGN_NAMES = {name: key for key, names in FOREIGN.items() for name in names.split()}


def replacements() -> dict[str, str]:
    """What to write in place of each former name."""
    return load_keys()["instead"] | INSTEAD


def old_name(key: str, value: Any, path: str = "") -> list[str]:
    """A fault for a former name that Axolotl no longer reads; where it is empty or off, it says nothing and is let pass."""
    if key in REFUSED and value is not None:
        return [f"{path}{key}: Axolotl no longer takes it; " + (f"write {REFUSED[key]}" if REFUSED[key] else "take it out")]
    new = replacements().get(key)
    return [] if new is None or value in (None, False) or key in STILL_READ else [f"{path}{key}: an old name; write {new}"]


def modern(config: dict[str, Any]) -> dict[str, Any]:
    """The config with former names in today's spelling, where Axolotl translates them itself; what is both is left to `notes`."""
    new = {key: value for key, value in config.items() if key not in MAPPED}
    for key in MAPPED:
        name, _, value = replacements()[key].partition(": ")
        if config.get(key) not in (None, False) and new.get(name) is None:
            new[name] = value or config[key]
    kept = new.get("gradient_checkpointing")
    if kept in ("offload", "offload_disk"):
        new |= {"gradient_checkpointing": True, "activation_offloading": "disk" if kept == "offload_disk" else True}
    sharding = new.get("fsdp_config")
    if isinstance(sharding, dict):
        new["fsdp_config"] = {key if key == "fsdp_version" else str(key).removeprefix("fsdp_"): value for key, value in sharding.items()}
    return new


def notes(config: dict[str, Any]) -> list[str]:
    """Name each former spelling that Axolotl still reads: no fault, but one day it will be."""
    return list(_notes(config))


def _notes(config: dict[str, Any]) -> Iterator[str]:
    yield from _old_names(config, "")
    if config.get("fsdp") and config.get("fsdp_config"):
        yield "fsdp: an old name beside fsdp_config, which says it all; take it out"
    if config.get("gradient_checkpointing") in ("offload", "offload_disk"):
        offloading = modern(config)["activation_offloading"]
        new = f"gradient_checkpointing: true and activation_offloading: {str(offloading).lower()}"
        yield f"gradient_checkpointing: an old value that Axolotl still reads; write {new}"
    for key in ("datasets", "test_datasets"):
        listed = config.get(key)
        for number, entry in enumerate(listed if isinstance(listed, list) else ()):
            yield from _old_names(entry, f"{key}[{number}].")
    sharding = config.get("fsdp_config")
    for key in sharding if isinstance(sharding, dict) else ():
        if str(key).startswith("fsdp_") and key != "fsdp_version":
            yield f"fsdp_config.{key}: an old name that Axolotl still reads; write {key.removeprefix('fsdp_')}"


def _old_names(mapping: Any, path: str) -> Iterator[str]:
    for key, value in mapping.items() if isinstance(mapping, dict) else ():
        if key in STILL_READ and value not in (None, False):
            yield f"{path}{key}: an old name that Axolotl still reads; write {replacements()[key]}"


def doubled(config: dict[str, Any]) -> Iterator[str]:
    """Name each former spelling that stands beside its successor: Axolotl refuses the two, or drops the old one."""
    for key in MAPPED:
        new = replacements()[key].split(":")[0]
        if config.get(key) not in (None, False) and config.get(new) is not None:
            yield f"{key}: the old name of {new}, which is there too; take {key} out"


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str:
    """A hint at the most similar of these names, or nothing."""
    found = get_close_matches(name, list(names), 1, likeness)
    return f"; did you mean {found[0]}?" if found else ""


def key_hint(key: str, known: Iterable[str]) -> str:
    """A hint at the key of Axolotl that was meant by an unknown one."""
    meant = FOREIGN_NAMES.get(key)
    if key.startswith(("bnb_4bit_", "llm_int8_")):
        meant = f"bnb_config_kwargs: {{{key}: ...}}"
    return f"; did you mean {meant}?" if meant else nearest(key, known, SLIP)

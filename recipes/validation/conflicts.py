"""Settings of an Axolotl config that do not go together, each with the reason; what Axolotl lets pass, or reports badly.

Takes each key to be well formed: slips in keys and kinds of values are for keys.py. Opens no file and looks at no GPU.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from .axolotl_schema import load_keys
from .data_conflicts import data_faults, number
from .hardware import hardware_faults
from .keys import plugins_of
from .names import modern, nearest
from .sharding import sharding_faults
from .ternary import is_ternary, ternary_faults

Config = dict[str, Any]
Rule = Callable[[Config], Iterator[str]]

# Two keys of which only one can be followed: (first, second, what happens).
EXCLUSIVE = (
    ("warmup_steps", "warmup_ratio", "Axolotl refuses both"),
    ("save_steps", "saves_per_epoch", "Axolotl refuses both"),
    ("eval_steps", "evals_per_epoch", "Axolotl refuses both"),
    ("val_set_size", "test_datasets", "Axolotl refuses both; write val_set_size: 0"),
    ("gradient_accumulation_steps", "batch_size", "Axolotl refuses both"),
    ("max_memory", "gpu_memory_limit", "Axolotl refuses both"),
    ("lr_groups", "loraplus_lr_ratio", "Axolotl refuses both"),
    ("embedding_lr", "embedding_lr_scale", "only the scale is followed"),
    ("load_in_4bit", "load_in_8bit", "weights have one format"),
    ("fp16", "bf16", "bf16 wins silently"),
    ("datasets", "pretraining_dataset", "Axolotl trains on pretraining_dataset only, silently"),
)
RANGES = {  # key: (least, most, whether the least itself is allowed)
    "learning_rate": (0, 1e3, False),
    "micro_batch_size": (1, 1e6, True),
    "gradient_accumulation_steps": (1, 1e6, True),
    "eval_batch_size": (1, 1e6, True),
    "num_epochs": (0, 1e6, False),
    "sequence_len": (1, 1e9, True),
    "logging_steps": (0, 1e9, False),
    "lora_r": (1, 1e6, True),
    "lora_alpha": (0, 1e6, False),
    "lora_dropout": (0, 1, True),
    "weight_decay": (0, 1e3, True),
    "warmup_steps": (0, 1e9, True),
    "warmup_ratio": (0, 1, True),
    "val_set_size": (0, 1e9, True),
    "cosine_min_lr_ratio": (0, 1, True),
    "cosine_constant_lr_ratio": (0, 1, True),
    "neftune_noise_alpha": (0, 1e6, False),
    "adam_beta1": (0, 1, True),
    "adam_beta2": (0, 1, True),
    "save_steps": (0, 1e9, True),
    "eval_steps": (0, 1e9, True),
    "max_steps": (-1, 1e12, True),
    "dataloader_num_workers": (0, 1e4, True),
    "dataloader_prefetch_factor": (0, 1e6, True),
}
# What Weights & Biases, torch.utils.checkpoint and bitsandbytes know, where Axolotl hands on anything.
WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
HANDED_ON = {
    "gradient_checkpointing_kwargs": ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop"),
    "bnb_config_kwargs": (
        "load_in_8bit",
        "load_in_4bit",
        "llm_int8_threshold",
        "llm_int8_skip_modules",
        "llm_int8_enable_fp32_cpu_offload",
        "llm_int8_has_fp16_weight",
        "bnb_4bit_compute_dtype",
        "bnb_4bit_quant_type",
        "bnb_4bit_use_double_quant",
        "bnb_4bit_quant_storage",
        "blocksize",  # read by Axolotl itself, when it merges
    ),
}


def conflicts(config: Config, gpus: int = 1, arch: str = "sm_80") -> list[str]:
    """Name the settings that do not go together, or not with `gpus` GPUs (0: a CPU) of this compute capability.

    Errors: DowncycleError where `arch` is no compute capability.
    """
    config = modern(config)
    rules: tuple[Rule, ...] = (
        _names,
        _handed_on,
        _exclusive,
        _ranges,
        _adapter,
        _adapter_keys,
        _quantisation,
        _adapter_limits,
        data_faults,
    )
    faults = [fault for rule in (*rules, _schedule, _precision, _losses, _output, ternary_faults) for fault in rule(config)]
    return list(dict.fromkeys([*faults, *sharding_faults(config, gpus), *hardware_faults(config, gpus, arch)]))


def _names(config: Config) -> Iterator[str]:
    """Values that Axolotl or transformers look up in a list, mostly hours after validation."""
    lists = load_keys()["names"]
    own_code = bool(config.get("trust_remote_code"))
    for key in (
        "optimizer",
        "lr_scheduler",
        "eval_strategy",
        "save_strategy",
        "hub_strategy",
        "attn_implementation",
        "tokenizer_type",
        "model_type",
    ):
        for spelt in (key, "type_of_model") if key == "model_type" else (key,):
            value = config.get(spelt)
            free = (key == "attn_implementation" and "/" in str(value)) or (own_code and key.endswith("_type"))
            if isinstance(value, str) and value not in lists[key] and not free:
                yield f"{spelt}: {value!r} is none that Axolotl or transformers know{nearest(value, lists[key])}"
    if (wanted := config.get("large_head_attention")) and str(wanted).lower() not in ("auto", "sdpa", "triton_flash"):
        yield f"large_head_attention: {wanted!r} is none of auto, sdpa, triton_flash"
    adapter = config.get("adapter")
    if adapter and adapter not in ("lora", "qlora", "llama-adapter") and not plugins_of(config):
        yield f"adapter: {adapter!r} is none that Axolotl knows, and no plugin is listed{nearest(str(adapter), ['lora', 'qlora'])}"


def _handed_on(config: Config) -> Iterator[str]:
    mode = config.get("wandb_mode")
    if isinstance(mode, str) and mode and mode not in WANDB_MODES:
        yield f"wandb_mode: {mode!r} is none of {', '.join(WANDB_MODES)}{nearest(mode, WANDB_MODES)}"
    for key, names in HANDED_ON.items():
        given = config.get(key)
        for name in given if isinstance(given, dict) else ():
            if name not in names:
                yield f"{key}.{name}: no such setting; there are {', '.join(names)}{nearest(str(name), names)}"


def _exclusive(config: Config) -> Iterator[str]:
    for first, second, what in EXCLUSIVE:
        if config.get(first) and config.get(second) and not (second == "bf16" and config["bf16"] == "auto"):
            yield f"{first}: not together with {second}; {what}"


def _ranges(config: Config) -> Iterator[str]:
    for key, (least, most, inclusive) in RANGES.items():
        value = config.get(key)
        amount = number(value)
        if value is None or (amount is None and key != "learning_rate"):
            continue
        if amount is None or not math.isfinite(amount) or amount > most or amount < least or (amount == least and not inclusive):
            yield f"{key}: {value!r} where a number {'from' if inclusive else 'above'} {least} up to {most:g} is needed"
        elif key in ("save_steps", "eval_steps") and amount > 1 and amount != int(amount):
            yield f"{key}: {value} is neither a whole number of steps nor a share of the run below 1"
    if number(config.get("val_set_size")) == 1:
        yield "val_set_size: 1 leaves nothing to train on; give a share below 1 or a number of rows above 1"


def _adapter(config: Config) -> Iterator[str]:
    adapter = config.get("adapter")
    if adapter not in ("lora", "qlora") or config.get("lora_model_dir"):
        return
    for key in ("lora_r", "lora_alpha"):
        if config.get(key) is None:
            yield f"{key}: missing; adapter: {adapter} needs it, and PEFT crashes without"
    if not any(config.get(key) for key in ("lora_target_linear", "lora_target_modules", "lora_target_parameters")):
        yield f"lora_target_linear: adapter: {adapter} has no target; write lora_target_linear: true or name lora_target_modules"
    if config.get("tokens") and not config.get("lora_modules_to_save"):
        yield "tokens: new tokens with an adapter need lora_modules_to_save: [embed_tokens, lm_head], or they are never trained"


def _adapter_keys(config: Config) -> Iterator[str]:
    if config.get("adapter"):
        return
    kinds = ("lora_", "peft_", "loraplus_lr_ratio", "relora", "qlora_")
    for key, value in config.items():
        if (
            isinstance(key, str)
            and (key.startswith(kinds) or key == "peft")
            and value
            and key not in ("lora_on_cpu", "peft_autocast_adapter_dtype")
        ):
            yield f"{key}: does nothing without an adapter; write adapter: lora or qlora, or take it out"


def _quantisation(config: Config) -> Iterator[str]:
    adapter, four, eight = config.get("adapter"), config.get("load_in_4bit"), config.get("load_in_8bit")
    if adapter == "qlora" and not four and not eight:
        yield "load_in_4bit: adapter: qlora needs load_in_4bit: true"
    if adapter == "qlora" and eight:
        yield "load_in_8bit: not with adapter: qlora; write load_in_4bit: true, or adapter: lora"
    if adapter == "lora" and four and not config.get("quantize_moe_experts"):
        yield "load_in_4bit: Axolotl ignores it with adapter: lora and loads whole weights; write adapter: qlora"
    if not adapter and (four or eight) and not is_ternary(config):  # of which ternary_faults speaks
        yield f"{'load_in_4bit' if four else 'load_in_8bit'}: packed weights cannot be trained without an adapter"
    peft = config.get("peft")
    if isinstance(peft, dict) and peft.get("loftq_config") and (four or eight):
        yield "peft.loftq_config: LoftQ packs whole weights itself; write adapter: lora and no load_in_4bit or load_in_8bit"


def _adapter_limits(config: Config) -> Iterator[str]:
    if config.get("unfrozen_parameters"):
        if config.get("adapter"):
            yield "unfrozen_parameters: freezes an adapter's own weights; write peft_layers_to_transform or lora_modules_to_save"
        patterns = config["unfrozen_parameters"]
        for pattern in patterns if isinstance(patterns, list) else ():
            try:
                re.compile(str(pattern))
            except re.error as error:
                yield f"unfrozen_parameters: {pattern!r} is no regular expression ({error})"
            if r"\." in str(pattern):
                yield f"unfrozen_parameters: {pattern!r} matches nothing, since Axolotl escapes each dot itself; write plain dots"
    if (
        config.get("peft_layers_to_transform")
        and isinstance(config.get("lora_target_modules"), str)
        and not config.get("lora_target_linear")
    ):
        yield "peft_layers_to_transform: PEFT refuses it with lora_target_modules as one text; write a list of modules"
    if config.get("relora"):
        if config.get("adapter") == "qlora":
            yield "relora: fails with adapter: qlora; its restarts put whole weights where NF4's are; write adapter: lora"
        if not config.get("jagged_restart_steps"):
            yield "jagged_restart_steps: missing; relora needs it"
    if config.get("lora_target_parameters") and config.get("lora_dropout"):
        yield "lora_dropout: must be 0 with lora_target_parameters"
    kernel = next((key for key in ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel") if config.get(key)), None)
    if kernel and config.get("trust_remote_code"):
        yield f"{kernel}: Axolotl's LoRA kernels do not know a model with code of its own; write lora_*_kernel: false"
    if kernel and config.get("adapter") == "lora" and config.get("load_in_8bit"):
        yield f"{kernel}: Axolotl's LoRA kernels cannot read the weights of load_in_8bit, and it refuses both; write lora_*_kernel: false"


def _schedule(config: Config) -> Iterator[str]:
    scheduler = config.get("lr_scheduler") or "cosine"
    if scheduler not in ("cosine", "rex") and not config.get("jagged_restart_steps"):
        for key in ("cosine_min_lr_ratio", "cosine_constant_lr_ratio", "lr_quadratic_warmup"):
            if config.get(key):
                yield f"{key}: not read with lr_scheduler: {scheduler}; write lr_scheduler: cosine"
    if config.get("cosine_constant_lr_ratio") and not config.get("cosine_min_lr_ratio"):
        yield "cosine_constant_lr_ratio: not read without cosine_min_lr_ratio"
    if config.get("activation_offloading") and not config.get("gradient_checkpointing"):
        yield "activation_offloading: needs gradient_checkpointing: true"


def _precision(config: Config) -> Iterator[str]:
    half = config.get("fp16") is True and config.get("bf16", "auto") in (False, None, "auto")
    if half and not any(config.get(key) for key in ("adapter", "deepspeed", "fsdp_config", "fsdp", "rl", "bfloat16")):
        yield "fp16: weights loaded in fp16 cannot be fine-tuned whole (gradients cannot be unscaled); write bf16: true, or use an adapter"


def _losses(config: Config) -> Iterator[str]:
    listed = plugins_of(config)
    cut = any(name.endswith("CutCrossEntropyPlugin") for name in listed) and config.get("cut_cross_entropy") is not False
    others = [key for key in ("liger_fused_linear_cross_entropy", "liger_cross_entropy", "chunked_cross_entropy") if config.get(key)]
    if len(names := [*others, *(["CutCrossEntropyPlugin"] * cut)]) > 1:
        yield f"{names[0]}: not together with {' and '.join(names[1:])}; each replaces the same loss: keep one"
    if any(name.endswith("KDPlugin") for name in listed) and not config.get("kd_trainer"):
        yield "kd_trainer: KDPlugin does nothing without kd_trainer: true"


def _output(config: Config) -> Iterator[str]:
    base, target = config.get("base_model"), config.get("output_dir")
    if isinstance(base, str) and isinstance(target, str) and os.path.normpath(base) == os.path.normpath(target):
        yield "output_dir: is base_model; training would write over the model it starts from"
    if config.get("save_safetensors") is False:
        yield "save_safetensors: false is refused, since transformers 5 writes nothing else; take it out"

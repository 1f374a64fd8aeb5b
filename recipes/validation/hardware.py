"""What a target machine cannot do: rules about GPUs by compute capability, and about training on a CPU.

Looks at no GPU; the target is what the user says it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ...surgery.errors import DowncycleError
from .keys import other_plugins, plugins_of

EXAMPLES = "sm_70 (V100), sm_75 (T4), sm_80 (A100), sm_86 (A6000), sm_89 (L40S, 4090), sm_90 (H100), sm_100 (B200), sm_120 (5090)"
ARCHS = (60, 61, 62, 70, 72, 75, 80, 86, 87, 88, 89, 90, 100, 101, 103, 110, 120, 121)
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")
AMPERE, ADA, HOPPER, TURING = 80, 89, 90, 75


def compute_capability(arch: str) -> int:
    """Read sm_80 or sm_90a as 80 or 90, the one place that does; DowncycleError for what no NVIDIA GPU has."""
    found = re.fullmatch(r"sm_(\d{2,3})[af]?", arch)
    if not found or int(found[1]) not in ARCHS:
        raise DowncycleError(f"GPU architecture {arch}: no compute capability; give one like {EXAMPLES}")
    return int(found[1])


def capabilities(gpus: int, arch: str) -> dict[str, Any]:
    """What Axolotl would find out about `gpus` GPUs of this architecture, or about a CPU where there are none."""
    number = compute_capability(arch)
    if gpus < 0:
        raise DowncycleError(f"{gpus} GPUs: give a number of GPUs, or 0 for a CPU")
    able = {
        "bf16": number >= AMPERE,
        "fp8": number >= HOPPER,
        "tf32": number >= AMPERE,
        "n_gpu": gpus,
        "compute_capability": f"sm_{number}",
    }
    return able if gpus else {"bf16": False, "fp8": False, "tf32": False, "n_gpu": 1, "compute_capability": None}


def attention(config: dict[str, Any]) -> str | None:
    """The attention that a config in today's spelling asks for, without a hub kernel's revision."""
    named = config.get("attn_implementation")
    return re.split("[:@]", named)[0].strip() if isinstance(named, str) else None


def hardware_faults(config: dict[str, Any], gpus: int, arch: str) -> list[str]:
    """Every setting that the target machine cannot run: a CPU where gpus is 0, else GPUs of this compute capability."""
    number = compute_capability(arch)
    return list(_gpu_faults(config, number, f"sm_{number}") if gpus else _cpu_faults(config))


def _gpu_faults(config: dict[str, Any], number: int, name: str) -> Iterator[str]:
    least = {
        "bf16": (config.get("bf16") is True, AMPERE, "only emulates it, slowly; write bf16: false and fp16: true"),
        "bfloat16": (config.get("bfloat16") is True, AMPERE, "only emulates it, slowly; write fp16: true"),
        "tf32": (config.get("tf32") is True, AMPERE, "has no TF32, and transformers stops; write tf32: false"),
        "fp8": (config.get("fp8") is True, HOPPER, "is refused by Axolotl; take it out"),
        "load_in_8bit": (config.get("load_in_8bit") is True, TURING, "has no int8 tensor cores; use qlora with load_in_4bit"),
        "optimizer": (config.get("optimizer") == "ao_adamw_fp8", ADA, "has no FP8; write adamw_torch_8bit"),
    }
    for key, (asked, needed, why) in least.items():
        if asked and number < needed:
            yield f"{key}: {config[key] if key == 'optimizer' else 'true'} needs sm_{needed} or newer; {name} {why}"
    wanted = attention(config) or ""
    needed = HOPPER if wanted in ("flash_attention_3", "flash_attention_4", "kernels-community/flash-attn3", "fp8") else AMPERE
    if number < needed and (needed == HOPPER or wanted in ("flash_attention_2", "kernels-community/flash-attn2", "sage")):
        yield f"attn_implementation: {wanted} needs sm_{needed} or newer, not {name}; write sdpa"
    half = config.get("fp16") is True or config.get("float16") is True
    if number < AMPERE and not half and config.get("bf16", "auto") == "auto" and not config.get("adapter") and not config.get("deepspeed"):
        yield f"bf16: auto becomes fp16 or emulated bf16 on {name}, no good for full fine-tuning; write bf16: false, or use an adapter"


def _cpu_faults(config: dict[str, Any]) -> Iterator[str]:
    if not other_plugins(config) and config.get("bf16", "auto") not in (False, None):  # another plugin may set use_cpu
        yield "bf16: a CPU needs bf16: false; left out or auto it becomes fp16, which fails there"
    for key in ("fp16", "tf32", "fp8", "load_in_8bit"):
        if config.get(key) is True:
            yield f"{key}: true does not run on a CPU; write {key}: false"
    if (wanted := attention(config)) not in ("sdpa", "eager"):
        yield f"attn_implementation: {wanted or 'unset'} does not serve on a CPU; write sdpa"
    if config.get("adapter") in ("lora", "qlora"):
        unset = all(config.get(key) is None for key in KERNELS)
        if unset or any(config.get(key) is True for key in KERNELS):
            yield f"{KERNELS[0]}: Axolotl's LoRA kernels are for GPUs and on by default; on a CPU write {', '.join(KERNELS)}: false"
    for key in ("deepspeed", "fsdp_config", "fsdp"):
        if config.get(key):
            yield f"{key}: shards over GPUs, and there is none; take it out"
    for plugin in ("liger", "cut_cross_entropy"):
        if any(f"integrations.{plugin}." in name for name in plugins_of(config)):
            yield f"plugins: {plugin} has Triton kernels, which need a GPU; take it out"
    if config.get("load_in_4bit") and (config.get("val_set_size") or config.get("test_datasets")):
        key = "val_set_size" if config.get("val_set_size") else "test_datasets"
        yield (
            f"{key}: with NF4 on a CPU, an evaluation makes all later gradients wrong on some CPUs (AVX512-BF16), and no error says "
            "so; write val_set_size: 0 and no test_datasets"
        )

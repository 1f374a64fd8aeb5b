"""Rules about training on several GPUs: FSDP, DeepSpeed and device meshes. Knows a config and a number of GPUs, and no more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from .axolotl_schema import load_keys
from .data_conflicts import number
from .deepspeed import deepspeed_faults
from .hardware import attention
from .keys import other_plugins
from .names import modern, nearest

MESH = ("dp_shard_size", "dp_replicate_size", "context_parallel_size", "tensor_parallel_size")


def assumed_gpus(config: dict[str, Any]) -> int:
    """The least GPUs that a config asks for, where nobody says how many there are: 1 unless it shards or starts Ray workers."""
    config = modern(config)
    inline, workers = config.get("deepspeed"), config.get("ray_num_workers") if config.get("use_ray") else None
    product = math.prod(_sizes(config).values())
    least = max(product, 2 if any(config.get(key) for key in ("fsdp_config", "fsdp", "use_ray", "deepspeed")) else 1)
    if isinstance(workers, int) and workers > 0:
        return workers
    batch = inline.get("train_batch_size") if isinstance(inline, dict) else None
    each = config.get("micro_batch_size", 1), config.get("gradient_accumulation_steps", 1)
    if isinstance(batch, int) and all(isinstance(size, int) and size > 0 for size in each) and batch > 0:
        return least if batch % math.prod(each) else max(1, batch // math.prod(each))
    return least


def sharding_faults(config: dict[str, Any], gpus: int) -> Iterator[str]:
    """Name what DeepSpeed, FSDP or the number of GPUs rule out; gpus counts all nodes' together."""
    fsdp = config.get("fsdp_config") if isinstance(config.get("fsdp_config"), dict) else None
    if config.get("deepspeed") and (fsdp or config.get("fsdp")):
        yield "deepspeed: not together with fsdp_config; both shard the model: keep one"
    if config.get("save_only_model") and config.get("load_best_model_at_end") and (fsdp or config.get("deepspeed")):
        yield "save_only_model: with load_best_model_at_end it is refused under FSDP and DeepSpeed; drop one of the two"
    if fsdp:
        yield from _fsdp_faults(config, fsdp, gpus)
    if config.get("tensor_parallel_size") and str(config.get("optimizer")).endswith("8bit") and config["tensor_parallel_size"] > 1:
        yield f"optimizer: {config['optimizer']} does not work with tensor_parallel_size; write adamw_torch_fused"
    yield from _mesh_faults(config, fsdp, gpus)
    yield from _parallel_faults(config)
    yield from deepspeed_faults(config, gpus)


def _parallel_faults(config: dict[str, Any]) -> Iterator[str]:
    sizes = _sizes(config)
    for key in ("liger_rms_norm", "liger_fused_linear_cross_entropy"):
        if config.get(key) and "tensor_parallel_size" in sizes:
            yield f"{key}: Liger cannot work on the parts that tensor_parallel_size makes of a layer; write {key}: false"
    if "context_parallel_size" not in sizes or config.get("use_glm_dsa_kernels"):
        return
    wanted = attention(config)
    if wanted != "flash_attention_2":
        yield f"attn_implementation: {wanted or 'unset'} cannot split a sequence (context_parallel_size); write flash_attention_2"
    if config.get("sample_packing") and (number(config.get("micro_batch_size")) or 1) > 1:
        yield "micro_batch_size: must be 1 with context_parallel_size and sample_packing; raise gradient_accumulation_steps instead"


def _fsdp_faults(config: dict[str, Any], fsdp: dict[str, Any], gpus: int) -> Iterator[str]:
    version = str(config.get("fsdp_version") or fsdp.get("fsdp_version") or fsdp.get("version") or "")
    if not version:
        yield "fsdp_version: missing; Axolotl falls back to FSDP 1, which is on its way out; write fsdp_version: 2"
    elif version not in ("1", "2"):
        yield f"fsdp_version: {version} where 1 or 2 is needed"
    if gpus == 1:
        yield "fsdp_config: FSDP needs several GPUs, and transformers refuses it on one; say how many with --gpus, or take it out"
    optimizer = config.get("optimizer")
    if version == "2" and optimizer in load_keys()["names"]["bitsandbytes_optimizer"]:
        new = "adamw_torch_8bit" if "8bit" in str(optimizer) else "adamw_torch_fused"
        yield f"optimizer: {optimizer} of bitsandbytes cannot step the sharded tensors of FSDP 2; write {new}"
    if version == "2" and config.get("load_in_4bit") and fsdp.get("cpu_ram_efficient_loading"):
        yield "fsdp_config.cpu_ram_efficient_loading: deadlocks with load_in_4bit under FSDP 2; write false"
    if fsdp.get("activation_checkpointing") and config.get("gradient_checkpointing") and not config.get("activation_offloading"):
        yield "gradient_checkpointing: not together with fsdp_config.activation_checkpointing; transformers refuses both: keep one"
    if config.get("save_only_model") and fsdp.get("state_dict_type") == "SHARDED_STATE_DICT":
        yield "save_only_model: not with fsdp_config.state_dict_type: SHARDED_STATE_DICT; write FULL_STATE_DICT"
    if config.get("relora"):
        yield "relora: not with FSDP"
    yield from _unknown_layers(config, str(fsdp.get("transformer_layer_cls_to_wrap") or ""))


def _unknown_layers(config: dict[str, Any], names: str) -> Iterator[str]:
    """Only what is close to a class of transformers is named: a model may bring classes of its own."""
    known = load_keys()["names"]["layer_class"]
    own = config.get("trust_remote_code") or other_plugins(config)
    for name in (part.strip() for part in names.split(",")):
        if name and not own and name not in known and (hint := nearest(name, known, 0.85)):
            yield f"fsdp_config.transformer_layer_cls_to_wrap: transformers has no class {name}{hint}"


def _mesh_faults(config: dict[str, Any], fsdp: dict[str, Any] | None, gpus: int) -> Iterator[str]:
    sizes = _sizes(config)
    product = math.prod(sizes.values())
    if sizes and (gpus == 0 or gpus % product):
        yield f"{next(iter(sizes))}: {' x '.join(f'{key} {size}' for key, size in sizes.items())} does not divide {gpus} GPUs; see --gpus"
    if "dp_shard_size" in sizes and not fsdp:
        yield "dp_shard_size: needs fsdp_config, or nothing is sharded"


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    """The axes of the device mesh that have more than one GPU."""
    return {key: config[key] for key in MESH if isinstance(config.get(key), int) and config[key] > 1}

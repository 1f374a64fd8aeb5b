"""Rules about training on several GPUs: FSDP, DeepSpeed and device meshes. Knows a config and a number of GPUs, and no more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .axolotl_schema import load_keys

MESH = ("dp_shard_size", "dp_replicate_size", "context_parallel_size", "tensor_parallel_size")


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


def _mesh_faults(config: dict[str, Any], fsdp: dict[str, Any] | None, gpus: int) -> Iterator[str]:
    sizes = {key: config[key] for key in MESH if isinstance(config.get(key), int) and config[key] > 1}
    product = 1
    for size in sizes.values():
        product *= size
    if sizes and (gpus == 0 or gpus % product):
        yield f"{next(iter(sizes))}: {' x '.join(f'{key} {size}' for key, size in sizes.items())} does not divide {gpus} GPUs; see --gpus"
    if "dp_shard_size" in sizes and not fsdp:
        yield "dp_shard_size: needs fsdp_config, or nothing is sharded"

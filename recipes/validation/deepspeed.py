"""Rules about DeepSpeed settings written inside an Axolotl config. Knows names of DeepSpeed's settings, and opens no file."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .names import SLIP, nearest

# Which settings DeepSpeed has in a mapping; stage3: those of zero_optimization that may begin with stage3_, too.
SETTINGS = {
    "deepspeed": (
        "activation_checkpointing aio amp autotuning bf16 bfloat16 checkpoint comet comms_logger communication_data_type compile "
        "compression_training csv_monitor curriculum_learning data_efficiency data_types dataloader_drop_last disable_allgather "
        "dump_state eigenvalue elasticity expert_parallel flops_profiler fp16 gradient_accumulation_steps gradient_allreduce_op "
        "gradient_clipping gradient_predivide_factor graph_harvesting hybrid_engine load_universal_checkpoint "
        "managed_gradient_accumulation max_grad_norm memory_breakdown monitor_config nebula optimizer pipeline prescale_gradients "
        "progressive_layer_drop quantize_training scheduler seq_parallel_communication_data_type sequence_parallel_size "
        "sparse_attention sparse_gradients steps_per_print tensor_parallel tensorboard timers torch_autocast train_batch_size "
        "train_micro_batch_size_per_gpu use_data_before_expert_parallelism use_node_local_storage vocabulary_size "
        "wall_clock_breakdown wandb weight_quantization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "zero_optimization"
    ),
    "deepspeed.zero_optimization": (
        "allgather_bucket_size allgather_partitions contiguous_gradients cpu_offload cpu_offload_param cpu_offload_use_pin_memory "
        "elastic_checkpoint enable_sanity_checks ignore_unused_parameters leaf_module legacy_stage1 load_from_fp32_weights "
        "log_trace_cache_warnings memory_efficient_linear mics_hierarchical_params_gather mics_shard_size offload_optimizer "
        "offload_param overlap_comm override_module_apply pipeline_loading_checkpoint reduce_bucket_size reduce_scatter "
        "round_robin_gradients save_muon_momentum_buffer_in_memory stage stage3_gather_fp16_weights_on_model_save sub_group_size "
        "use_multi_rank_bucket_allreduce zenflow zero_hpz_partition_size zero_quantized_gradients "
        "zero_quantized_nontrainable_weights zero_quantized_weights zeropp_loco_param"
    ),
    "stage3": (
        "allgather_sequential gather_16bit_weights_on_model_save max_live_parameters max_reuse_distance "
        "model_persistence_threshold module_granularity_threshold param_persistence_threshold prefetch_bucket_size "
        "use_all_reduce_for_fetch_params"
    ),
}


def deepspeed_faults(config: dict[str, Any], gpus: int) -> Iterator[str]:
    """Name slips in an inline DeepSpeed mapping, and numbers in it that contradict the rest of the config."""
    inline = config.get("deepspeed")
    if not isinstance(inline, dict):
        return
    yield from _slips(inline, SETTINGS["deepspeed"].split(), "deepspeed")
    if isinstance(inline.get("zero_optimization"), dict):
        path = "deepspeed.zero_optimization"
        stage3 = [prefix + name for name in SETTINGS["stage3"].split() for prefix in ("", "stage3_")]
        yield from _slips(inline["zero_optimization"], SETTINGS[path].split() + stage3, path)
    for key, ours, wanted in _expected(config, gpus):
        said = inline.get(key)
        if isinstance(said, int | float) and not isinstance(said, bool) and said != wanted:
            yield f"deepspeed.{key}: {said} where {ours} makes {wanted}, and transformers refuses the difference; write auto"


def _slips(given: dict[Any, Any], names: list[str], path: str) -> Iterator[str]:
    for key in given:
        if key not in names and (hint := nearest(str(key), names, SLIP)):
            yield f"{path}.{key}: DeepSpeed has no such setting{hint}"


def _expected(config: dict[str, Any], gpus: int) -> Iterator[tuple[str, str, float]]:
    """What transformers compares numbers of DeepSpeed with: (DeepSpeed's key, where it comes from, the number)."""
    clip = config.get("max_grad_norm")
    yield from [("gradient_clipping", "max_grad_norm", 1.0 if clip is None else clip)] if isinstance(clip, int | float | None) else ()
    micro, steps = config.get("micro_batch_size", 1), config.get("gradient_accumulation_steps", 1)
    if not isinstance(micro, int) or not isinstance(steps, int) or config.get("batch_size"):
        return
    yield "gradient_accumulation_steps", "gradient_accumulation_steps", steps
    if not config.get("auto_find_batch_size"):
        yield "train_micro_batch_size_per_gpu", "micro_batch_size", micro
        yield "train_batch_size", "micro_batch_size x gradient_accumulation_steps x GPUs", micro * steps * max(1, gpus)

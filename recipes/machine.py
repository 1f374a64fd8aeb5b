"""Fit a recipe to the user's machine: micro-batch, accumulation and sharding, so that the total batch stays as asked and memory fits.

Reckons with settings and sizes; writes no file and looks at no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..surgery.errors import DowncycleError
from .memory import GIB, ModelSize, Training, format_gib, needed_bytes, training_bytes

LARGEST_MICRO_BATCH = 16  # more sequences at once win nothing once a GPU is busy
PARALLEL = ("auto", "ddp", "fsdp2", "zero3")
USABLE = 0.97  # of a GPU's nominal memory; driver and display take the rest


@dataclass(frozen=True)
class Machine:
    """What a recipe is to run on.

    gpus: in each node, 0 for a CPU. memory: GiB of each GPU, None where the user did not say. arch: compute capability.
    """

    gpus: int = 1
    memory: float | None = None
    nodes: int = 1
    arch: str = "sm_80"

    @property
    def world(self) -> int:
        """How many processes train."""
        return max(1, self.gpus * self.nodes)

    @property
    def ampere(self) -> bool:
        """Whether its GPUs have bf16, tf32 and flash attention 2."""
        return self.gpus > 0 and int(self.arch.removeprefix("sm_")) >= 80


@dataclass(frozen=True)
class Fit:
    """How a batch is split, and what it needs on each GPU."""

    micro_batch: int
    accumulation: int
    parallel: str  # none, ddp, fsdp2 or zero3
    training: Training | None  # None where the weights are packed, or on a CPU


def check_machine(machine: Machine, parallel: str) -> None:
    """Refuse what is no machine."""
    if machine.gpus < 0 or machine.nodes < 1:
        raise DowncycleError(f"--gpus {machine.gpus} --nodes {machine.nodes}: give at least one node; --gpus 0 is a CPU")
    if machine.gpus == 0 and machine.nodes > 1:
        raise DowncycleError(f"--gpus 0 --nodes {machine.nodes}: Axolotl trains on one CPU only; leave --nodes out")
    if machine.memory is not None and not 1 <= machine.memory <= 10_000:
        raise DowncycleError(f"--gpu-memory {machine.memory:g}: give the GiB of one GPU, like 24 or 80")
    if not re.fullmatch(r"sm_[1-9]\d{1,2}", machine.arch):
        raise DowncycleError(
            f"--gpu-arch {machine.arch}: give a compute capability, like sm_75 (T4), sm_80 (A100), sm_86 (A6000), sm_90 (H100)"
        )
    if parallel not in PARALLEL:
        raise DowncycleError(f"--parallel {parallel}: choose one of {', '.join(PARALLEL)}")
    if parallel != "auto" and machine.world == 1:
        raise DowncycleError(f"--parallel {parallel}: there is one GPU; give more --gpus or --nodes")


def fit(size: ModelSize, method: str, settings: Mapping[str, Any], machine: Machine, *, batch: int, micro_batch: int, parallel: str) -> Fit:
    """Split a batch of `batch` sequences over the machine.

    With the GPUs' memory known, the largest micro-batch that fits is taken, unsharded if that fits at all; else `micro_batch` at most.
    A micro_batch_size in `settings` is kept, and so are gradient_accumulation_steps.

    Raises:
        DowncycleError: the batch cannot be split so, or nothing fits; says what would.
    """
    sizes, each = _micro_batches(settings, machine, batch)
    modes = _modes(method, machine, parallel)
    if size.packed or machine.gpus == 0 or machine.memory is None:
        largest = max(sizes[-1], max((n for n in sizes if n <= micro_batch), default=sizes[-1]))
        needs = None if size.packed or machine.gpus == 0 else estimate(size, method, settings, largest, machine, modes[0])
        return Fit(largest, each // largest, modes[0], needs)
    for mode in modes:
        for micro in (n for n in sizes if n <= LARGEST_MICRO_BATCH or len(sizes) == 1):
            needs = estimate(size, method, settings, micro, machine, mode)
            if needed_bytes(needs) <= machine.memory * GIB * USABLE:
                return Fit(micro, each // micro, mode, needs)
    least = needed_bytes(estimate(size, method, settings, sizes[-1], machine, modes[-1]))
    raise DowncycleError(
        f"does not fit: {method} training with micro_batch_size {sizes[-1]} and sequence_len {settings['sequence_len']} needs about "
        f"{format_gib(least)} on each GPU, which has {machine.memory:g} GiB; {_advice(method, machine, modes[-1])}"
    )


def _micro_batches(settings: Mapping[str, Any], machine: Machine, batch: int) -> tuple[list[int], int]:
    """Return the micro-batches that a batch can be split into, the largest first, and how many sequences each GPU gets in a step."""
    each, left = divmod(batch, machine.world)
    given, steps = (settings.get(key) for key in ("micro_batch_size", "gradient_accumulation_steps"))
    if any(number is not None and (type(number) is not int or number < 1) for number in (given, steps)) or batch < 1:
        raise DowncycleError(f"--batch {batch}, micro_batch_size {given}, gradient_accumulation_steps {steps}: give whole numbers from 1")
    if given is not None and steps is not None:
        return [given], given * steps
    if left:
        raise DowncycleError(
            f"a batch of {batch} sequences cannot be split over {machine.world} GPUs; "
            f"give --batch {' or '.join(str(n * machine.world) for n in (each, each + 1) if n)}"
        )
    if each % (given or steps or 1):
        raise DowncycleError(
            f"{batch} sequences on {machine.world} GPUs are {each} on each, which micro_batch_size {given} or gradient_accumulation_steps "
            f"{steps} does not divide; change it, or --batch"
        )
    return [given] if given else [each // steps] if steps else [n for n in range(each, 0, -1) if each % n == 0], each


def estimate(size: ModelSize, method: str, settings: Mapping[str, Any], micro_batch: int, machine: Machine, mode: str) -> Training:
    """Estimate what one GPU needs with these settings."""
    sharded = mode in ("fsdp2", "zero3")
    optimizer = str(settings.get("optimizer", ""))
    whole = method in ("full", "tail")
    return training_bytes(
        size,
        method,
        tokens=micro_batch * settings["sequence_len"],
        rank=settings.get("lora_r") or 0,
        trained_layers=len([pattern for pattern in settings.get("unfrozen_parameters") or () if re.search(r"\.\d+\.$", pattern)]),
        adam_bits=8 if "8bit" in optimizer else 16 if whole and not sharded and "32bit" not in optimizer else 32,
        fused_loss=bool(settings.get("liger_fused_linear_cross_entropy") or settings.get("cut_cross_entropy")),
        checkpointing=bool(settings.get("gradient_checkpointing")),
        shards=machine.world if sharded else 1,
    )


def _modes(method: str, machine: Machine, parallel: str) -> list[str]:
    """Ways to use the GPUs, the simplest first."""
    if machine.world == 1:
        return ["none"]
    if parallel != "auto":
        return [parallel]
    if machine.memory is None:
        return ["fsdp2" if method == "full" else "ddp"]
    return ["ddp", "fsdp2"]


def _advice(method: str, machine: Machine, mode: str) -> str:
    less = [] if method == "qlora" else ["--preset qlora"]
    more = [] if mode == "ddp" else ["more --gpus"]
    return "try " + ", ".join([*less, *more, *(["--parallel fsdp2"] if mode == "ddp" else [])]) + " or --set sequence_len=2048"


def parallel_settings(mode: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keys that shard a training over GPUs."""
    if mode == "fsdp2":
        return {
            "fsdp_version": 2,
            "fsdp_config": {
                "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
                "state_dict_type": "FULL_STATE_DICT",
                "reshard_after_forward": True,
                "offload_params": False,
                "cpu_ram_efficient_loading": not settings.get("load_in_4bit"),
            },
        }
    if mode == "zero3":
        return {
            "deepspeed": {
                "zero_optimization": {
                    "stage": 3,
                    "overlap_comm": True,
                    "contiguous_gradients": True,
                    "stage3_gather_16bit_weights_on_model_save": True,
                },
                "bf16": {"enabled": "auto"},
                "fp16": {"enabled": "auto"},
                "gradient_accumulation_steps": "auto",
                "gradient_clipping": "auto",
                "train_batch_size": "auto",
                "train_micro_batch_size_per_gpu": "auto",
            }
        }
    return {}

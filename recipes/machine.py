"""Fit a recipe to the user's machine: micro-batch, accumulation and sharding, so that the total batch stays as asked and memory fits.

Reckons with settings and sizes; writes no file and looks at no GPU.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..surgery.errors import DowncycleError
from .memory import GIB, ModelSize, Training, format_gib, needed_bytes, training_bytes
from .validation.hardware import AMPERE, compute_capability
from .validation.model_faults import parameter_pattern
from .validation.ternary import is_ternary, ternary_section

LARGEST_MICRO_BATCH = 16  # more sequences at once win nothing once a GPU is busy
PARALLEL = ("auto", "ddp", "fsdp2", "zero3")
USABLE = 0.92  # of the memory that a GPU is sold with: error correction and the driver take the rest
QLORA = {"adapter": "qlora", "load_in_4bit": True, "lora_r": 128, "lora_target_linear": True, "unfrozen_parameters": None}
SMALL_ADAM = "adamw_torch_8bit"  # torchao's: two moments of 8 bits
FUSED = {"liger_fused_linear_cross_entropy": True, "eval_batch_size": 1}


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
        return self.gpus > 0 and compute_capability(self.arch) >= AMPERE


@dataclass(frozen=True)
class Fit:
    """How a batch is split, and what it needs on each GPU. replicas: how many parts of a batch are trained on at a time."""

    micro_batch: int
    accumulation: int
    replicas: int
    parallel: str  # none, ddp, fsdp2 or zero3
    training: Training | None  # None on a CPU

    @property
    def batch(self) -> int:
        """Sequences in one optimiser step."""
        return self.micro_batch * self.accumulation * self.replicas


def check_machine(machine: Machine, parallel: str) -> None:
    """Refuse what is no machine."""
    if machine.gpus < 0 or machine.nodes < 1:
        raise DowncycleError(f"--gpus {machine.gpus} --nodes {machine.nodes}: give GPUs from 0, which is a CPU, and nodes from 1")
    if machine.gpus == 0 and machine.nodes > 1:
        raise DowncycleError(f"--gpus 0 --nodes {machine.nodes}: Axolotl trains on one CPU only; leave --nodes out")
    if machine.memory is not None and not 1 <= machine.memory <= 10_000:
        raise DowncycleError(f"--gpu-memory {machine.memory:g}: give the GiB of one GPU, like 24 or 80")
    compute_capability(machine.arch)
    if parallel not in PARALLEL:
        raise DowncycleError(f"--parallel {parallel}: choose one of {', '.join(PARALLEL)}")
    if parallel != "auto" and machine.world == 1:
        raise DowncycleError(f"--parallel {parallel}: there is one GPU; give more --gpus or --nodes")


def fit(
    size: ModelSize, settings: Mapping[str, Any], machine: Machine, *, batch: int | None, default: int, micro_batch: int, parallel: str
) -> Fit:
    """Split a batch of `batch` sequences, or of `default` where the user asked for none, over the machine.

    With the GPUs' memory known, the largest micro-batch that fits is taken, unsharded if that fits at all; else `micro_batch` at most.
    A micro_batch_size in `settings` is kept, and so are gradient_accumulation_steps.

    Raises:
        DowncycleError: the batch cannot be split so, or nothing fits; says what would.
    """
    replicas = _replicas(settings, machine)
    sizes, each = _micro_batches(settings, replicas, batch, default)
    modes = _modes(settings, machine, parallel)
    if machine.gpus == 0 or machine.memory is None:
        largest = max(sizes[-1], max((n for n in sizes if n <= micro_batch), default=sizes[-1]))
        needs = estimate(size, settings, largest, machine, modes[0]) if machine.gpus else None
        return Fit(largest, each // largest, replicas, modes[0], needs)
    for mode in modes:
        for micro in (n for n in sizes if n <= LARGEST_MICRO_BATCH or len(sizes) == 1):
            needs = estimate(size, settings, micro, machine, mode)
            if _fits(needs, machine.memory):
                return Fit(micro, each // micro, replicas, mode, needs)
    least = needed_bytes(estimate(size, settings, sizes[-1], machine, modes[-1]))
    raise DowncycleError(
        f"does not fit: {_method(settings)} training with micro_batch_size {sizes[-1]} and sequence_len {settings['sequence_len']} needs "
        f"about {format_gib(least)} on each GPU, of which {machine.memory:g} GB have {machine.memory * USABLE:.3g} GiB for it; "
        f"{_advice(size, settings, machine, sizes[-1], modes[-1])}"
    )


def _fits(needs: Training, memory: float) -> bool:
    return needed_bytes(needs) <= memory * GIB * USABLE


def _replicas(settings: Mapping[str, Any], machine: Machine) -> int:
    """How many GPUs, or groups of them that share each sequence, train on parts of their own."""
    group = (settings.get("context_parallel_size") or 1) * (settings.get("tensor_parallel_size") or 1)
    replicas, left = divmod(machine.world, group)
    if left or not replicas:
        raise DowncycleError(
            f"context_parallel_size x tensor_parallel_size is {group}, which does not divide {machine.world} GPUs; change them or --gpus"
        )
    return replicas


def _micro_batches(settings: Mapping[str, Any], replicas: int, batch: int | None, default: int) -> tuple[list[int], int]:
    """Return the micro-batches that a batch can be split into, the largest first, and how many sequences each GPU gets in a step."""
    given, steps = (settings.get(key) for key in ("micro_batch_size", "gradient_accumulation_steps"))
    named = {"--batch": batch, "micro_batch_size": given, "gradient_accumulation_steps": steps}
    said = ", ".join(f"{name} {number}" for name, number in named.items() if number is not None)
    if any(number is not None and (type(number) is not int or number < 1) for number in named.values()):
        raise DowncycleError(f"{said}: give whole numbers from 1")
    if given and steps:
        if batch not in (None, given * steps * replicas):
            raise DowncycleError(
                f"{said} and {_gpus(replicas)} contradict each other: leave one out, or ask for {given * steps * replicas}"
            )
        return [given], given * steps
    each, left = divmod(batch or default, replicas)
    if left:
        raise DowncycleError(
            f"a batch of {batch or default} sequences cannot be split over {_gpus(replicas)}; "
            f"give --batch {' or '.join(str(n * replicas) for n in (each, each + 1) if n)}"
        )
    if each % (given or steps or 1):
        raise DowncycleError(
            f"{batch or default} sequences on {_gpus(replicas)} are {each} on each, which "
            f"{f'micro_batch_size {given}' if given else f'gradient_accumulation_steps {steps}'} does not divide; change it, or --batch"
        )
    return [given] if given else [each // steps] if steps else [n for n in range(each, 0, -1) if each % n == 0], each


def _gpus(count: int) -> str:
    return f"{count} GPU{'s' if count > 1 else ''}"


def estimate(size: ModelSize, settings: Mapping[str, Any], micro_batch: int, machine: Machine, mode: str) -> Training:
    """Estimate what one GPU needs with these settings."""
    optimizer, length = str(settings.get("optimizer", "")), settings["sequence_len"]
    evaluated = bool(settings.get("val_set_size") or settings.get("test_datasets"))
    frozen = "nf4" if settings.get("load_in_4bit") else "int8" if settings.get("load_in_8bit") else "bf16"
    return training_bytes(
        size,
        tokens=micro_batch * length,
        trained=_trained(size, settings),
        added=_added(size, settings) if settings.get("adapter") else 0,
        frozen=frozen,
        adam_bits=8 if "8bit" in optimizer else 32 if "32bit" in optimizer else None,
        fused_loss=bool(settings.get("liger_fused_linear_cross_entropy") or settings.get("cut_cross_entropy")),
        checkpointing=bool(settings.get("gradient_checkpointing")),
        evaluated=(settings.get("eval_batch_size") or micro_batch) * length if evaluated else 0,
        parallel=mode,
        shards=machine.world,
        offloaded=bool((settings.get("fsdp_config") or {}).get("offload_params")),
        ternary=is_ternary(settings),
        teacher=is_ternary(settings) and bool(ternary_section(settings).get("distill")),
    )


def _trained(size: ModelSize, settings: Mapping[str, Any]) -> int:
    """How many of the model's own parameters are trained."""
    if settings.get("adapter"):
        return 0
    patterns = settings.get("unfrozen_parameters")
    if not patterns:
        return size.elements
    matches = [parameter_pattern(pattern).match for pattern in patterns]
    return sum(count for name, count in size.parameters.items() if any(match(name) for match in matches))


def _added(size: ModelSize, settings: Mapping[str, Any]) -> int:
    """How many float32 parameters an adapter has: those of LoRA, and the modules that it trains whole."""

    def named(names: Any, module: str) -> bool:
        if isinstance(names, str):
            return bool(re.fullmatch(names, module))
        return any(module == name or module.endswith(f".{name}") for name in names or ())

    targets, whole = settings.get("lora_target_modules"), settings.get("lora_modules_to_save") or ()
    everywhere = settings.get("lora_target_linear") or not targets
    width = size.lora_width(lambda module: bool(everywhere) or named(targets, module))
    saved = sum(count for name, count in size.parameters.items() if named(whole, name.rpartition(".")[0]))
    return (settings.get("lora_r") or 0) * width + saved


def _method(settings: Mapping[str, Any]) -> str:
    if is_ternary(settings):
        return "ternary"
    return settings.get("adapter") or ("tail" if settings.get("unfrozen_parameters") else "full")


def _modes(settings: Mapping[str, Any], machine: Machine, parallel: str) -> list[str]:
    """Ways to use the GPUs, the simplest first. A model that is trained whole is sharded: DDP would hold its gradients twice."""
    if machine.world == 1:
        return ["none"]
    if parallel != "auto":
        return [parallel]
    if _method(settings) in ("full", "ternary"):
        return ["fsdp2"]
    return ["ddp"] if machine.memory is None else ["ddp", "fsdp2"]


def _advice(size: ModelSize, settings: Mapping[str, Any], machine: Machine, micro: int, mode: str) -> str:
    """Name the changes that would each make it fit; of each kind the least."""
    sharding = "fsdp2" if mode in ("none", "ddp") else mode
    short, lean, small = {"sequence_len": min(2048, settings["sequence_len"])}, QLORA | FUSED, {"optimizer": SMALL_ADAM}
    other: dict[str, tuple[Mapping[str, Any], int, Machine, str]] = {
        "--preset qlora": (lean, 1, machine, mode),
        "--preset qlora --set sequence_len=2048": (lean | short, 1, machine, mode),
    }
    if is_ternary(settings):  # which no other preset does
        other = {f"--set optimizer={SMALL_ADAM}": (small, micro, machine, mode)}
    kinds: list[dict[str, tuple[Mapping[str, Any], int, Machine, str]]] = [
        {"--set micro_batch_size=1": ({}, 1, machine, mode)},
        {"--set sequence_len=2048": (short, micro, machine, mode)},
        other,
        {"--parallel fsdp2": ({}, micro, machine, sharding if machine.world > 1 else mode)},
        {"--set fsdp_config.offload_params=true": ({"fsdp_config": {"offload_params": True}}, micro, machine, mode)},
        {f"--gpus {n}": ({}, micro, replace(machine, gpus=n), sharding) for n in (2, 4, 8) if n > machine.gpus},
    ]

    def would_fit(keys: Mapping[str, Any], at_once: int, there: Machine, how: str) -> bool:
        return _fits(estimate(size, {**settings, **keys}, at_once, there, how), machine.memory or 0)

    fitting = [way for ways in kinds for way in [next((way for way, change in ways.items() if would_fit(*change)), "")] if way]
    return f"what would fit: {', or '.join(fitting[:4])}" if fitting else "it needs larger GPUs, or a smaller model"


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

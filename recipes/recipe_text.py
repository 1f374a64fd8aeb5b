"""A recipe as YAML that a person can run and read: a head that says what it needs and how it is launched, then the keys in blocks."""

from __future__ import annotations

import shlex
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..surgery.naming import folder_name, format_size
from ..surgery.ternary.warmup import USUAL
from ..terminal import printable
from .machine import Machine
from .memory import GIB, Training, format_gib, kv_cache_bytes, needed_bytes, weight_bytes
from .presets import BLOCKS, PRESETS, Setting
from .recipe import Recipe
from .validation.own_plugins import SECTION
from .validation.ternary import is_ternary

MARK = "# unchanged since it was written: "


def recipe_text(recipe: Recipe, path: str) -> str:
    """Spell a recipe as the file `path`."""
    body = "\n".join([*_head(recipe, path), "", *_blocks(recipe)]) + "\n"
    return f"{body}\n{MARK}{_digest(body)}\n"


def is_untouched(text: str) -> bool:
    """Whether a file is a recipe as it was written, without a change by hand."""
    body, mark, digest = text.rpartition(f"\n{MARK}")
    return bool(mark) and digest.strip() == _digest(body)


def _digest(body: str) -> str:
    return sha256(body.encode()).hexdigest()[:16]


def _head(recipe: Recipe, path: str) -> list[str]:
    preset, path = PRESETS[recipe.preset], shlex.quote(path)
    layers = f"{recipe.size.layers} layer{'s' if recipe.size.layers > 1 else ''}"
    lines = [
        f"{recipe.base_model} ({format_size(recipe.size.elements)} parameters, {layers}): {preset.purpose}.",
        f"Written by downcycle {version('downcycle')}, preset {recipe.preset}, for Axolotl 0.19.",
        "",
        *([] if Path(recipe.base_model).is_absolute() else [f"In the folder where {recipe.base_model} lies:"]),
        *_launch(recipe, path),
        *_after(recipe),
        "",
        _batch(recipe),
        *_memory(recipe),
    ]
    return [f"# {printable(line)}".rstrip() for line in lines]


def _after(recipe: Recipe) -> list[str]:
    """What comes after the training."""
    outputs, healed = str(recipe.config.get("output_dir")), recipe.base_model.rstrip("/") + "-healed"
    if is_ternary(recipe.config):
        on = f"To train on, with most of the published text: downcycle recipe {shlex.quote(outputs)} --preset ternary-long"
        packs = f"  downcycle ternarize {shlex.quote(outputs)} --out {shlex.quote(_packed(recipe))}"
        return [packs] if PRESETS[recipe.preset].goes_on else [packs, on]
    if not recipe.config.get("adapter"):
        return [f"The healed model is {outputs} then{'' if recipe.machine.gpus else ', in float32'}."]
    return [f"  downcycle merge {shlex.quote(recipe.base_model)} {shlex.quote(outputs)} --out {shlex.quote(healed)}"]


def _packed(recipe: Recipe) -> str:
    """The name of the packed model: the base's with -1.58, or, where that has it already, that of the training."""
    name = recipe.base_model.rstrip("/")
    trained = folder_name(str(recipe.config.get("output_dir")))
    packed = trained if PRESETS[recipe.preset].goes_on else f"{name}-1.58"
    return f"{packed}-packed" if packed == recipe.config.get("output_dir") else packed


def _launch(recipe: Recipe, path: str) -> list[str]:
    """The command that trains, for one process, several GPUs, several nodes, or Ray."""
    machine = recipe.machine
    if recipe.config.get("use_ray"):
        start = ["  ray start --head                      # on the first node", "  ray start --address FIRST:6379        # on every other"]
        shared = ["Text, model and outputs must lie where every node sees them."]
        return [*([*start, *shared] if machine.nodes > 1 else []), f"  axolotl train {path} --use-ray"]
    if machine.gpus == 0:
        return [f"  axolotl train {path} --launcher python"]
    if machine.nodes > 1:
        rendezvous = (
            f"--nnodes {machine.nodes} --nproc_per_node {machine.gpus} --rdzv_backend c10d --rdzv_id heal --rdzv_endpoint FIRST:29400"
        )
        return [
            f"on each of the {machine.nodes} nodes, FIRST being the address of one of them:",
            f"  torchrun {rendezvous} -m axolotl.cli.train {path}",
        ]
    if machine.gpus > 1:
        return [f"  axolotl train {path} --launcher torchrun -- --nproc_per_node {machine.gpus}"]
    return [f"  axolotl train {path}        # takes all GPUs there are: show it one, with CUDA_VISIBLE_DEVICES=0"]


def _batch(recipe: Recipe) -> str:
    """How a step's batch comes about, and how many steps there are."""
    split, config = recipe.fit, recipe.config
    ways = {"none": "", "ddp": ", DDP", "fsdp2": ", sharded by FSDP2", "zero3": ", sharded by DeepSpeed ZeRO-3"}[split.parallel]
    group = recipe.machine.world // split.replicas
    shared = f", {group} to each sequence," if group > 1 else ""
    tokens = split.batch * config["sequence_len"]
    line = (
        f"Batch: {split.batch} sequences = {_processes(recipe.machine)}{shared} x {split.micro_batch} x {split.accumulation} steps "
        f"accumulated{ways}; {'' if config.get('sample_packing') else 'up to '}{tokens:,} tokens."
    )
    ends = f" The run has {config['max_steps']:,} such steps{_lambda(config)}." if is_ternary(config) and config.get("max_steps") else ""
    if not recipe.text.tokens:
        return line + ends
    steps = -(-recipe.text.tokens // tokens)
    if not config.get("sample_packing"):  # each document is a sequence of its own, or more than one
        steps = max(steps, -(-(recipe.text.documents or 0) // split.batch))
    line += f" {recipe.text.tokens:,} tokens of text: about {steps:,} step{'s' if steps > 1 else ''} an epoch.{ends}"
    run = config.get("max_steps") or steps * (config.get("num_epochs") or 1)
    if (config.get("warmup_steps") or 0) >= run:
        line += f" All {run} steps of this run are warm-up: set warmup_steps lower."
    return line


def _lambda(config: dict[str, Any]) -> str:
    """Where lambda reaches 1 too late."""
    settings = config.get(SECTION) or {}
    steps = settings.get("warmup_steps", USUAL["linear"])
    late = settings.get("schedule", "linear") == "linear" and steps is not None and steps >= config["max_steps"]
    return f", in which lambda does not reach 1: set {SECTION}.warmup_steps lower" if late else ""


def _processes(machine: Machine) -> str:
    if machine.gpus == 0:
        return "1 CPU"
    nodes = f"{machine.nodes} nodes x " if machine.nodes > 1 else ""
    return f"{nodes}{machine.gpus} GPU{'s' if machine.gpus > 1 else ''}"


def _memory(recipe: Recipe) -> list[str]:
    size, training = recipe.size, recipe.fit.training
    lines = []
    if training:
        has = f" of {recipe.machine.memory:g}" if recipe.machine.memory else ""
        total = needed_bytes(training)
        spare = f", fragments {(total - training.total) / GIB:.1f}"
        lines.append(f"Training needs about {total / GIB:.1f}{has} GiB on each GPU: {_parts(training)}{spare}.")
    length = recipe.config["sequence_len"]
    cache = f"; KV cache {format_gib(kv_cache_bytes(size, length))} for {length} tokens" if size.cache else ""
    weights = ", ".join(f"{dtype} {format_gib(weight_bytes(size, dtype))}" for dtype in ("bf16", "int8", "nf4"))
    lines.append(f"The model needs: {weights}{cache}.")
    return lines


def _parts(training: Training) -> str:
    return ", ".join(f"{name} {count / GIB:.1f}" for name, count in vars(training).items() if count >= 0.05 * GIB)


def _blocks(recipe: Recipe) -> list[str]:
    lines: list[str] = []
    named = {key for keys in BLOCKS.values() for key in keys}
    blocks = {**BLOCKS, "more": tuple(key for key in recipe.settings if key not in named)}
    for title, keys in blocks.items():
        entries = [_entry(key, recipe.settings[key]) for key in keys if key in recipe.settings]
        if entries:
            lines += [f"# {title}", *(line for entry in entries for line in entry), ""]
    return lines[:-1]


def _entry(key: str, setting: Setting) -> list[str]:
    """Spell one key, its reason behind it, or behind the key of a nested value."""
    lines = spell_yaml({key: setting.value}).splitlines()
    if setting.why:
        lines[0] += f"  # {setting.why}"
    return lines


def spell_yaml(value: Any) -> str:
    """Write a value as block-style YAML, in its own order."""
    import yaml

    class Plain(yaml.SafeDumper):
        """Lists indented below their key."""

        def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
            """Indent a list as a mapping is."""
            super().increase_indent(flow, False)

    Plain.ignore_aliases = lambda self, data: True  # type: ignore[method-assign, assignment]
    return yaml.dump(value, Dumper=Plain, sort_keys=False, allow_unicode=True, width=1000)

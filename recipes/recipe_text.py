"""A recipe as YAML that a person can run and read: a head that says what it needs and how it is launched, then the keys in blocks."""

from __future__ import annotations

import shlex
from hashlib import sha256
from importlib.metadata import version
from typing import Any

from ..surgery.naming import format_size
from ..terminal import printable
from .machine import Machine
from .memory import GIB, Training, format_gib, kv_cache_bytes, needed_bytes, weight_bytes
from .presets import BLOCKS, PRESETS, Setting
from .recipe import Recipe

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
    preset, config = PRESETS[recipe.preset], recipe.config
    model, path = shlex.quote(recipe.base_model), shlex.quote(path)
    layers = f"{recipe.size.layers} layer{'s' if recipe.size.layers > 1 else ''}"
    lines = [
        f"{recipe.base_model} ({format_size(recipe.size.elements)} parameters, {layers}): {preset.purpose}.",
        f"Written by downcycle {version('downcycle')}, preset {recipe.preset}, for Axolotl 0.19.",
        "",
        *_launch(recipe.machine, recipe.fit.parallel, bool(config.get("use_ray")), path),
    ]
    if config.get("adapter"):
        adapter, healed = (shlex.quote(name) for name in (str(config.get("output_dir")), recipe.base_model.rstrip("/") + "-healed"))
        lines.append(f"  downcycle merge {model} {adapter} --out {healed}")
    lines += ["", _batch(recipe), *_memory(recipe)]
    return [f"# {printable(line)}".rstrip() for line in lines]


def _launch(machine: Machine, parallel: str, ray: bool, path: str) -> list[str]:
    """The command that trains, for one process, several GPUs, several nodes, or Ray."""
    if ray:
        start = ["  ray start --head                      # on the first node", "  ray start --address FIRST:6379        # on every other"]
        return [*(start if machine.nodes > 1 else []), f"  axolotl train {path}"]
    if machine.gpus == 0:
        return [f"  axolotl train {path} --launcher python"]
    if machine.nodes > 1:
        rendezvous = (
            f"--nnodes {machine.nodes} --nproc_per_node {machine.gpus} --rdzv_backend c10d --rdzv_id heal --rdzv_endpoint FIRST:29400"
        )
        return [
            f"On each of the {machine.nodes} nodes, FIRST being the address of one of them:",
            f"  torchrun {rendezvous} -m axolotl.cli.train {path}",
        ]
    if machine.gpus > 1:
        return [f"  axolotl train {path} --launcher torchrun -- --nproc_per_node {machine.gpus}"]
    return [f"  axolotl train {path}"]


def _batch(recipe: Recipe) -> str:
    split, machine, length = recipe.fit, recipe.machine, recipe.config["sequence_len"]
    batch = split.micro_batch * split.accumulation * machine.world
    ways = {"none": "", "ddp": ", DDP", "fsdp2": ", sharded by FSDP2", "zero3": ", sharded by DeepSpeed ZeRO-3"}[split.parallel]
    line = f"Batch: {batch} sequences = {_processes(machine)} x {split.micro_batch} x {split.accumulation} steps accumulated{ways}; "
    line += f"{'' if recipe.config.get('sample_packing') else 'up to '}{batch * length:,} tokens."
    if recipe.tokens:
        line += f" {recipe.tokens:,} tokens of text: about {-(-recipe.tokens // (batch * length)):,} steps an epoch."
    return line


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
        lines.append(f"Training needs about {needed_bytes(training) / GIB:.1f}{has} GiB on each GPU: {_parts(training)}.")
    if not size.packed:
        cache = f"; KV cache {format_gib(kv_cache_bytes(size, 8192))} for 8192 tokens" if size.cache else ""
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

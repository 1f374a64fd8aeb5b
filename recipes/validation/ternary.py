"""What contradicts ternary training, in a config and in its model's: asked by a check, and by TernaryPlugin when a training begins.

Knows neither pydantic, Axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

from ...surgery.errors import DowncycleError
from ...surgery.families import CONV1D
from ...surgery.quantizer import packed_by
from ...surgery.ternary.record import read_record
from ...surgery.ternary.rule import Rule
from ...surgery.ternary.warmup import SCHEDULES, Warmup
from .data_conflicts import number
from .keys import plugins_of
from .own_plugins import SECTION, TERNARY

Config = dict[str, Any]

HEAD = "lm_head"
PACKED = ("load_in_4bit", "load_in_8bit")
# Keys that change weights in ways of their own, and why ternary training cannot go with them.
UNFIT = {
    "adapter": "ternary training moves every weight, and an adapter leaves them as they are; take it out, and load_in_4bit or load_in_8bit",
    **dict.fromkeys(PACKED, "ternary training moves every weight, and packed ones cannot be moved; take it out"),
    "qat": "Axolotl's own rounding, a second one; take it out",
    "use_onebitllms": "another package's ternary maps, in the place of ours; take it out",
    "rl": "it learns from text alone; take it out",
    "fp8": "rounds the same maps to 8 bits; take it out",
    "deepspeed": "keeps weights and lambda in bf16, where small updates are lost; shard with fsdp_config and fsdp_version: 2",
    "bfloat16": "keeps the weights in bf16, where small updates are lost; write bf16: auto",
}
FUSED = ("liger_fused_linear_cross_entropy", "cut_cross_entropy")


def is_ternary(config: Mapping[str, Any]) -> bool:
    """Whether a config trains ternary weights."""
    return TERNARY in plugins_of(dict(config))


def ternary_faults(config: Config) -> Iterator[str]:
    """Name what contradicts ternary training in a config that lists TernaryPlugin."""
    if is_ternary(config):
        yield from training_faults(config)


def training_faults(config: Config) -> Iterator[str]:
    """Name what of a config contradicts ternary training, or itself; slips in keys are for keys.py, and for Axolotl."""
    settings = ternary_section(config)
    for key, why in UNFIT.items():
        if config.get(key) and not (key in PACKED and config.get("adapter")):
            yield f"{key}: not with TernaryPlugin: {why}"
    yield from _sharding(config)
    yield from _warmup(settings)
    yield from _patterns(config, settings)
    if isinstance(settings.get("distill"), dict):
        yield from _distillation(config, settings["distill"])


def base_faults(settings: Config, fields: Mapping[str, Any], name: str) -> Iterator[str]:
    """Name what hinders training a model ternary, by its config.json.

    Args:
        settings: what stands under `downcycle_ternary`. fields: those of the model's config. name: what the model is called.
    """
    if quantiser := packed_by(fields):
        yield f"base_model: its weights are packed by {quantiser} already; give the model as it was before"
        return
    if (kind := fields.get("model_type")) in CONV1D:
        yield f"base_model: {kind} has no linear maps that transformers runs with ternary weights"
        return
    try:
        before = read_record(fields, name)
    except DowncycleError as error:
        yield f"{SECTION}: {error}"
        return
    if before and before.norm and not settings.get("norm"):
        yield f"{SECTION}.norm: base_model was trained with a norm before each ternary map; write norm: true"
    distill = settings.get("distill")
    if before and isinstance(distill, dict) and not distill.get("teacher"):
        yield f"{SECTION}.distill.teacher: missing; base_model was trained ternary already and is no teacher of itself"


def base_notes(config: Config, fields: Mapping[str, Any], name: str) -> Iterator[str]:
    """Name what of an earlier ternary training, of which the model's config.json tells, a config would undo."""
    try:
        before = read_record(fields, name)
    except DowncycleError:
        return  # for base_faults to say, where it matters
    if before is None or packed_by(fields):
        return
    if not is_ternary(config):
        on = "ternary-long" if before.whole else "ternary"
        yield (
            "base_model: was trained ternary, and training without TernaryPlugin undoes that; to go on with it: "
            f"`downcycle recipe DIR --preset {on}`; to undo it, take {SECTION} out of its config.json"
        )
    elif before.whole and _begins_at_0(ternary_section(config)):
        yield (
            f"{SECTION}: base_model was trained until lambda was 1, which goes back to 0 here; to go on where that ended: "
            "`downcycle recipe DIR --preset ternary-long`, or schedule: linear and warmup_steps: 0"
        )


def _begins_at_0(settings: Config) -> bool:
    return (settings.get("schedule") or "linear") != "linear" or number(settings.get("warmup_steps")) != 0


def ternary_section(config: Mapping[str, Any]) -> Config:
    """Return what stands under `downcycle_ternary`; nothing where it is no mapping, which is for keys.py to say."""
    found = config.get(SECTION)
    return found if isinstance(found, dict) else {}


def rule_of(settings: Config) -> Rule:
    """Return which maps become ternary by what stands under `downcycle_ternary`; DowncycleError for what is no regular expression."""
    listed = {key: settings[key] for key in ("include", "exclude") if isinstance(settings.get(key), list)}
    return Rule(**{key: tuple(pattern for pattern in patterns if isinstance(pattern, str)) for key, patterns in listed.items()})


def _sharding(config: Config) -> Iterator[str]:
    fsdp = config.get("fsdp_config")
    version = config.get("fsdp_version") or (fsdp.get("fsdp_version") or fsdp.get("version") if isinstance(fsdp, dict) else None)
    if (fsdp or config.get("fsdp")) and str(version) == "1":  # which Axolotl writes where none is given
        yield "fsdp_version: 1 flattens the weights, whose mean each map needs, and keeps lambda in 16 bits; write fsdp_version: 2"
    if (number(config.get("tensor_parallel_size")) or 1) > 1:
        yield "tensor_parallel_size: not with TernaryPlugin: a part of a matrix has another scale than the whole; shard with fsdp_config"


def _warmup(settings: Config) -> Iterator[str]:
    schedule = settings.get("schedule") or "linear"
    if schedule not in list(SCHEDULES):
        return
    unread = "k" if schedule == "linear" else "warmup_steps"
    if settings.get(unread) is not None:
        read = "warmup_steps" if schedule == "linear" else "k"
        yield f"{SECTION}.{unread}: not read with schedule: {schedule}, which has {read}; take it out"
    elif (k := number(settings.get("k"))) is not None:
        try:
            Warmup(schedule, k)
        except DowncycleError as error:
            yield f"{SECTION}.{error}"


def _patterns(config: Config, settings: Config) -> Iterator[str]:
    try:
        rule = rule_of(settings)
    except DowncycleError as error:
        yield f"{SECTION}: {error}"
        return
    if (fused := _fused(config)) and rule.takes(HEAD):
        yield f"{fused}: multiplies with the head's weight as it is, and {SECTION}.include takes {HEAD}; take one of the two out"


def _distillation(config: Config, distill: Config) -> Iterator[str]:
    if fused := _fused(config):
        yield f"{fused}: gives no logits, which {SECTION}.distill compares; take one of the two out"
    if config.get("kd_trainer") or any(name.endswith("KDPlugin") for name in plugins_of(config)):
        yield f"{SECTION}.distill: not together with KDPlugin; each has a trainer of its own: keep one"
    if (number(config.get("context_parallel_size")) or 1) > 1:
        yield f"context_parallel_size: not with {SECTION}.distill, whose teacher reads whole sequences; take one of the two out"
    for key in ("weight", "temperature"):
        value = number(distill.get(key))
        if value is not None and not isfinite(value):
            yield f"{SECTION}.distill.{key}: {distill[key]} where a number is needed"


def _fused(config: Config) -> str:
    """The key of a loss that is computed with the head, without logits, where a config asks for one."""
    listed = any(name.endswith("CutCrossEntropyPlugin") for name in plugins_of(config)) and config.get("cut_cross_entropy") is not False
    return next((key for key in FUSED if config.get(key)), FUSED[1] if listed else "")

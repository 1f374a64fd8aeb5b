"""What the adapter_config.json of a PEFT adapter says: rank and scale of each module, what it targets, and whether it can be merged.

Reads the config only; knows no tensors. Follows peft 0.20; what an older file leaves out has its default there.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..checkpoint import load_json
from ..errors import DowncycleError
from ..filenames import ADAPTER_CONFIG
from ..sources import Source
from .names import is_embedding

WITH_PEFT = "if peft can merge it, do so with its merge_and_unload()"
# Fields that, when set, make an adapter something else than W + s BA.
UNLIKE_LORA = {
    "layer_replication": "it repeats layers of the base; make that base first with --layers, and set the field to null",
    "alora_invocation_tokens": "it acts on the tokens behind its invocation only, which no merged weight can",
    "arrow_config": "it routes between adapters, token by token, which no merged weight can",
    **dict.fromkeys(("megatron_config", "use_qalora", "use_bdlora", "monteclora_config"), WITH_PEFT),
}
# Ways to initialise that change the base itself, so that what was trained is not the base plus BA.
CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
HARMLESS = frozenset((
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "r", "lora_alpha",
    "target_modules", "exclude_modules", "lora_dropout", "fan_in_fan_out", "bias", "use_rslora", "modules_to_save", "init_lora_weights",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "trainable_token_indices", "loftq_config",
    "eva_config", "corda_config", "lora_ga_config", "use_dora", "velora_config", "qalora_group_size", "lora_bias", "target_parameters",
    "ensure_weight_tying", "runtime_config",
))  # fmt: skip
# What peft makes of the names and patterns of a config.
KEY, SAVED, LAYER = r"(.*\.)?({})$", r"(^|.*\.){}($|\..*)", r".*?\.{}\.(\d+)\."


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json; `where` names it in errors."""

    where: str
    fields: dict[str, Any]

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """Return a module's rank r and its scale: alpha / r, or alpha / sqrt(r) with rsLoRA (arXiv 2312.03732).

        The first pattern counts that is the module's name or its end, as peft.utils.get_pattern_key has it.
        """
        rank = self._by_pattern("rank_pattern", module, self.fields.get("r", 8))
        alpha = self._by_pattern("alpha_pattern", module, self.fields.get("lora_alpha", 8))
        return rank, alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def targets(self, module: str) -> bool:
        """Whether the config says that this module has an adapter. Says no where that depends on more than its name ("all-linear")."""
        targets, excluded = self.fields.get("target_modules") or [], self.fields.get("exclude_modules") or []
        saved = self.fields.get("modules_to_save") or []
        if targets == "all-linear" or _named_by(excluded, module) or any(re.match(SAVED.format(name), module) for name in saved):
            return False
        if isinstance(targets, str) or module in targets:
            return _named_by(targets, module)
        return _named_by(targets, module) and self._is_in_its_layers(module)

    def targets_parameter(self, name: str) -> bool:
        """Whether the config says that this parameter, which is no linear module's weight, has an adapter."""
        return _named_by(self.fields.get("target_parameters") or [], name)

    def field_that_names(self, parameter: str, shape: tuple[int, ...]) -> str:
        """Return the field by which this parameter must have been trained; "" where none says so for sure."""
        module, _, kind = parameter.rpartition(".")
        if self._saves(module):
            return "modules_to_save"
        if self.targets_parameter(parameter):
            return "target_parameters"
        if kind == "bias" and len(shape) == 1 and self.fields.get("bias") == "all":
            return "bias"
        if kind != "weight" or len(shape) != 2:
            return ""
        if (is_embedding(module) or isinstance(self.fields.get("trainable_token_indices"), dict)) and self.token_indices(module):
            return "trainable_token_indices"
        return "target_modules" if self.targets(module) else ""

    def token_indices(self, module: str) -> list[int]:
        """Return which rows of an embedding were trained."""
        indices = self.fields.get("trainable_token_indices") or []
        if isinstance(indices, dict):
            indices = next((indices[name] for name in indices if _named_by([name], module)), [])
        return indices

    def _saves(self, module: str) -> bool:
        """Whether a module, or one that it is in, is saved whole: peft looks at the ends of names, and not where their words begin."""
        saved, words = tuple(self.fields.get("modules_to_save") or ()), module.split(".")
        return any(".".join(words[:count]).endswith(saved) for count in range(1, len(words) + 1))

    def _by_pattern(self, field: str, module: str, default: Any) -> Any:
        patterns = self.fields.get(field) or {}
        return next((value for key, value in patterns.items() if re.match(KEY.format(key), module)), default)

    def _is_in_its_layers(self, module: str) -> bool:
        layers, patterns = self.fields.get("layers_to_transform"), self.fields.get("layers_pattern") or []
        if layers is None or layers == []:
            return True
        words = [patterns] if isinstance(patterns, str) else patterns or [r"[^.]*"]
        match = next((found for word in words if (found := re.match(LAYER.format(word), module))), None)
        return match is not None and int(match[match.re.groups]) in ([layers] if isinstance(layers, int) else layers)


def read_adapter_config(source: Source) -> AdapterConfig:
    """Read and check the config of an adapter.

    Raises:
        DowncycleError: no adapter, damaged, or one that is no sum of the base and a low-rank matrix; names the field that says so.
    """
    if ADAPTER_CONFIG not in source.files:
        inner = {path.partition("/")[0] for path in source.files if path.endswith(f"/{ADAPTER_CONFIG}")}
        hint = (
            f"did you mean {source.name.rstrip('/')}/{max(inner, key=_number)}?"
            if inner
            else "give the folder that peft or Axolotl saved it in"
        )
        raise DowncycleError(f"{source.name}: no adapter, as it holds no {ADAPTER_CONFIG}; {hint}")
    config = AdapterConfig(f"{source.name}/{ADAPTER_CONFIG}", load_json(source, ADAPTER_CONFIG))
    _check_kind(config)
    _check_types(config)
    return config


def _check_kind(config: AdapterConfig) -> None:
    fields = config.fields
    if fields.get("peft_type") != "LORA":
        raise DowncycleError(f"{config.where}: peft_type is {str(fields.get('peft_type'))[:40]!r}; only LORA is merged here; {WITH_PEFT}")
    for name, why in UNLIKE_LORA.items():
        if fields.get(name):
            raise DowncycleError(f"{config.where}: {name} is set, so this is no plain LoRA: {why}")
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise DowncycleError(
            f"{config.where}: init_lora_weights is {start[:40]!r}, which changed the base before training; save the adapter again with "
            "peft's save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes it a plain LoRA"
        )
    for name in sorted(fields.keys() - HARMLESS - UNLIKE_LORA.keys()):
        if fields[name]:
            raise DowncycleError(
                f"{config.where}: {name[:40]} is set, which is not known here and may change what is merged; {WITH_PEFT}, or set it to null"
            )


def _number(name: str) -> tuple[int, str]:
    """Sort checkpoint-1000 behind checkpoint-900."""
    match = re.search(r"(\d+)$", name)
    return int(match[1]) if match else -1, name


def _is_rank(value: Any) -> bool:
    return type(value) is int and 0 < value < 1 << 31


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # which isfinite() cannot say of any whole number


def _is_pattern(value: Any, within: str = "{}") -> bool:
    """Whether a text is a regular expression, both as it is and within another."""
    try:
        return isinstance(value, str) and bool(re.compile(value)) and bool(re.compile(within.format(value)))
    except (re.error, RecursionError, OverflowError):
        return False


def _are_names(value: Any, within: str = "") -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and (not within or _is_pattern(name, within)) for name in value)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def _is_map(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, dict) and all(_is_pattern(key, KEY) and of(item) for key, item in value.items())


NAMES, NAMES_OR_PATTERN = "a list of names", "a list of names or one pattern"
TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a whole number above 0", _is_rank),
    "lora_alpha": ("a number", _is_number),
    "rank_pattern": ("a map from patterns to whole numbers above 0", lambda value: _is_map(value, _is_rank)),
    "alpha_pattern": ("a map from patterns to numbers", lambda value: _is_map(value, _is_number)),
    "modules_to_save": (NAMES, lambda value: _are_names(value, SAVED)),
    "target_parameters": (NAMES, _are_names),
    **dict.fromkeys(("target_modules", "exclude_modules"), (NAMES_OR_PATTERN, lambda value: _are_names(value) or _is_pattern(value))),
    "layers_pattern": (NAMES_OR_PATTERN, lambda value: _are_names(value, LAYER) or _is_pattern(value, LAYER)),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out", "ensure_weight_tying"), ("true or false", _is_bool)),
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "base_model_name_or_path": ("a name or a folder", lambda value: isinstance(value, str)),
    "layers_to_transform": ("a list of layers", lambda value: type(value) is int or _are_counts(value)),
    "trainable_token_indices": (
        "a list of token numbers, or a map to such lists",
        lambda value: _are_counts(value) or _is_map(value, _are_counts),
    ),
}


def _check_types(config: AdapterConfig) -> None:
    """Refuse, all together, fields that are not of the type that peft writes."""
    faults = [
        f"{name} is {str(config.fields[name])[:40]!r} and should be {wanted}"
        for name, (wanted, is_so) in TYPES.items()
        if config.fields.get(name) is not None and not is_so(config.fields[name])
    ]
    if faults:
        raise DowncycleError(f"{config.where}: {'; '.join(faults)}; mend it or save the adapter again")


def _named_by(names: list[str] | str, module: str) -> bool:
    """Whether a list holds a module's name or its end, or a pattern is its name."""
    if isinstance(names, str):
        return bool(re.fullmatch(names, module))
    return any(module == name or module.endswith(f".{name}") for name in names)

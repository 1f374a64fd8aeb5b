"""What a config says of its model, held against the model itself: positions, tokens, names of modules and parameters.

Reads config, tokenizer files and tensor names; no weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from ...surgery.checkpoint import Checkpoint, file_bytes
from ...surgery.errors import DowncycleError
from ...surgery.ternary.ternarize import ternary_modules
from .own_plugins import SECTION
from .ternary import base_faults, is_ternary, rule_of, ternary_section

VOCABULARY = "tokenizer.json"
NAMED = ("special_tokens_map.json", "tokenizer_config.json", VOCABULARY)  # the last holds all, is long, and may have to be fetched


def model_faults(config: dict[str, Any], model: Checkpoint) -> Iterator[str]:
    """Yield what of a config does not fit its model."""
    longest, length = positions(model), config.get("sequence_len")
    stretched = "rope" in f"{config.get('overrides_of_model_config')} {config.get('overrides_of_model_kwargs')}"
    if longest and type(length) is int and length > longest and not stretched:
        yield f"sequence_len: {length}, and the model has {longest} positions; give at most so many, or stretch its rope first"
    yield from _token_faults(config, model)
    yield from _name_faults(config, model)
    if is_ternary(config):
        yield from _ternary_faults(ternary_section(config), model)


def _ternary_faults(settings: dict[str, Any], model: Checkpoint) -> Iterator[str]:
    """What hinders training this model ternary, or packing it then."""
    if faults := list(base_faults(settings, model.config, model.name)):
        yield from faults
        return
    try:
        ternary_modules(model, rule_of(settings))
    except DowncycleError as error:
        yield f"{SECTION}: {error}".replace(" --", " ")  # there are no options here


def positions(model: Checkpoint) -> int:
    """How long a sequence the model was made for, 0 where its config does not say."""
    stated = (model.config.get("text_config") or model.config).get("max_position_embeddings")
    return stated if type(stated) is int and stated > 0 else 0


def _token_faults(config: dict[str, Any], model: Checkpoint) -> Iterator[str]:
    """Tokens that the vocabulary lacks: Axolotl adds them, the embeddings grow, and no merge fits any more."""
    special = config.get("special_tokens")
    if VOCABULARY not in model.files or not isinstance(special, dict) or config.get("tokenizer_config"):
        return
    for name, token in special.items():
        if isinstance(token, str) and not any(_holds(model, path, token) for path in NAMED):
            yield f"special_tokens.{name}: {token!r} is not in the vocabulary, and would grow it and the embeddings; name one that is there"


def _holds(model: Checkpoint, path: str, token: str) -> bool:
    text = file_bytes(model.files[path]) if path in model.files else b""
    return any(json.dumps(token, ensure_ascii=plain).encode() in text for plain in (True, False))


def _name_faults(config: dict[str, Any], model: Checkpoint) -> Iterator[str]:
    modules = {name.rpartition(".")[0] for name in model.tensors}
    experts = any(".experts." in name for name in model.tensors)  # whose modules transformers calls otherwise than the files do
    for key in () if experts else ("lora_target_modules", "lora_modules_to_save"):
        for name in config.get(key) or () if isinstance(config.get(key), list) else ():
            if not any(f".{module}".endswith(f".{name}") for module in modules):
                yield f"{key}: the model has no module {name!r}"
    for pattern in config.get("unfrozen_parameters") or ():
        match = parameter_pattern(pattern).match
        if not any(match(name) for name in model.tensors):
            yield f"unfrozen_parameters: {pattern!r} is no parameter's name, and would leave all frozen"


def parameter_pattern(pattern: str) -> re.Pattern[str]:
    """Read a pattern of unfrozen_parameters as Axolotl does: a dot is a dot, and a range of rows behind it is another matter."""
    return re.compile(re.sub(r"\[\d*(:\d*)?\]$", "", pattern).replace(".", r"\."))

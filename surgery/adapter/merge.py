"""Merge a trained adapter into the model that it was trained on: every weight becomes W + s BA, rounded once.

Reads headers and, to see that they are finite, the adapter's numbers; the base's weights are read when the result is written. What the
adapter does not touch is copied byte for byte.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..checkpoint import Checkpoint, Span, Tensor, find_source, open_checkpoint, read_header, split_revision
from ..choose import format_layers
from ..errors import DowncycleError
from ..lineage import MERGE, descend
from ..quantizer import packed_by
from ..sources import Source
from ..stack import OTHER_TOWERS
from ..ternary.record import RECORD
from .config import AdapterConfig, read_adapter_config
from .modules import TOKENS, Merge, Parts
from .names import layer_number

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
WRAPPERS = re.compile(r"_(?:orig_mod|fsdp_wrapped_module|checkpoint_wrapped_module)\.")  # around a module in training; no part of its name
KINDS = (
    *("lora_A.weight", "lora_B.weight", "lora_B.bias", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"),
    "token_adapter.trainable_tokens_delta",
)


def merge_adapter(base: Checkpoint, adapter: str | Path, revision: str | None = None) -> Checkpoint:
    """Return `base` with a LoRA or DoRA adapter of peft merged into it: W + s BA for every W that has one.

    The sums are carried in float32 where the base has 16 bits, in float64 where it has more, and rounded once. Tensors that the adapter
    holds whole (modules_to_save, biases) take the base's place. The tokenizer stays the base's.

    Args:
        adapter: a folder with adapter_config.json and adapter_model.safetensors, or a Hub id of such (USER/NAME, USER/NAME@REVISION).
        revision: branch, tag or commit of a Hub repo.
    Raises:
        DowncycleError: the adapter is another model's, damaged, not finite, or cannot be merged into plain weights; the base is
            quantised; torch is missing.
    """
    return merge_found(base, find_adapter(adapter, revision))


def merge_found(base: Checkpoint, source: Source) -> Checkpoint:
    """Do what merge_adapter does, with an adapter that has been found."""
    config = read_adapter_config(source)
    _check_base(base)
    stored = _read_tensors(source)
    parts, saved = _sort(stored, source.name)
    merge = Merge(base, config, source.name)
    _check_layers(base, source.name, {*parts, *(name.rpartition(".")[0] for name in saved)}, merge)
    merge.check_tied(parts, saved)
    merge.put_saved(saved)
    for module, its in parts.items():
        merge.put(module, its)
    merge.finish()
    _check_named(config, parts, merge)
    _check_whole(base, config, merge)
    _check_named_base(base, config, merge.done)
    _check_finite(stored, source.name)
    fields = {key: value for key, value in base.config.items() if key != RECORD}  # what was changed did not learn to be ternary
    return replace(base, config=fields, tensors=merge.tensors, lineage=_lineage(base, source, config, stored))


def find_adapter(adapter: str | Path, revision: str | None = None) -> Source:
    """Say where an adapter is: in a folder, or in a repo of the Hub, whose branch, tag or commit may stand behind an @."""
    return find_source(adapter, revision) if revision or isinstance(adapter, Path) else find_source(*split_revision(adapter))


def _read_tensors(source: Source) -> dict[str, Tensor]:
    if WEIGHTS not in source.files:
        if PICKLE in source.files:
            raise DowncycleError(
                f'{source.name}: its weights are pickled ({PICKLE}), which can run code when read. Convert them with: python -c "import '
                f"torch, safetensors.torch as s; s.save_file(torch.load('{PICKLE}', weights_only=True), '{WEIGHTS}')\""
            )
        raise DowncycleError(f"{source.name}: holds no {WEIGHTS}; save the adapter again, with peft's save_pretrained")
    stored, _ = read_header(source, WEIGHTS)
    if not stored:
        raise DowncycleError(
            f"{source.name}/{WEIGHTS}: holds no tensors: nothing was trained, or it was saved on another rank; save it again"
        )
    return stored


def _sort(stored: Mapping[str, Tensor], where: str) -> tuple[dict[str, Parts], dict[str, Tensor]]:
    """Return the parts of each module's adapter, and the tensors that are saved whole, by the names of the model."""
    parts: defaultdict[str, Parts] = defaultdict(dict)
    saved: dict[str, Tensor] = {}
    for key, tensor in stored.items():
        plain = WRAPPERS.sub("", key)
        name = plain.removeprefix(PREFIX).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")
        kind = next((kind for kind in KINDS if name.endswith(f".{kind}")), "")
        if name == plain or not kind and ("lora_" in name or "." not in name):
            raise DowncycleError(
                f"{where}: holds the tensor {key[:100]!r}, which peft gives no such name; save the adapter again with peft"
            )
        if kind:
            parts[name.removesuffix(f".{kind}")][kind] = tensor
        else:
            saved[name.replace(".base_layer.", ".")] = tensor
    return parts, saved


def _check_base(base: Checkpoint) -> None:
    if method := packed_by(base.config):
        raise DowncycleError(f"{base.name}: packed by {method}; merge into the unquantised model, and quantise the result")


def _check_layers(base: Checkpoint, where: str, modules: set[str], merge: Merge) -> None:
    """Refuse an adapter with more layers than the base: what it was trained on is another model."""
    beyond = sorted({layer for module in modules if not merge.has(module) and (layer := layer_number(module) or 0) >= base.num_layers})
    if beyond:
        raise DowncycleError(
            f"{where}: has layers {format_layers(beyond)}, and {base.name} has {base.num_layers} (0-{base.num_layers - 1}); it was trained "
            "on another model: merge it into that one"
        )


def _check_named(config: AdapterConfig, parts: Mapping[str, Parts], merge: Merge) -> None:
    """Refuse an adapter that holds modules which its own config does not target: peft would leave them out without a word."""
    named = config.fields.get("target_modules")
    if config.fields.get("target_parameters") or not named or named == "all-linear":
        return  # what is targeted depends on more than names
    extra = [module for module, its in parts.items() if TOKENS not in its and not config.targets(module)]
    if extra:
        raise DowncycleError(
            f"{config.where}: target_modules does not name {extra[0]}, for which the adapter holds factors; there are {len(extra)} such "
            "modules. Config and tensors belong to two trainings: save the adapter again"
        )


def _check_whole(base: Checkpoint, config: AdapterConfig, merge: Merge) -> None:
    """Refuse an adapter that lacks what its own config says was trained: it is damaged, or its model has fewer layers."""
    depth, lacking = base.num_layers, defaultdict(list)
    for name, tensor in base.tensors.items():
        if name in merge.done or (layer_number(name) or 0) >= depth or OTHER_TOWERS.search(name):
            continue
        if field := config.field_that_names(merge.names.in_model(name), tensor.shape):
            lacking[field].append(name.removesuffix(".weight"))
    for field, modules in lacking.items():
        layers = sorted({layer for module in modules if (layer := layer_number(module)) is not None})
        where = f"layers {format_layers(layers)} of {base.name}" if layers else base.name
        raise DowncycleError(
            f"{config.where}: {field} names {modules[0]}, but the adapter has nothing for it; there are {len(modules)} such modules in "
            f"{where}. It was trained on another model, or is damaged"
        )


def _check_named_base(base: Checkpoint, config: AdapterConfig, changed: set[str]) -> None:
    """Refuse to merge into another model than the adapter names, where that one is at hand: models of one shape differ in numbers only."""
    named = config.fields.get("base_model_name_or_path")
    if not isinstance(named, str) or not os.path.isdir(named) or os.path.realpath(named) == os.path.realpath(base.name):
        return
    try:
        other = open_checkpoint(Path(named))
    except DowncycleError:
        return
    for name in sorted(changed):
        here, there = (_sample(model.tensors.get(name)) for model in (base, other))
        if here and there and here[0] == there[0] and here != there:
            raise DowncycleError(
                f"{config.where}: was trained on {named}, which is another model than {base.name}: their {name} differ. Merge it into that "
                f"one; or, if you mean it, set base_model_name_or_path there to {base.name}"
            )


def _sample(tensor: Tensor | None) -> tuple[str, bytes] | None:
    """The first bytes of a tensor that lies on this machine."""
    if tensor is None or not isinstance(tensor.data, Span) or tensor.data.source.local_path(tensor.data.path) is None:
        return None
    return tensor.dtype, tensor.data.source.read(tensor.data.path, tensor.data.start, min(4096, tensor.data.length))


def _check_finite(stored: Mapping[str, Tensor], where: str) -> None:
    from .lowrank import FLOATS, is_finite

    for key, tensor in stored.items():
        if tensor.dtype in FLOATS and not is_finite(tensor):
            raise DowncycleError(f"{where}: {key} holds numbers that are not finite; the training diverged: merge an earlier checkpoint")


def adapter_fingerprint(source: Source) -> str:
    """Return what tells adapters apart: a digest of config, tensor names, dtypes and shapes, but of none of the numbers.

    Raises:
        DowncycleError: no adapter, or a damaged one.
    """
    return _fingerprint(read_adapter_config(source), _read_tensors(source))


def _fingerprint(config: AdapterConfig, stored: Mapping[str, Tensor]) -> str:
    shapes = sorted((key, tensor.dtype, tensor.shape) for key, tensor in stored.items())
    return sha256(json.dumps([config.fields, shapes], sort_keys=True).encode()).hexdigest()


def _lineage(base: Checkpoint, source: Source, config: AdapterConfig, stored: Mapping[str, Tensor]) -> dict[str, Any]:
    return descend(
        base,
        MERGE,
        adapter=source.name,
        adapter_revision=source.revision,
        adapter_fingerprint=_fingerprint(config, stored),
        adapter_base=config.fields.get("base_model_name_or_path"),
    )

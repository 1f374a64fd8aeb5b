"""Keep some decoder layers of a checkpoint: which tensors and config fields belong to which layer, and renumbering them.

A pure function of a Checkpoint: reads config and tensor names, loads no weights, writes nothing.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from .checkpoint import Checkpoint, Span, Tensor
from .errors import DowncycleError
from .families import cut_config, renumber_modules

OTHER_TOWERS = re.compile(r"vision|visual|image|audio|speech|vit\b|perceiver|resampler|qformer|\bmtp\b", re.IGNORECASE)
NUMBERED = re.compile(r"((?:[^.]+\.)*?)([0-9]+)\.(.+)")  # everything up to the first number, the number, the rest
QUANTIZER_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")


def keep_layers(parent: Checkpoint, layers: list[int], rule: str = "layers") -> Checkpoint:
    """Return the model made of these layers of `parent`, in this order, with its embeddings, norms and head.

    Args:
        layers: numbers in the parent, from 0. May repeat and reorder; a repeated layer's tensors are copied.
        rule: how the layers were chosen, for downcycle.json.
    Raises:
        DowncycleError: a layer that does not exist, or a family whose config cannot say what is left.
    """
    depth = parent.num_layers
    _check(layers, depth)
    stem = layer_stem(parent.tensors, depth)
    moved = _new_numbers(layers, depth, parent.tensors, stem)
    word = stem.rstrip(".").rpartition(".")[2]
    config = cut_config(parent.config, layers)
    if isinstance(config.get("quantization_config"), dict):
        config["quantization_config"] = renumber_modules(config["quantization_config"], word, moved)
    tensors: dict[str, Tensor] = {}
    for name, tensor in parent.tensors.items():
        match = NUMBERED.fullmatch(name)
        if match and match[1] == stem:
            for new in moved.get(int(match[2]), ()):
                tensors[f"{stem}{new}.{match[3]}"] = tensor
        else:
            tensors[name] = tensor
    files = {path: _renumber_file(path, data, word, moved) for path, data in parent.files.items()}
    return replace(parent, config=config, tensors=tensors, files=files, lineage=_lineage(parent, layers, rule))


def by_layer(checkpoint: Checkpoint) -> list[dict[str, Tensor]]:
    """Return the tensors of each decoder layer, by what stands behind the layer's number."""
    stem = layer_stem(checkpoint.tensors, checkpoint.num_layers)
    layers: list[dict[str, Tensor]] = [{} for _ in range(checkpoint.num_layers)]
    for name, tensor in checkpoint.tensors.items():
        match = NUMBERED.fullmatch(name)
        if match and match[1] == stem and int(match[2]) < len(layers):
            layers[int(match[2])][match[3]] = tensor
    return layers


def layer_stem(names: Mapping[str, object], depth: int) -> str:
    """Return what stands before the layer's number in tensor names: "model.layers.", "transformer.h.", ...

    Raises:
        DowncycleError: no part, or more than one part, of the model has `depth` numbered layers.
    """
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := NUMBERED.fullmatch(name):
            numbers[match[1]].add(int(match[2]))
    stems = [stem for stem, found in numbers.items() if found.issuperset(range(depth)) and not OTHER_TOWERS.search(stem)]
    if len(stems) > 1:
        stems = [stem for stem in stems if ".encoder." not in f".{stem}"] or stems
    if len(stems) != 1:
        seen = ", ".join(f"{stem}* ({len(found)})" for stem, found in numbers.items()) or "none"
        raise DowncycleError(f"found {len(stems) or 'no'} parts with the config's {depth} numbered layers; numbered parts: {seen}")
    return stems[0]


def _check(layers: list[int], depth: int) -> None:
    if not layers:
        raise DowncycleError("no layers to keep; give at least one")
    for layer in layers:
        if not 0 <= layer < depth:
            raise DowncycleError(f"layer {layer} does not exist; the model has {depth} layers (0-{depth - 1})")


def _new_numbers(layers: list[int], depth: int, names: Mapping[str, object], stem: str) -> dict[int, list[int]]:
    """Map each kept layer to its new numbers; layers beyond the depth (multi-token prediction) follow the last one."""
    moved: defaultdict[int, list[int]] = defaultdict(list)
    for new, old in enumerate(layers):
        moved[old].append(new)
    beyond = {int(match[2]) for name in names if (match := NUMBERED.fullmatch(name)) and match[1] == stem} - set(range(depth))
    for old in sorted(beyond):
        moved[old].append(len(layers) + old - depth)
    return dict(moved)


def _renumber_file(path: str, data: Span | bytes, word: str, moved: dict[int, list[int]]) -> Span | bytes:
    """A quantiser's own config file names layers as config.json does."""
    if path not in QUANTIZER_FILES:
        return data
    text = data.read() if isinstance(data, Span) else data
    before = json.loads(text)
    after = renumber_modules(before, word, moved)
    return data if after == before else json.dumps(after, indent=2).encode() + b"\n"


def _lineage(parent: Checkpoint, layers: list[int], rule: str) -> dict[str, Any]:
    """What downcycle.json says: enough to make this checkpoint again."""
    lineage = {
        "downcycle": version("downcycle"),
        "parent": parent.name,
        "revision": parent.revision,
        "fingerprint": parent.fingerprint,
        "parent_layers": parent.num_layers,
        "layers": layers,
        "rule": rule,
    }
    return lineage | ({"parent_lineage": parent.lineage} if parent.lineage else {})

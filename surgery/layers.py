"""Keep some decoder layers of a checkpoint, and renumber them.

A pure function of a Checkpoint: reads config and tensor names, loads no weights, writes nothing.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace

from .checkpoint import Checkpoint, Span, file_bytes
from .depth_tensors import follow_depth
from .errors import DowncycleError
from .families import cut_config
from .filenames import QUANTIZER_FILES
from .lineage import CUT, descend
from .quantizer import renumber_config, renumber_modules
from .stack import join_layers, split_layers


def keep_layers(parent: Checkpoint, layers: list[int], rule: str = "layers") -> Checkpoint:
    """Return the model made of these layers of `parent`, in this order, with its embeddings, norms and head.

    Args:
        layers: numbers in the parent, from 0. May repeat and reorder; a repeated layer's tensors are copied.
        rule: how the layers were chosen, for downcycle.json.
    Raises:
        DowncycleError: a layer that does not exist, or a family whose config cannot say what is left.
    """
    stack = split_layers(parent)
    depth = len(stack.layers)
    _check(layers, depth)
    moved: defaultdict[int, list[int]] = defaultdict(list)
    for new, old in [*enumerate(layers), *((len(layers) + old - depth, old) for old in stack.beyond)]:
        moved[old].append(new)
    config = cut_config(parent.config, layers)
    renumber_config(config, stack.word, moved)
    child = replace(
        stack,
        layers=[dict(stack.layers[old]) for old in layers],
        beyond={new: stack.beyond[old] for old in stack.beyond for new in moved[old]},
    )
    child = follow_depth(stack, child, layers, config)
    files = {path: _renumber_file(path, data, stack.word, moved) for path, data in parent.files.items()}
    lineage = descend(parent, CUT, parent_layers=parent.num_layers, layers=layers, rule=rule)
    return replace(parent, config=config, tensors=join_layers(child), files=files, lineage=lineage)


def _check(layers: list[int], depth: int) -> None:
    if not layers:
        raise DowncycleError("no layers to keep; give at least one")
    for layer in layers:
        if not 0 <= layer < depth:
            raise DowncycleError(f"layer {layer} does not exist; the model has {depth} layers (0-{depth - 1})")


def _renumber_file(path: str, data: Span | bytes, word: str, moved: dict[int, list[int]]) -> Span | bytes:
    """A quantiser's own config file names layers as config.json does."""
    if path not in QUANTIZER_FILES:
        return data
    try:
        before = json.loads(file_bytes(data))
    except (ValueError, RecursionError) as error:
        raise DowncycleError(f"{path}: not valid JSON ({str(error)[:80]}); fetch it again") from error
    after = renumber_modules(before, word, moved)
    return data if after == before else json.dumps(after, indent=2).encode() + b"\n"

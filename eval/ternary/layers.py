"""The ternary weights of a packed model, layer by layer, kept so that a second report reads no file again. Measures no text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

from ...surgery.adapter.lowrank import spans
from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.lineage import TERNARY
from ...surgery.ternary.tally import Tally, by_layer, tally_packed
from ...surgery.verify import parent_of
from ...surgery.weights import ternary_matrices
from ..cache import keep, key_of, recall
from ..results import LayerWeights

Progress = Callable[[str, int, int], None]


def layer_weights(checkpoint: Checkpoint, content: str, progress: Progress = lambda what, done, total: None) -> tuple[LayerWeights, ...]:
    """Return what a packed model's weights are, by layer; beside its source where that lies on this machine. Nothing for other models.

    Args:
        content: the model's digest, under which the answer is kept.
    Raises:
        DowncycleError: codes that are no ternary weights.
    """
    if not ternary_matrices(checkpoint):
        return ()
    source = source_of(checkpoint)
    key = key_of("ternary weights", None if source is None else _identity(source))
    known = recall(content, key)
    if known is None:
        progress("counting ternary weights", 0, 0)
        found = by_layer(checkpoint, tally_packed(checkpoint, source))
        known = [asdict(summed(layer, tally)) for layer, tally in found.items()]
        keep(content, key, known)
    return tuple(LayerWeights(**one) for one in known)


def summed(layer: int | None, tally: Tally) -> LayerWeights:
    """Return a layer's tally as results have it."""
    norm = None if tally.squares is None else math.sqrt(tally.squares)
    return LayerWeights(layer, tally.minus, tally.zero, tally.plus, tally.after, tally.before, tally.error, norm)


def source_of(checkpoint: Checkpoint) -> Checkpoint | None:
    """Return the floating-point model that was packed, where its files lie on this machine; asks the Hub for nothing."""
    lineage = checkpoint.lineage
    if lineage.get("operation") != TERNARY or any(link.get("revision") for link in _chain(lineage)):
        return None
    try:
        source = parent_of(checkpoint, trust_remote_code=True)
    except (DowncycleError, OSError):
        return None
    same = all(
        name in source.tensors and source.tensors[name].shape[1:] == one.shape[1:] for name, one in ternary_matrices(checkpoint).items()
    )
    return source if same else None


def _chain(lineage: Any) -> Iterator[Mapping[str, Any]]:
    while isinstance(lineage, Mapping) and lineage:
        yield lineage
        lineage = lineage.get("parent_lineage")


def _identity(source: Checkpoint) -> list[Any]:
    """What tells the files of a source from others, without reading them."""
    tensors = source.tensors.values()
    found = {(span.path, span.source.name, span.source.identity(span.path)) for tensor in tensors for span in spans(tensor)}
    return sorted(map(list, found))

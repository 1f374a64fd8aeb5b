"""Choose layers by the loss without them: one by one, or one after the other. Knows no text; runs no layer itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..checkpoint import Checkpoint
from ..errors import DowncycleError
from ..layers import keep_layers
from .paths import WHOLE, Dropped, SampleLoss

Run = Callable[[Sequence[Dropped], str], Mapping[Dropped, float]]  # measures the losses of paths; is told what to call it


@dataclass(frozen=True)
class Drop:
    """A layer that a search dropped, and the loss without it and all that were dropped before, in nats per token."""

    layer: int
    loss: float


def leave_one_out(layers: int, losses: Mapping[Dropped, float]) -> list[float | None]:
    """Return how much the loss grows without each layer, in nats per token: the first step of SLEB (arXiv 2402.09025, algorithm 1).

    Args:
        losses: of the whole model, and of it without each layer that it can do without.
    """
    alone = [losses.get(frozenset({layer})) for layer in range(layers)]
    return [None if loss is None else loss - losses[WHOLE] for loss in alone]


def greedy(checkpoint: Checkpoint, drop: int, protected: Iterable[int], run: Run, found: Sequence[Drop] = ()) -> list[Drop]:
    """Drop the layer without which the loss is least, score all others again, and so on (SLEB, arXiv 2402.09025, algorithm 1).

    Of equal losses the later layer goes. One pass over the weights for each dropped layer.

    Args:
        run: measures a set of paths. found: what an earlier search dropped already.
    Raises:
        DowncycleError: no layer is left that can be dropped.
    """
    drops, kept_back = list(found[:drop]), set(protected)
    while len(drops) < drop:
        gone = frozenset(one.layer for one in drops)
        able = can_drop(checkpoint, gone, (layer for layer in range(checkpoint.num_layers) if layer not in kept_back | gone))
        if not able:
            raise DowncycleError(
                f"{checkpoint.name}: after {len(gone)} dropped layers none is left that may go; --protect fewer layers, or keep more"
            )
        losses = run([gone | {layer} for layer in able], f"search: layer {len(drops) + 1} of {drop}")
        best = min(able, key=lambda layer: (losses[gone | {layer}], -layer))
        drops.append(Drop(best, losses[gone | {best}]))
    return drops


def can_drop(checkpoint: Checkpoint, gone: Dropped, layers: Iterable[int]) -> list[int]:
    """Return those of these layers without which the family's config can still say what is left."""
    able = []
    for layer in layers:
        kept = [one for one in range(checkpoint.num_layers) if one != layer and one not in gone]
        with suppress(DowncycleError):
            keep_layers(checkpoint, kept)
            able.append(layer)
    return able


def mean_loss(losses: Sequence[SampleLoss]) -> float:
    """Return the mean over all scored tokens, in nats."""
    return math.fsum(one.nats for one in losses) / sum(one.tokens for one in losses)


def count_work(depth: int, paths: Sequence[Dropped]) -> tuple[int, int]:
    """Return how many layers one pass loads for these paths, and how many it runs, a shared prefix once."""
    runs = [{frozenset(one for one in path if one < layer) for path in paths if layer not in path} for layer in range(depth)]
    return sum(map(bool, runs)), sum(map(len, runs))


def count_naive(depth: int, paths: Sequence[Dropped]) -> int:
    """Return how many layers are loaded and run where the whole model runs anew for each path."""
    return sum(depth - len(path) for path in paths)

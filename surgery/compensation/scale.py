"""Prune&Comp: make up for the magnitude that dropped layers gave hidden states, by one factor for each run of them. Trains nothing.

Chen et al., "Prune&Comp: Free Lunch for Layer-Pruned LLMs via Iterative Pruning with Magnitude Compensation", arXiv 2507.18212. For a
dropped run i..j-1, s = mean over channels c of E|h_j,c| / E|h_i,c|. Everything that writes into the residual stream before the run is
multiplied by s, so that layer j gets hidden states of the size that it was trained on: what normed layers read does not change by that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..adapter.lowrank import FLOATS, pieces
from ..checkpoint import Tensor
from ..choose import format_layers
from ..errors import DowncycleError, UnsuitableError
from ..importance.parts import Parts
from ..importance.paths import Dropped
from ..model import class_and_config
from ..quantizer import packed_by
from ..stack import Layer, Stack, split_layers
from .fold import Fitted, Lazy
from .stored import find_stored, holds
from .writers import Weight, check_layer, embedding_weights, head_weights, layer_weights, multiply, refusal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class _Change:
    """What becomes of a stored tensor, which a weight is made of."""

    tensor: Tensor
    factor: float
    weight: Weight


def scale(parts: Parts, path: Dropped, ratios: Sequence[Sequence[float]]) -> Fitted:
    """Fold the factors of all dropped runs into the weights before them.

    A layer's factor is the product over the runs behind it, the embeddings' that over all runs. Where the head is the embedding table,
    the final norm is divided by the embeddings' factor. Each value is computed in float32 (from 16 bits) or float64, and rounded once.

    Args:
        ratios: [i][j] is s of a run i..j-1 (see `observers.ChannelMagnitudes`).
    Raises:
        UnsuitableError: packed weights, or a family into whose weights no factor can be folded, with the part that stands in the way.
    """
    factors = {(i, j): _checked(parts, (i, j), ratios[i][j]) for i, j in dropped_runs(path)}
    if all(factor == 1 for factor in factors.values()):
        return Fitted({})
    parts = _unpacked(parts)
    stack = split_layers(parts.checkpoint)
    tables = embedding_weights(parts)
    changes: dict[str, _Change] = {}
    for numbers in _kinds(parts, stack.layers, path):
        changing = {number: total for number in numbers if (total := math.prod(s for run, s in factors.items() if run[0] > number)) != 1}
        changes |= _layer_changes(parts, stack, numbers[0], changing, tables)
    head = head_weights(parts, tables)
    if (total := math.prod(factors.values())) != 1:
        for weight in (*tables, *head):
            changes |= {name: _Change(stack.rest[name], total, weight) for name in _rest_names(parts, stack, weight, bool(head))}
    parts.release()
    return Fitted(Lazy(changes, _compute), tuple(_notes(factors)))


def dropped_runs(path: Dropped) -> list[tuple[int, int]]:
    """Return the runs of dropped layers as depths: (i, j) for layers i to j - 1."""
    starts = sorted(layer for layer in path if layer - 1 not in path)
    ends = sorted(layer + 1 for layer in path if layer + 1 not in path)
    return list(zip(starts, ends, strict=True))


def _checked(parts: Parts, run: tuple[int, int], factor: float) -> float:
    if not (math.isfinite(factor) and factor > 0):
        raise DowncycleError(f"{parts.checkpoint.name}: hidden states grow {factor} times over {_layers(run)}; use other text")
    return factor


def _layers(run: tuple[int, int]) -> str:
    return f"layer{'s' * (run[1] - run[0] > 1)} {format_layers(list(range(*run)))}"


def _notes(factors: Mapping[tuple[int, int], float]) -> Iterator[str]:
    for run, factor in factors.items():
        yield f"hidden states are made {factor:.3f} times as large in place of {_layers(run)}"


def _unpacked(parts: Parts) -> Parts:
    """Return a model whose weights are numbers: itself, or the same loaded without the quantiser that was asked for."""
    import torch

    if packed_by(parts.checkpoint.config):
        raise UnsuitableError(f"{parts.checkpoint.name}: its weights are packed, and no factor goes into them; try --compensate none")
    if "quantization_config" not in parts.options:
        return parts
    return Parts(parts.checkpoint, device=parts.device, dtype=torch.bfloat16)


def _kinds(parts: Parts, layers: Sequence[Layer], path: Dropped) -> list[list[int]]:
    """Sort the kept layers by what they are: their tensors' names, dtypes and shapes, and all that the config says layer by layer."""
    config = class_and_config(parts.checkpoint)[1].get_text_config()
    said = [value for _, value in sorted(vars(config).items()) if isinstance(value, list) and len(value) == parts.depth]
    kinds = defaultdict[Any, list[int]](list)
    for number, layer in enumerate(layers):
        if number not in path:
            tensors = frozenset((key, tensor.dtype, tensor.shape) for key, tensor in layer.items())
            kinds[tensors, str([value[number] for value in said])].append(number)
    return list(kinds.values())


def _layer_changes(parts: Parts, stack: Stack, like: int, factors: Mapping[int, float], tables: Sequence[Weight]) -> dict[str, _Change]:
    """Return what becomes of the tensors of layers of one kind, by looking at one of them.

    Args:
        like: the layer to look at. factors: of each layer that has one.
    """
    layer = parts.layer(like)
    check_layer(parts, like, layer, tables)
    weights = layer_weights(parts, like, layer) if factors else []
    keys = {f"{stem}{like}.{name}": (stem, name) for stem, name in stack.layers[like]}
    tensors = {full: stack.layers[like][key] for full, key in keys.items()}
    changes = {}
    for weight in weights:  # those of experts may be stored one by one
        for stem, name in (keys[full] for full in find_stored(parts.checkpoint.name, weight.name, weight.value, tensors)):
            for number, factor in factors.items():
                _check_ties(parts, number, weight)
                changes[f"{stem}{number}.{name}"] = _Change(stack.layers[number][stem, name], factor, weight)
    return changes


def _check_ties(parts: Parts, number: int, weight: Weight) -> None:
    """Refuse a weight that is another layer's too, which has another factor."""
    ties = parts.frame.ties
    if f"{parts.frame.stack_name}.{number}.{weight.name}" in {*ties, *ties.values()}:
        raise refusal(parts, f"layer {number} shares {weight.name} with another layer, which needs another factor")


def _rest_names(parts: Parts, stack: Stack, weight: Weight, tied: bool) -> list[str]:
    """Return under which names a weight outside of the layers is stored; a file may hold a tied table twice."""
    names = find_stored(parts.checkpoint.name, weight.name, weight.value, stack.rest)
    copies = [name for name, tensor in stack.rest.items() if tied and weight.rows is not None and holds(tensor, weight.value)]
    return [*dict.fromkeys([*names, *copies])]


def _compute(name: str, change: _Change) -> torch.Tensor:
    """Compute a changed tensor, a piece at a time."""
    import torch

    dtype = getattr(torch, FLOATS[change.tensor.dtype])
    new = torch.empty(math.prod(change.tensor.shape), dtype=dtype)
    done = 0
    for old in pieces(change.tensor):
        wide = old.float() if dtype.itemsize == 2 else old.double()
        new[done : done + len(old)] = multiply(wide, change.factor, change.weight)
        done += len(old)
    if not bool(new.isfinite().all()):
        raise DowncycleError(f"{name}: times {change.factor**change.weight.power:.3g} it is more than {change.tensor.dtype} holds")
    return new.reshape(change.tensor.shape)

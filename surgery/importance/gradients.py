"""Gradients layer by layer: from the last layer to the first, each loaded once, the hidden states that entered it read from disk.

Needs the whole model's states at each depth, as `run_paths` keeps them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import UnsuitableError
from . import metrics
from .calibration import Batch
from .parts import Parts, State
from .paths import WHOLE, Progress, piece_losses, pieces, to_ids
from .states import States

if TYPE_CHECKING:
    import torch
    from torch import nn


def taylor_scores(
    parts: Parts, batches: Sequence[Batch], states: States, gradients: States, progress: Progress = lambda what, done, total: None
) -> list[float]:
    """Return each layer's first-order Taylor importance (see `metrics.taylor`); the loss is the mean over all scored tokens.

    Gradients of batches are added up in float32. One pass over the weights, from the last layer to the first.

    Args:
        states: of the whole model, which `run_paths` kept. gradients: where those of the hidden states stand, depth 1 being behind the last
            layer; a killed run goes on from there.
    Raises:
        UnsuitableError: weights that cannot be differentiated, as they are packed.
    """
    done, found = gradients.finished()
    found = found or []
    if not done:
        _from_the_head(parts, batches, states, gradients)
        gradients.finish(1, found)
        done = 1
        parts.release()  # the head is done with
    for number in reversed(range(parts.depth + 1 - done)):
        progress("going back through the layers", parts.depth - 1 - number, parts.depth)
        found = [_layer_score(parts, number, batches, states, gradients), *found]
        gradients.finish(parts.depth - number + 1, found)
    parts.release()
    return found


def _from_the_head(parts: Parts, batches: Sequence[Batch], states: States, gradients: States) -> None:
    """Keep the gradient of the mean loss by what leaves the last layer."""
    import torch

    tokens = sum(batch.ids.shape[1] - given for batch in batches for given in batch.given)
    for place, batch in enumerate(batches):
        ids = to_ids(batch, parts.device)
        leaves, state = _as_leaves(states.get(parts.depth, WHOLE, place, parts.device))
        with torch.enable_grad():
            for piece in pieces(parts, ids, state):
                (piece_losses(parts, batch, ids, state, *piece).sum() / tokens).backward()
        gradients.put(1, WHOLE, place, _gradients_of(leaves))


def _layer_score(parts: Parts, number: int, batches: Sequence[Batch], states: States, gradients: States) -> float:
    import torch

    layer = parts.layer(number)
    weights = _differentiable(parts, number, layer)
    sums = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    hooks = [weight.register_post_accumulate_grad_hook(partial(_take, total)) for weight, total in zip(weights, sums, strict=True)]
    depth = parts.depth - number
    for place, batch in enumerate(batches):
        leaves, state = _as_leaves(states.get(number, WHOLE, place, parts.device))
        behind = gradients.get(depth, WHOLE, place, parts.device)
        with torch.enable_grad():
            after = parts.step(layer, number, to_ids(batch, parts.device), state)
        if after is not state:
            _go_back(after, behind)
            behind = _gradients_of(leaves)
        gradients.put(depth + 1, WHOLE, place, behind)
    for weight, hook in zip(weights, hooks, strict=True):
        hook.remove()
        weight.requires_grad_(False)
    return metrics.taylor(zip(weights, sums, strict=True))


def _take(total: torch.Tensor, weight: torch.Tensor) -> None:
    """Add a weight's gradient to a sum and let it go, so that those of a layer's weights are never in memory together."""
    gradient, weight.grad = weight.grad, None
    assert gradient is not None  # this is called once there is one
    total += gradient


def _differentiable(parts: Parts, number: int, layer: nn.Module) -> list[torch.Tensor]:
    """Return the weights that count, each of which notes its gradient from now on."""
    for name, weight in layer.named_parameters():
        if not weight.is_floating_point() or weight.element_size() < 2 or hasattr(weight, "quant_state"):
            raise UnsuitableError(
                f"{parts.checkpoint.name}: layer {number}'s {name} is packed ({weight.dtype}), and has no gradient; choose by another rule"
            )
    return [weight.requires_grad_(True) for weight in layer.parameters() if metrics.counts(weight)]


def _go_back(after: State | None, behind: State | None) -> None:
    """Send the gradients that came from behind through a layer, as far as its outputs depend on anything."""
    import torch

    pairs = [
        (value, gradient)
        for value, gradient in zip(_tensors(after), _tensors(behind), strict=True)
        if gradient is not None and value is not None and value.requires_grad
    ]
    torch.autograd.backward([value for value, _ in pairs], [gradient for _, gradient in pairs])


def _as_leaves(state: State | None) -> tuple[State | None, State | None]:
    """Return a state of leaves, and one to compute with, in which nothing can be changed in place that a gradient needs."""
    leaves = _map(state, lambda value: value.requires_grad_(True) if value.is_floating_point() else value)
    return leaves, _map(leaves, lambda value: value.clone())


def _gradients_of(leaves: State | None) -> State | None:
    return _map(leaves, lambda value: value.grad)


def _map(state: State | None, change: Callable[[torch.Tensor], Any]) -> State | None:
    from torch.utils._pytree import tree_map

    def one(value: Any) -> Any:
        return change(value) if hasattr(value, "is_floating_point") else value

    return None if state is None else State(tree_map(one, state.returned), tree_map(one, state.shared))


def _tensors(state: State | None) -> list[Any]:
    """Return the tensors of a state in their order; None stands for what is none."""
    from torch.utils._pytree import tree_flatten

    if state is None:
        return []
    is_leaf = {"is_leaf": lambda value: value is None}
    return [*tree_flatten(state.returned, **is_leaf)[0], *tree_flatten(state.shared, **is_leaf)[0]]

"""Which weights write into the residual stream, found by a law: multiply them by s, and what comes out is s times what came out before.

Usual names say which weights to try; what is tried is run, and only what obeys the law is returned, so no family need be known. Checks
multiply by two, which is exact in every floating dtype, and take hidden states of about the size of one, beside which a norm's epsilon is
nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import combinations
from typing import TYPE_CHECKING, Any

from ..errors import DowncycleError, UnsuitableError
from ..importance.parts import Parts

if TYPE_CHECKING:
    from torch import Tensor, nn

# Words in the names of weights that end a branch, as the families of transformers have them.
ATTENTION = ("o_proj", "out_proj", "c_proj", "dense", "wo", "linear_out")
MLP = ("down_proj", "fc2", "w2", "dense_4h_to_h", "fc_out", "output_linear", "output_proj", "linear_2")
OUTPUTS = frozenset((*ATTENTION, *MLP))
TOKENS = 16  # of a check
FACTOR = 2.0
EXACT, ROUNDED = 1e-3, 1e-2  # of what a layer adds: how far from the law numbers of 32 bits, and of 16, may be


@dataclass(frozen=True)
class Weight:
    """A weight that takes a factor s: w becomes (w + offset) s**power - offset.

    offset: 1 for a norm that multiplies by 1 + w. rows: those that a check changes, of a table too large to copy; None: all.
    """

    name: str
    value: Tensor
    power: int = 1
    offset: float = 0.0
    rows: Tensor | None = None


def multiply(values: Tensor, factor: float, weight: Weight) -> Tensor:
    """Return what becomes of a weight's values."""
    return (values + weight.offset) * factor**weight.power - weight.offset


def probe_ids(parts: Parts) -> Tensor:
    """Return tokens from all over the vocabulary, [1, 16]."""
    import torch

    places = (torch.arange(TOKENS, dtype=torch.float64) + 0.5) * (parts.vocabulary / TOKENS)
    return places.long()[None].to(parts.device)


def layer_weights(parts: Parts, number: int, layer: nn.Module) -> list[Weight]:
    """Return the weights of a layer that take s, so that layer'(s h) = s layer(h); names are those in the layer.

    Tried in this order: its output projections; norms behind attention and MLP; both; and, where attention and MLP read the stream without
    a norm (OLMo 2), those norms with s and every matrix before them with 1 / s.

    Raises:
        UnsuitableError: no such set of weights obeys the law.
    """
    ids = probe_ids(parts)
    entered = parts.entering(number, ids, None)
    if entered is None:  # the model's loop passes it over
        return []
    hidden, like = _resize(entered), next(layer.parameters())
    before = _through(parts, layer, number, ids, hidden)
    for weights in _candidates(layer, hidden):
        with changed(weights, FACTOR):
            after = _through(parts, layer, number, ids, hidden * FACTOR)
        if _close(after, before * FACTOR, like, (before - hidden) * FACTOR):
            return weights
    raise refusal(parts, f"what layer {number} adds to the hidden states does not grow with any of its output projections and norms")


def check_layer(parts: Parts, number: int, layer: nn.Module, tables: Sequence[Weight]) -> None:
    """Refuse a layer that takes embeddings, which take a factor, from elsewhere than the layer before it."""
    ids = probe_ids(parts)
    entered = parts.entering(number, ids, None)
    if entered is None:
        return
    hidden, like = _resize(entered), next(layer.parameters())
    before = _through(parts, layer, number, ids, hidden)
    with changed(tables, FACTOR):
        after = _through(parts, layer, number, ids, hidden)
    if not _close(after, before, like, before - hidden):
        raise refusal(parts, f"layer {number} takes the embeddings from elsewhere than the layer before it")


def embedding_weights(parts: Parts) -> list[Weight]:
    """Return the weights of the frame that take s, so that what enters the first layer becomes s times what it was.

    Raises:
        UnsuitableError: no set of embeddings or norms does that.
    """
    from torch import nn

    ids, frame = probe_ids(parts), parts.frame
    before = _first(parts, ids)
    table = frame.get_input_embeddings().weight
    modules = [(name, module) for name, module in frame.named_modules() if isinstance(module, nn.Embedding)]
    tables = [Weight(f"{name}.weight", module.weight, rows=ids[0] if module.weight is table else None) for name, module in modules]
    norms = [*_norms(frame, before)]
    for weights in ([one for one in tables if one.value is table], tables, *norms):
        with changed(weights, FACTOR):
            after = _first(parts, ids)
        if weights and _close(after, before * FACTOR, table):
            return weights
    raise refusal(parts, "what enters its first layer does not grow with its embeddings")


def head_weights(parts: Parts, tables: Sequence[Weight]) -> list[Weight]:
    """Return the weights of the final norm that take 1 / s where the head is the embedding table, which takes s; nothing where it is not.

    A layer must have been run before.

    Raises:
        UnsuitableError: no norm makes the logits again what they were.
    """
    ids = probe_ids(parts)
    hidden = _resize(_first(parts, ids))
    before = _logits(parts, ids, hidden)
    norms = [[replace(weight, power=-1) for weight in norm] for norm in _norms(parts.frame, hidden)]
    for weights in ([], *norms):
        with changed([*tables, *weights], FACTOR):
            after = _logits(parts, ids, hidden)
        if _close(after, before, tables[0].value):
            return weights
    raise refusal(parts, "its head is its embedding table, and no final norm can take the factor back")


@contextmanager
def changed(weights: Iterable[Weight], factor: float) -> Iterator[None]:
    """Let weights hold their new values for a while."""
    import torch

    kept = []
    with torch.no_grad():
        for weight in weights:
            rows = slice(None) if weight.rows is None else weight.rows
            kept.append((weight, rows, weight.value[rows].clone()))
            weight.value[rows] = multiply(weight.value[rows], factor, weight)
        try:
            yield
        finally:
            for weight, rows, values in kept:
                weight.value[rows] = values


def _candidates(layer: nn.Module, hidden: Tensor) -> Iterator[list[Weight]]:
    width = hidden.shape[-1]
    outputs = [Weight(name, value) for name, value in layer.named_parameters() if _is_output(name, value, width)]
    norms = list(_norms(layer, hidden))
    if outputs:
        yield outputs
    pairs = [[*first, *second] for first, second in combinations(norms, 2)]
    yield from pairs
    for norm in norms:
        yield [*outputs, *norm]
    names = {weight.name for weight in outputs}
    readers = [Weight(name, value, -1) for name, value in layer.named_parameters() if value.ndim > 1 and name not in names]
    for pair in pairs:
        yield [*pair, *readers]


def _is_output(name: str, value: Tensor, width: int) -> bool:
    """Whether a weight has an output projection's name and size; expert weights may be parameters of their own, [experts, out, in]."""
    return not OUTPUTS.isdisjoint(name.removesuffix("_bias").split(".")) and width in value.shape[-2:]


def _norms(module: nn.Module, hidden: Tensor) -> Iterator[list[Weight]]:
    """Yield the weights of each norm over the width of hidden states, as they take a factor: whole, or less one."""
    import torch

    for name, norm in module.named_modules():
        own = dict(norm.named_parameters(recurse=False))
        if "norm" not in type(norm).__name__.lower() or not own:
            continue
        if any(value.shape != hidden.shape[-1:] or value.is_meta for value in own.values()):
            continue
        try:
            with torch.no_grad():
                before = norm(hidden)
                for offset in (0.0, 1.0):
                    weights = [Weight(f"{name}.{key}", value, offset=offset * (key == "weight")) for key, value in own.items()]
                    with changed(weights, FACTOR):
                        after = norm(hidden)
                    if _close(after, before * FACTOR, weights[0].value):
                        yield weights
                        break
        except (RuntimeError, TypeError, ValueError):  # it takes more than hidden states
            continue


def _through(parts: Parts, layer: nn.Module, number: int, ids: Tensor, hidden: Tensor) -> Tensor:
    """Run a layer on hidden states of our own."""
    import torch

    try:
        with torch.no_grad(), _given(layer, hidden):
            state = parts.step(layer, number, ids, None)
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
        said = " ".join(str(error).split())[:80]  # that memory ran out, perhaps, which is not to be remembered of the model
        raise DowncycleError(str(refusal(parts, f"layer {number} cannot be run by itself ({said})"))) from error
    if state is None:
        raise refusal(parts, f"layer {number} is not always run")
    return state.hidden


def _logits(parts: Parts, ids: Tensor, hidden: Tensor) -> Tensor:
    """Return the logits of the tokens of the check, of hidden states of our own behind the last layer, [1, tokens, tokens]."""
    import torch

    with torch.no_grad(), _given(parts.frame.stand_ins[0], hidden):
        return parts.logits(ids, None)[..., ids[0]]


def _first(parts: Parts, ids: Tensor) -> Tensor:
    """Return what enters the first layer."""
    import torch

    with torch.no_grad():
        hidden = parts.entering(0, ids, None)
    if hidden is None:
        raise refusal(parts, "its first layer is not run")
    return hidden.clone()


@contextmanager
def _given(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Let a layer be called with other hidden states than its caller's."""

    def give(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mine = hidden.clone()  # a layer may add to it in place
        return ((mine, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": mine})

    handle = layer.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _resize(hidden: Tensor) -> Tensor:
    """Multiply hidden states by a power of two that makes their root mean square about 1."""
    rms = float(hidden.double().square().mean().sqrt())
    return hidden * 2.0 ** -round(math.log2(rms)) if rms else hidden + 1


def _close(found: Tensor, wanted: Tensor, like: Tensor, part: Tensor | None = None) -> bool:
    """Whether two results are one, but for rounding to the dtype of a weight, by the size of what is wanted, or of a part of it."""
    far, whole = (float(one.double().norm()) for one in (found - wanted, wanted))
    size = whole if part is None else min(whole, float(part.double().norm()))
    return far <= (EXACT if like.element_size() > 2 else ROUNDED) * size + 1e-6 * whole


def refusal(parts: Parts, why: str) -> UnsuitableError:
    """Return the error of a model into whose weights no factor can be folded."""
    kind = parts.checkpoint.config.get("model_type")
    return UnsuitableError(f"{parts.checkpoint.name}: scale cannot be folded into a {kind} model, as {why}; try --compensate refit or none")

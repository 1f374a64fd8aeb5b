"""Fit one decoder layer so that what leaves it comes closest to given hidden states. Knows no model and no other layer.

Maps that write into the stream inside the layer (attention's output projection) are fitted first, to what the parent's stream is there,
then those whose output leaves the layer (the MLP's), on what is left. Samples that are not fitted on decide between that, the latter
alone, and the layer as it was: attention's projection in the last layer, say, may be fitted better and make the layer worse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .output import Writer
from .ridge import ChannelEquations, NormalEquations

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

RIDGE = 0.1  # of the mean diagonal of the normal equations; what was tried is in CHANGELOG.md
CHECKED = 5  # every fifth sample is not fitted on
Between = dict[str, "Tensor"]  # the stream where it enters a module, by the module's name


@dataclass(frozen=True)
class Sample:
    """What one batch is to become. run: takes the child's batch through the layer and returns what leaves it, [batch, tokens, width].

    wanted: what should leave it. between: what the parent's stream is inside. checked: [batch], samples that are not fitted on.
    """

    run: Callable[[], Tensor]
    wanted: Callable[[], Tensor]
    between: Callable[[], Between]
    checked: Tensor


def fit_layer(
    layer: nn.Module, writers: Sequence[Writer], batches: Sequence[Sample], dtypes: dict[str, torch.dtype]
) -> tuple[list[str], list[str]]:
    """Fit a layer's writers in place; return the names of those that were changed, and what is to be said of it.

    Args:
        dtypes: what the weight of each writer is stored in, to which it is rounded.
    """
    if not writers:
        return [], []
    between = batches[0].between()  # the parent's layer may be of another kind, without such a place
    inner, outer = [one for one in writers if one.at in between], [one for one in writers if not one.at]
    weights = {one.name: layer.get_parameter(f"{one.name}.weight") for one in writers}
    plain = {name: weight.detach().clone() for name, weight in weights.items()}
    tried: list[tuple[float, dict[str, Tensor], list[str]]] = []

    def attempt(order: Sequence[Writer]) -> None:
        notes: list[str] = []
        for writer in order:
            if said := _fit(layer, writer, batches, dtypes[writer.name]):
                notes.append(f"{writer.name}: {said}")
        tried.append((_error(batches), {one.name: weights[one.name].detach().clone() for one in order}, notes))
        for name, weight in plain.items():
            weights[name].data.copy_(weight)

    attempt([])
    if inner:
        attempt([*inner, *outer])
    if outer:
        attempt(outer)
    _, best, notes = min(tried, key=lambda one: one[0])
    for name, weight in best.items():
        weights[name].data.copy_(weight)
    return list(best), notes


def _error(batches: Sequence[Sample]) -> float:
    """The squared distance from what is wanted, on the samples that are not fitted on; on all, where they are too few to leave one out."""
    few = not any(bool(batch.checked.any()) for batch in batches)
    lacks = (_rows(batch.run() - batch.wanted(), batch.checked | few) for batch in batches)
    return sum(float(some.double().square().sum()) for some in lacks)


def _fit(layer: nn.Module, writer: Writer, batches: Sequence[Sample], dtype: torch.dtype) -> str:
    """Fit one writer to what its stream lacks."""
    module = layer.get_submodule(writer.name)
    sums: Any = None
    for batch in batches:
        given, gave, stream = _streams(layer, writer, batch)
        target = batch.between()[writer.at] if writer.at else batch.wanted()
        lacks = _rows((target - stream) / writer.coefficient, ~batch.checked)
        if writer.norm:
            bias = getattr(module, "bias", None)
            rows = _rows(gave if bias is None else gave - bias, ~batch.checked)
            sums = sums or ChannelEquations(lacks.shape[-1], str(rows.device))
        else:
            rows = _rows(given, ~batch.checked)
            sums = sums or NormalEquations(rows.shape[-1], lacks.shape[-1], str(rows.device))
        sums.add(rows, lacks)
    weight = layer.get_parameter(f"{writer.name}.weight")
    change, note = sums.solve(RIDGE)
    if writer.norm:
        changed = (weight.double() + writer.offset) * (1 + change) - writer.offset
    else:
        changed = weight.double() + (change.T if type(module).__name__ == "Conv1D" else change)
    weight.data.copy_(changed.to(dtype).to(weight.dtype))
    return note


def _streams(layer: nn.Module, writer: Writer, batch: Sample) -> tuple[Tensor, Tensor, Tensor]:
    """Run a batch; return what a writer is given, what it gives, and the stream right behind it."""
    seen: dict[str, Tensor] = {}

    def look(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen.setdefault(f"{name} given", args[0])
            seen.setdefault(f"{name} gave", output)

        return hook

    with ExitStack() as hooks:
        for name in {writer.name, writer.at} - {""}:
            hooks.callback(layer.get_submodule(name).register_forward_hook(look(name)).remove)
        output = batch.run()
    stream = seen[f"{writer.at} given"] if writer.at else output
    return seen[f"{writer.name} given"], seen[f"{writer.name} gave"], stream


@contextmanager
def streams_at(layer: nn.Module, names: Sequence[str]) -> Iterator[Between]:
    """Note what enters these modules of a layer while it runs."""
    seen: Between = {}

    def look(name: str) -> Any:
        return lambda module, args: seen.setdefault(name, args[0])

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if name in names:
                hooks.callback(module.register_forward_pre_hook(look(name)).remove)
        yield seen


def _rows(values: Tensor, chosen: Tensor) -> Tensor:
    """[batch, tokens, width], or its first two as one -> [rows, width] of the chosen samples."""
    return values.reshape(len(chosen), -1, values.shape[-1])[chosen].flatten(0, 1)

"""Fit kept layers so that they do what the dropped ones did: parent and child advance together, each layer read once.

Least squares on output projections (for one layer the idea of ReplaceMe, arXiv 2505.02819). The last kept layer before a dropped run is
fitted so that its output becomes the parent's hidden states behind the run; every later kept layer, in order, to the parent's hidden states
at its own depth, on what the child fitted so far makes of the samples. How one layer is fitted is in `layer_fit`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from ..checkpoint import Tensor
from ..errors import UnsuitableError
from ..importance.calibration import Batch
from ..importance.parts import Parts, State
from ..importance.paths import WHOLE, Dropped, Progress, to_ids
from ..importance.states import States
from ..model import TORCH_DTYPES
from ..quantizer import packed_by
from .fold import Fitted, Lazy
from .layer_fit import CHECKED, Between, Sample, fit_layer, streams_at
from .output import Writer, find_writers
from .stored import find_stored

if TYPE_CHECKING:
    import torch
    from torch import nn


BETWEEN = (-1,)  # where the parent's streams inside the layer that it ran last stand among its states


@dataclass(frozen=True)
class Pair:
    """Parent and child on their way through the layers."""

    parts: Parts
    batches: Sequence[Batch]
    kept: list[int]
    parent: States
    child: States
    fitted: States

    def target(self, done: int) -> int:
        """The parent's depth whose hidden states should leave the child's layer: where its next layer is entered."""
        return self.kept[done + 1] if done + 1 < len(self.kept) else self.parts.depth

    def together(self) -> bool:
        """Whether what was left of the parent is where the child goes on from, and what was fitted so far is there."""
        begin, parent = self.child.finished()[0], self.parent.finished()[0]
        return (self.target(begin - 1) if begin else 0) <= parent <= self.target(begin) and self.fitted.finished()[0] >= begin


def refit(
    parts: Parts, batches: Sequence[Batch], path: Dropped, states: States, progress: Progress = lambda what, done, total: None
) -> Fitted:
    """Return fitted weights of kept layers, rounded once to the dtype that they are stored in; none, where no fit brings a layer closer.

    Args:
        path: the layers that are dropped. states: where hidden states stand; a killed run goes on after the last fitted layer.
    Raises:
        UnsuitableError: packed weights, or a family none of whose maps writes into the residual stream so that it can be fitted.
        DowncycleError: numbers that are not finite, with the layer; no room for the states.
    """
    import torch

    if packed_by(parts.checkpoint.config) or "quantization_config" in parts.options:
        ways = "try --compensate none" if packed_by(parts.checkpoint.config) else "give another --load, or try --compensate scale"
        raise UnsuitableError(f"{parts.checkpoint.name}: its weights are packed, and cannot be fitted; {ways}")
    kept = [layer for layer in range(parts.depth) if layer not in path]
    pair = Pair(parts, batches, kept, states.part("parent"), states.part("child"), states.part("fitted"))
    if not pair.together():  # some were damaged, and are deleted
        states.clear()
    begin, notes = pair.child.finished()
    parts.recall(pair.parent.finished()[1])
    places, said, possible = notes or ({}, [], False)
    with torch.inference_mode():
        for done in range(begin, len(kept)):
            progress("refitting the layers", kept[done], parts.depth)
            for number in range(pair.parent.finished()[0], kept[done]):  # dropped ones before the first that is kept
                _advance_parent(pair, number, parts.layer(number), [])
            own, target = parts.layer(kept[done], to_change=True), pair.target(done)
            writers = _writers(pair, done, own) if target > done + 1 else []
            for number in range(pair.parent.finished()[0], target):
                layer = own if number == kept[done] else parts.layer(number)
                _advance_parent(pair, number, layer, [one.at for one in writers if one.at] if number + 1 == target else [])
            found, remarks = _fit(pair, done, own, writers)
            places, said, possible = places | _keep(pair, done, found), said + remarks, possible or bool(writers)
            _advance_child(pair, done, own, plain=target == done + 1)
            pair.child.finish(done + 1, (places, said, possible))
    parts.release()
    if path and not possible:
        raise UnsuitableError(
            f"{parts.checkpoint.name}: none of the layers to fit has a map whose output is added to the hidden states as it is; try scale"
        )
    return Fitted(Lazy(places, partial(_kept, pair)), tuple(said))


def _writers(pair: Pair, done: int, layer: nn.Module) -> list[Writer]:
    """Find the writers of a layer by running it on what the child gives it: some layers cannot do without what earlier ones hand on."""
    number = pair.kept[done]

    def run() -> torch.Tensor:
        after = pair.parts.step(layer, number, *_first(pair, done))
        assert after is not None
        return after.hidden

    return [] if pair.parts.entering(number, *_first(pair, done)) is None else find_writers(layer, run)


def _first(pair: Pair, done: int) -> tuple[torch.Tensor, State | None]:
    """Return the child's first sample, or its first batch, where that does not come apart: tokens, and what enters a layer."""
    ids, state = to_ids(pair.batches[0], pair.parts.device), pair.child.get(done, WHOLE, 0, pair.parts.device)
    if state is None:
        return ids[:1], None
    return (ids[:1], state.of(slice(1))) if state.comes_apart else (ids, state)


def _advance_parent(pair: Pair, number: int, layer: nn.Module, inside: Sequence[str]) -> None:
    """Take the parent through a layer, and note its streams inside."""
    for place, batch in enumerate(pair.batches):
        before = pair.parent.get(number, WHOLE, place, pair.parts.device)
        with streams_at(layer, inside) as between:
            after = pair.parts.step(layer, number, to_ids(batch, pair.parts.device), before)
        pair.parent.put(number + 1, WHOLE, place, after)
        pair.parent.put(number + 1, BETWEEN, place, State(None, {"between": dict(between)}))
    pair.parent.finish(number + 1, pair.parts.notes())


def _fit(pair: Pair, done: int, layer: nn.Module, writers: Sequence[Writer]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Fit one layer of the child; return its changed weights by their names in the checkpoint."""
    import torch

    number, known = pair.kept[done], pair.parts.layer_tensors(pair.kept[done])
    stored = {one.name: _find(pair.parts, layer, one, known) for one in writers}
    dtypes = {name: getattr(torch, TORCH_DTYPES[known[stored[name]].dtype]) for name in stored}
    changed, notes = fit_layer(layer, writers, list(_samples(pair, done, layer)), dtypes)
    weights = {stored[name]: layer.get_parameter(f"{name}.weight").detach().to(dtypes[name]).clone() for name in changed}
    return weights, [f"layer {number}, {note}" for note in notes]


def _keep(pair: Pair, done: int, fitted: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, int]]:
    """Put fitted weights on disk; return where each stands."""
    for number, weight in enumerate(fitted.values()):
        pair.fitted.put(done + 1, WHOLE, number, State(weight))
    pair.fitted.finish(done + 1, None, keep=True)
    return {name: (done + 1, number) for number, name in enumerate(fitted)}


def _kept(pair: Pair, name: str, place: tuple[int, int]) -> torch.Tensor:
    """Return a fitted weight from disk."""
    depth, number = place
    weight = pair.fitted.get(depth, WHOLE, number)
    assert weight is not None
    return weight.hidden


def _samples(pair: Pair, done: int, layer: nn.Module) -> Iterator[Sample]:
    """Give each batch as the fit takes it: read from disk whenever it is asked for."""
    import torch

    total, count = sum(len(batch.ids) for batch in pair.batches), 0
    for place, batch in enumerate(pair.batches):
        numbers = torch.arange(count, count + len(batch.ids), device=pair.parts.device)
        checked = numbers % CHECKED == CHECKED - 1 if total >= CHECKED else torch.zeros_like(numbers, dtype=torch.bool)
        yield Sample(
            partial(_run, pair, done, layer, place), partial(_wanted, pair, done, place), partial(_between, pair, done, place), checked
        )
        count += len(batch.ids)


def _run(pair: Pair, done: int, layer: nn.Module, place: int) -> torch.Tensor:
    after = _step(pair, done, layer, place)
    assert after is not None
    return after.hidden


def _step(pair: Pair, done: int, layer: nn.Module, place: int) -> State | None:
    before = pair.child.get(done, WHOLE, place, pair.parts.device)
    return pair.parts.step(layer, pair.kept[done], to_ids(pair.batches[place], pair.parts.device), before)


def _wanted(pair: Pair, done: int, place: int) -> torch.Tensor:
    state = pair.parent.get(pair.target(done), WHOLE, place, pair.parts.device)
    assert state is not None
    return state.hidden


def _between(pair: Pair, done: int, place: int) -> Between:
    state = pair.parent.get(pair.target(done), BETWEEN, place, pair.parts.device)
    assert state is not None
    return state.shared["between"]


def _advance_child(pair: Pair, done: int, layer: nn.Module, plain: bool) -> None:
    """Take the child through its layer; as long as nothing was dropped, it stands where the parent does."""
    for place in range(len(pair.batches)):
        same = pair.parent.get(done + 1, WHOLE, place, pair.parts.device) if plain else _step(pair, done, layer, place)
        pair.child.put(done + 1, WHOLE, place, same)


def _find(parts: Parts, layer: nn.Module, writer: Writer, known: dict[str, Tensor]) -> str:
    """Return the name under which a writer's weight is stored."""
    weight = layer.get_parameter(f"{writer.name}.weight")
    (name,) = find_stored(parts.checkpoint.name, f"{writer.name}.weight", weight, known)
    return name

"""Take samples through a model's layers on several paths at once, each of which leaves some layers out: one pass over the weights.

Paths that have left out the same layers so far are one: prefixes are run once. Knows no metric and chooses nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import DowncycleError
from .calibration import Batch
from .parts import Parts, State, why_not_finite
from .states import States
from .trim import trim

if TYPE_CHECKING:
    import torch
    from torch import nn

Dropped = frozenset[int]  # a path: the layers that it leaves out
WHOLE: Dropped = frozenset()
LOGITS = {"cpu": 1 << 24, "cuda": 1 << 30}  # bytes of float32 logits that are made at once
Progress = Callable[[str, int, int], None]


class Observer:
    """Something that looks on as the whole model runs. What it notes is kept with each finished layer."""

    def loaded(self, number: int, layer: nn.Module) -> None:
        """Look at a layer, before anything goes through it."""

    def see(self, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Look at what enters a layer and what leaves it, of one batch, [..., batch, tokens, width]."""

    def notes(self) -> Any:
        """Return what was seen so far, in numbers, lists and tensors."""

    def recall(self, notes: Any) -> None:
        """Go on from notes."""


@dataclass(frozen=True)
class SampleLoss:
    """The loss of one sample: the sum of -ln p over its scored tokens, in nats, how many they are, and its document."""

    nats: float
    tokens: int
    document: int


def run_paths(
    parts: Parts,
    batches: Sequence[Batch],
    paths: Sequence[Dropped],
    states: States,
    *,
    observers: Sequence[Observer] = (),
    keep_states: bool = False,
    what: str = "running the layers",
    progress: Progress = lambda what, done, total: None,
) -> dict[Dropped, list[SampleLoss]]:
    """Return the losses of all samples on each path, from one pass over the layers.

    A layer is loaded, all batches of all paths go through it, and it is let go. What stands behind it is on disk before the next begins, so
    that a run which was killed goes on from there.

    Args:
        observers: look on as the whole model runs, which must be among the paths. keep_states: keep those of the whole model at each depth.
    Raises:
        DowncycleError: numbers that are not finite, with the layer; no room for the states.
    """
    import torch

    with torch.inference_mode():
        begin, notes = states.finished()
        if notes:
            parts.recall(notes["parts"])
            for observer, seen in zip(observers, notes["observers"], strict=True):
                observer.recall(seen)
        for number in range(begin, parts.depth):
            progress(what, number, parts.depth)
            _run_layer(parts, number, batches, paths, states, observers)
            seen = {"observers": [observer.notes() for observer in observers], "parts": parts.notes()}
            states.finish(number + 1, seen, keep_states)
        progress(what, parts.depth, parts.depth)
        trim()
        losses = {path: list(_path_losses(parts, batches, path, states)) for path in paths}
        parts.release()
    return losses


def _run_layer(
    parts: Parts, number: int, batches: Sequence[Batch], paths: Sequence[Dropped], states: States, observers: Sequence[Observer]
) -> None:
    """Take every batch of every path that has it through one layer."""
    so_far = {path: frozenset(layer for layer in path if layer < number) for path in paths}
    for path in {so_far[path] for path in paths if number in path}:
        for place in range(len(batches)):
            states.pass_on(number, path, place, number)
    running = sorted({so_far[path] for path in paths if number not in path}, key=sorted)
    if not running:
        return
    layer = parts.layer(number)
    for observer in observers:
        observer.loaded(number, layer)
    for place, batch in enumerate(batches):
        ids = to_ids(batch, parts.device)
        for path in running:
            before = states.get(number, path, place, parts.device)
            after = parts.step(layer, number, ids, before)
            states.put(number + 1, path, place, after)
            if path == WHOLE and observers and after is not before:  # else the model passes this layer over
                _show(observers, parts, number, ids, before, after)


def _show(observers: Sequence[Observer], parts: Parts, number: int, ids: torch.Tensor, before: State | None, after: State | None) -> None:
    entered = parts.entering(number, ids, before) if before is None else before.hidden
    if entered is not None and after is not None:
        for observer in observers:
            observer.see(number, entered, after.hidden)


def _path_losses(parts: Parts, batches: Sequence[Batch], path: Dropped, states: States) -> Iterator[SampleLoss]:
    for place, batch in enumerate(batches):
        ids = to_ids(batch, parts.device)
        state = states.get(parts.depth, path, place, parts.device)
        losses = sum_losses(parts, batch, ids, state)
        for nats, given, document in zip(losses.tolist(), batch.given, batch.documents, strict=True):
            yield SampleLoss(nats, ids.shape[1] - given, document)


def sum_losses(parts: Parts, batch: Batch, ids: torch.Tensor, state: State | None) -> torch.Tensor:
    """Return the sum of -ln p over the scored tokens of each sample of a batch, [samples] float64.

    Raises:
        DowncycleError: a loss that is not finite.
    """
    import torch

    sums = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    for samples, columns in pieces(parts, ids, state):
        sums[samples] += piece_losses(parts, batch, ids, state, samples, columns).double().sum(1)
    if not bool(sums.isfinite().all()):
        name = parts.checkpoint.name
        raise DowncycleError(f"{name}: the output of the final norm or the head is not finite{why_not_finite(parts.frame)}")
    return sums


def piece_losses(parts: Parts, batch: Batch, ids: torch.Tensor, state: State | None, samples: slice, columns: torch.Tensor) -> torch.Tensor:
    """Return -ln p of the tokens that follow some columns of some samples, [samples, columns] float32; 0 where they are context."""
    import torch
    from torch.nn.functional import cross_entropy

    ids, given = ids[samples], torch.tensor(batch.given[samples], device=ids.device)
    logits = parts.logits(ids, state.of(samples) if state and state.comes_apart else state, columns).float()
    targets = ids[:, columns + 1]  # [samples, columns]; logits are [samples, columns, vocabulary]
    losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    return losses.where(columns + 1 >= given[:, None], 0.0)


def pieces(parts: Parts, ids: torch.Tensor, state: State | None) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield samples and the columns of them that predict a token, as many at once as logits may take memory.

    For each piece the frame is run on its samples: of hidden states that can be taken apart, as few samples as fill the memory are.
    """
    import torch

    columns, room = torch.arange(ids.shape[1] - 1, device=ids.device), LOGITS[ids.device.type] // (4 * parts.vocabulary)
    apart = state is None or state.comes_apart
    count = max(1, room // len(columns)) if apart else len(ids)
    for first in range(0, len(ids), count):
        for some in columns.split(max(1, room // count)):
            yield slice(first, min(first + count, len(ids))), some


def to_ids(batch: Batch, device: str) -> torch.Tensor:
    """Return a batch's tokens as the model takes them, [samples, tokens]."""
    import torch

    return torch.from_numpy(batch.ids).to(device)

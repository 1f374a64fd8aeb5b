"""What is measured while the whole model runs: block influence, the states of last tokens, the magnitude of weights."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from .metrics import Influence, angular_triangle, last_tokens, magnitude
from .paths import Observer

if TYPE_CHECKING:
    import torch
    from torch import nn


class Influences(Observer):
    """Block influence of each layer."""

    def __init__(self, depth: int):
        self.found = [Influence() for _ in range(depth)]

    def see(self, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a batch."""
        self.found[number] = self.found[number].add(before, after)

    def notes(self) -> Any:
        """Return the sums so far."""
        return [asdict(one) for one in self.found]

    def recall(self, notes: Any) -> None:
        """Go on from these sums."""
        self.found = [Influence(**one) for one in notes]

    def scores(self) -> list[float | None]:
        """Return the block influence of each layer; None of one that takes no part in reading a text."""
        return [one.score if one.states else None for one in self.found]


class LastTokens(Observer):
    """The hidden states of each sample's last token at every depth."""

    def __init__(self, depth: int):
        self.rows: list[list[torch.Tensor]] = [[] for _ in range(depth + 1)]

    def see(self, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a batch."""
        if number == 0:
            self.rows[0].append(last_tokens(before))
        self.rows[number + 1].append(last_tokens(after))

    def notes(self) -> Any:
        """Return the states so far, those of a depth as one tensor: they are saved after each layer."""
        import torch

        return [[torch.cat(rows)] if rows else [] for rows in self.rows]

    def recall(self, notes: Any) -> None:
        """Go on from these states."""
        self.rows = notes

    def triangle(self) -> list[list[float]]:
        """Return the angular distance of every block; of a layer that takes no part in reading a text, what entered it left it."""
        import torch

        depths = [torch.cat(self.rows[0])]
        for rows in self.rows[1:]:
            depths.append(torch.cat(rows) if rows else depths[-1])
        return angular_triangle(depths)


class ChannelMagnitudes(Observer):
    """How large each channel of the hidden states is at every depth: the sum of |h_c| over all tokens."""

    def __init__(self, depth: int):
        self.sums: list[torch.Tensor | None] = [None] * (depth + 1)  # [width] float64 each

    def see(self, number: int, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add a batch."""
        if number == 0:
            self._add(0, before)
        self._add(number + 1, after)

    def notes(self) -> Any:
        """Return the sums so far."""
        return self.sums

    def recall(self, notes: Any) -> None:
        """Go on from these sums."""
        self.sums = notes

    def ratios(self) -> list[list[float]]:
        """Return how much hidden states grow between any two depths (Prune&Comp, arXiv 2507.18212): [i][j] is the mean over channels of
        E|h_j,c| / E|h_i,c|. Channels that are zero at depth i are left out; behind a layer that was not run stands what stood before it.
        """
        import torch

        depths: list[torch.Tensor] = []
        for sums in self.sums:
            depths.append(depths[-1] if sums is None else sums)
        sizes = torch.stack(depths)  # [depths, channels]
        return [(sizes[:, one > 0] / one[one > 0]).mean(1).tolist() for one in sizes]

    def _add(self, depth: int, state: torch.Tensor) -> None:
        import torch

        sums = state.detach().abs().flatten(0, -2).sum(0, dtype=torch.float64).cpu()
        known = self.sums[depth]
        self.sums[depth] = sums if known is None else known + sums


class Magnitudes(Observer):
    """The magnitude of each layer's weights; None where they are packed."""

    def __init__(self, depth: int):
        self.scores: list[float | None] = [None] * depth

    def loaded(self, number: int, layer: nn.Module) -> None:
        """Add up a layer's weights."""
        with suppress(TypeError):
            self.scores[number] = magnitude(layer.parameters())

    def notes(self) -> Any:
        """Return the sums so far."""
        return self.scores

    def recall(self, notes: Any) -> None:
        """Go on from these sums."""
        self.scores = notes

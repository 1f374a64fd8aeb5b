"""Layers as columns of a sheet: the same column for the same layer in every part of a figure, and the numbers below them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .drawing import INK, SMALL, WIDE, add_axes, write_on

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUMBERED = 0.16  # inches: a column that a layer's number fits into
WIDEST = 0.6  # inches: of a column
LINE, BEHIND = 0.21, 0.12  # inches: from a title to the line below it, and from the last layer to the words behind it
HEAD = 0.5  # inches: what a part's title takes, and the line below it


@dataclass(frozen=True)
class Columns:
    """Where layers stand on a sheet, in inches. left: of the first; cell: the width of each; right: what is free behind the last."""

    layers: int
    wide: bool
    left: float
    cell: float
    right: float

    @property
    def width(self) -> float:
        """Of all columns together."""
        return self.cell * self.layers

    @property
    def end(self) -> float:
        """Where words end, on a narrow sheet."""
        return self.left + self.width + self.right - 0.04


def columns_of(layers: int, width: float) -> Columns:
    """Put layers on a sheet of a width: between two margins for words, or on a narrow one below words."""
    wide = width >= WIDE
    left, right = (1.8, 1.45) if wide else (0.42, 0.04)
    cell = min(WIDEST, (width - left - right) / layers)
    return Columns(layers, wide, left, cell, width - left - cell * layers)


def layer_axes(figure: Figure, columns: Columns, top: float, height: float) -> Axes:
    """Add axes whose x is the layer, each layer's column around its number."""
    axes = add_axes(figure, columns.left, top, columns.width, height)
    axes.set_xlim(-0.5, columns.layers - 0.5)
    axes.tick_params(labelsize=SMALL - 1.5, length=2.5, width=0.6, pad=2)
    axes.spines[["left", "bottom"]].set(linewidth=0.6, alpha=0.6)
    return axes


def number_layers(axes: Axes, layers: int, cell: float, shown: bool = True) -> None:
    """Mark layers by ticks, and write their numbers where they are to be shown: all, or as many as there is room for."""
    step = layer_step(cell)
    axes.set_xticks(places := range(0, layers, step), [str(place) for place in places] if shown else [])


def layer_step(cell: float) -> int:
    """Return how many layers lie between two that are numbered."""
    return next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * cell >= (NUMBERED if step == 1 else 0.26))


def write_head(figure: Figure, left: float, top: float, title: str, detail: str) -> None:
    """Write a part's title, and below it what it needs to be read."""
    write_on(figure, left, top, title, weight="bold")
    write_on(figure, left, top + LINE, detail, SMALL - 0.5, alpha=0.85)


def write_behind(figure: Figure, columns: Columns, top: float, title: str) -> None:
    """Write what the words behind the layers say, on a wide sheet."""
    if columns.wide:
        write_on(figure, columns.left + columns.width + BEHIND, top + LINE, title, SMALL - 0.5, alpha=0.85)


def faint(axes: Axes, **places: Any) -> None:
    """Draw faint lines behind what is shown, along one axis."""
    axes.grid(**places, color=INK, alpha=0.15, linewidth=0.7)
    axes.set_axisbelow(True)

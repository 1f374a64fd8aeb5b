"""Which layers each rule keeps: a row for each rule, a column for each layer, and what the plain cut loses beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from ...surgery.importance.scores import Choice, Scores
from ...terminal import printable
from .drawing import INK, PALETTE, SMALL, shorten, write_on
from .layer_columns import BEHIND, HEAD, NUMBERED, Columns, layer_axes, number_layers, write_behind, write_head
from .score_facts import best_cut

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, ABOVE, MARKS, NUMBERS = 0.27, 0.22, 0.14, 0.3  # inches: a row, words above a narrow one, marks above all, layers' numbers below
CELL = 0.21  # inches: the height of a layer's box


def map_height(scores: Scores, columns: Columns) -> float:
    """Return what the map takes of a sheet, in inches."""
    rows = len(scores.choices) * (ROW if columns.wide else ROW + ABOVE)
    return HEAD + (MARKS if scores.protect else 0) + rows + _numbers(columns)


def draw_map(figure: Figure, scores: Scores, columns: Columns, top: float) -> None:
    """Draw kept layers in full and dropped ones as outlines, numbered in their boxes or below."""
    words = "filled: kept; outlined: dropped" + ("; ▾: protected" if scores.protect else "")
    write_head(figure, 0, top, f"What each rule keeps: {scores.keep} of {scores.layers}", words)
    write_behind(figure, columns, top, "loss of the cut")
    top += HEAD
    each, best = ROW if columns.wide else ROW + ABOVE, best_cut(scores)
    height = (MARKS if scores.protect else 0) + each * len(scores.choices)
    axes = layer_axes(figure, columns, top, height)
    axes.set_ylim(height, 0)
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    down = 0.0
    if scores.protect:
        axes.plot(scores.protect, [0.05] * len(scores.protect), linestyle="", marker="v", markersize=4, color=INK, markeredgewidth=0)
        down = MARKS
    for choice in scores.choices:
        _write_row(figure, scores, choice, columns, top + down, choice is best)
        down += 0 if columns.wide else ABOVE
        _draw_row(axes, choice, columns, down)
        down += ROW
    number_layers(axes, columns.layers, columns.cell, shown=not _inside(columns))
    axes.tick_params(length=0 if _inside(columns) else 2.5)


def _inside(columns: Columns) -> bool:
    """Whether the boxes are large enough for their layers' numbers."""
    return columns.cell >= NUMBERED


def _numbers(columns: Columns) -> float:
    return 0.0 if _inside(columns) else NUMBERS


def _draw_row(axes: Axes, choice: Choice, columns: Columns, top: float) -> None:
    from matplotlib.patches import PathPatch

    kept = sorted(set(choice.kept))
    dropped = [layer for layer in range(columns.layers) if layer not in kept]
    gap = 0.02 / columns.cell if columns.cell > 0.08 else 0.0
    look: dict[str, Any] = {"edgecolor": INK, "linewidth": 0.5, "linestyle": (0, (2, 2)), "alpha": 0.6, "fill": False}
    for layers, style in ((kept, {"facecolor": PALETTE[0], "linewidth": 0}), (dropped, look)):
        if layers:
            axes.add_patch(PathPatch(_boxes(layers, gap, top), clip_on=False, **style))
    if _inside(columns):
        for layer in range(columns.layers):
            there = layer in kept
            style = {"color": "#ffffff"} if there else {"color": INK, "alpha": 0.8}
            axes.text(layer, top + CELL / 2 + 0.005, str(layer), size=6.5, ha="center", va="center_baseline", **style)


def _boxes(layers: list[int], gap: float, top: float) -> Any:
    """One path around every layer, or around every run of neighbours where there is no gap between two."""
    from matplotlib.path import Path

    boxes = []
    for low, high in _runs(layers) if not gap else ((layer, layer) for layer in layers):
        left, right = low - 0.5 + gap / 2, high + 0.5 - gap / 2
        corners = [(left, top), (right, top), (right, top + CELL), (left, top + CELL), (left, top)]
        boxes.append(Path(corners, [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY]))
    return Path.make_compound_path(*boxes)


def _runs(layers: Iterable[int]) -> Iterator[tuple[int, int]]:
    first = last = None
    for layer in layers:
        if first is not None and last is not None and layer != last + 1:
            yield first, last
            first = layer
        first, last = layer if first is None else first, layer
    if first is not None and last is not None:
        yield first, last


def _write_row(figure: Figure, scores: Scores, choice: Choice, columns: Columns, top: float, best: bool) -> None:
    """Name the rule and what its cut loses, and how much more than the whole model that is; the best one in bold."""
    lost = f"{choice.cut.loss:.3f}  {choice.cut.loss - scores.uncut.loss:+.3f}" + ("" if columns.wide else " nats")
    look: dict[str, Any] = {"weight": "bold"} if best else {}
    write_on(figure, 0.02, top + 0.04, shorten(printable(choice.rule), 22), SMALL + 0.5, **look)
    side = columns.left + columns.width + BEHIND if columns.wide else columns.end
    write_on(figure, side, top + 0.045, lost, SMALL, ha="left" if columns.wide else "right", **look)

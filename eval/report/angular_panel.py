"""How far each block of neighbouring layers turns the hidden states: the triangle d(i, n) as a heat map (arXiv 2403.17887)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...surgery.importance.scores import Scores
from .drawing import SMALL, add_axes
from .layer_columns import HEAD, layer_step, write_head
from .score_facts import Block, asked_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BELOW, LEFT = 0.5, 0.5  # inches: for the numbers of layers, and for those of lengths
DOT, RING = "#ffffff", "#0b0b0b"  # on any of the map's colours, on any page


def triangle_height(scores: Scores, width: float) -> float:
    """Return what the heat map takes of a sheet of a width, in inches."""
    return HEAD + _side(scores, width) + BELOW if scores.angular else 0.0


def draw_triangle(figure: Figure, scores: Scores, left: float, top: float, width: float) -> None:
    """Draw distances as colours, from blue, the least, to yellow; a dot marks the least of the blocks that were asked for."""
    block = asked_block(scores)
    write_head(figure, left, top, "Angular distance of blocks", _words(block))
    deep, side = len(scores.angular), _side(scores, width)
    axes = add_axes(figure, left + LEFT, top + HEAD, width - LEFT - 0.06, side)
    cell = (width - LEFT - 0.06) / scores.layers
    image = axes.imshow(
        _rows(scores), cmap=_colours(), aspect="auto", interpolation="none", extent=(-0.5, scores.layers - 0.5, deep + 0.5, 0.5)
    )
    axes.spines[:].set_visible(False)
    axes.tick_params(labelsize=SMALL - 1.5, length=2.5, width=0.6, pad=2)
    axes.set_xticks(range(0, scores.layers, layer_step(cell)))
    axes.set_yticks(_lengths(deep, side))
    axes.set_xlabel("first layer of the block", size=SMALL - 0.5, labelpad=2)
    axes.set_ylabel("layers in it", size=SMALL - 0.5, labelpad=2)
    if block:
        dot: dict[str, Any] = {"marker": "o", "markersize": 5.5, "markerfacecolor": DOT, "markeredgecolor": RING, "markeredgewidth": 1.2}
        axes.plot(block.begin, block.length, clip_on=False, **dot)
    _draw_key(figure, axes, image)


def _side(scores: Scores, width: float) -> float:
    """The height of the map: less than its width, and no less than its colours' key needs."""
    return max(1.3, min(0.34 * len(scores.angular), 0.7 * width))


def _words(block: Block | None) -> str:
    if block is None:
        return "from what enters to what leaves a block"
    last = block.begin + block.length - 1
    which = f"layer {block.begin}" if block.length == 1 else f"layers {block.begin}-{last}"
    return f"○ least of blocks of {block.length}: {which}, d = {block.distance:.3f}"


def _rows(scores: Scores) -> Any:
    """The triangle as a masked array, a row for each length."""
    import numpy as np

    rows = np.ma.array(np.zeros((len(scores.angular), scores.layers)), mask=True)
    for place, row in enumerate(scores.angular):
        rows[place, : len(row)] = row
    return rows


def _colours() -> Any:
    """Viridis, which those who see few colours can read as well, without its darkest part, which a dark page would swallow."""
    import matplotlib
    from matplotlib.colors import ListedColormap

    whole = matplotlib.colormaps["viridis"]
    return ListedColormap([whole(0.18 + 0.82 * n / 255) for n in range(256)])


def _lengths(deep: int, side: float) -> list[int]:
    """The lengths that are numbered: 1, and round ones."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 1000) if step * side / deep >= 0.17)
    return [*range(1, deep + 1, step)] if step < 5 else [1, *range(step, deep + 1, step)]


def _draw_key(figure: Figure, axes: Axes, image: Any) -> None:
    """Say which colour is which distance, in the corner that a triangle leaves free."""
    key = axes.inset_axes((0.62, 0.13, 0.34, 0.055))
    bar = figure.colorbar(image, cax=key, orientation="horizontal")
    bar.outline.set_visible(False)
    low, high = image.get_clim()
    ticks = [low, (low + high) / 2, high] if high > low else [low]
    bar.set_ticks(ticks, labels=[f"{tick:.2f}" for tick in ticks])
    key.tick_params(labelsize=SMALL - 1.5, length=2, width=0.6, pad=1.5)
    key.set_title("angle / π", size=SMALL - 1, pad=3)

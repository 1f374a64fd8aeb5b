"""The scores of layers as one figure: what each metric says, what each rule keeps, how far blocks turn the states, and what it costs.

A layer has the same column in all charts. Drawn on a sheet of a given width, and as high as it needs to be.
"""

from __future__ import annotations

import textwrap
from pathlib import PurePath
from typing import TYPE_CHECKING

from ...surgery.importance.scores import Scores
from ...terminal import printable
from .angular_panel import draw_triangle, triangle_height
from .choice_map import draw_map, map_height
from .drawing import SMALL, WIDE, new_sheet, plain_style, shorten, write_on
from .importance_panel import draw_importance, importance_height
from .layer_columns import columns_of
from .loss_panel import draw_losses, losses_height
from .score_facts import setting_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GAP = 0.24  # inches: between two parts, one below the other
TRIANGLE, BETWEEN = 4.05, 0.4  # inches: the triangle's share of a wide sheet, and what of that is left free
TOP, LINE = 0.05, 0.17  # inches: above the heading, a line of it


@plain_style()
def draw_scores(scores: Scores, width: float = WIDE) -> Figure:
    """Draw everything that was measured: charts below one another; on a wide sheet the last two side by side."""
    columns, heading = columns_of(scores.layers, width), _heading(scores, width)
    beside = columns.wide and bool(scores.angular and scores.choices)
    split = TRIANGLE if beside else 0.0  # where the last part begins
    parts = [importance_height(scores, columns), map_height(scores, columns) if scores.choices else 0.0]
    last = [triangle_height(scores, split - BETWEEN if beside else width), losses_height(scores) if scores.choices else 0.0]
    below = [max(last)] if beside else last
    tops, top = [], TOP + LINE * len(heading) + 0.16
    for height in (*parts, *below):
        tops.append(top)
        top += height + GAP if height else 0.0
    used = top - (GAP if any((*parts, *below)) else 0)
    figure = new_sheet(width, used, f"Layers of {scores_name(scores)}: importance, choices, angular distances and losses")
    for place, line in enumerate(heading):
        write_on(figure, 0, TOP + LINE * place, line, SMALL, alpha=0.9)
    if parts[0]:
        draw_importance(figure, scores, columns, tops[0])
    if parts[1]:
        draw_map(figure, scores, columns, tops[1])
    if last[0]:
        draw_triangle(figure, scores, 0, tops[2], split - BETWEEN if beside else width)
    if last[1]:
        draw_losses(figure, scores, split, tops[2 if beside else 3], width - split)
    return figure


def scores_name(scores: Scores) -> str:
    """Name the model, as short as can be."""
    return printable(PurePath(scores.model).name or scores.model)


def _heading(scores: Scores, width: float) -> list[str]:
    """What was measured, on what, as lines."""
    said = f"{scores_name(scores)}, {scores.layers} layers; {printable(setting_words(scores))}"
    length = int(width / 0.069)
    return textwrap.wrap(shorten(said, 3 * length), length, max_lines=3, placeholder="…")

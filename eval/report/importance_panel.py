"""How much each layer matters: one small chart for each metric, below one another, as their units differ."""

from __future__ import annotations

import math
import textwrap
from typing import TYPE_CHECKING, Any

from ...surgery.importance.scores import Importance, Scores
from ...terminal import printable, scale
from .drawing import INK, PALETTE, SMALL, shorten, write_on
from .layer_columns import BEHIND, HEAD, Columns, faint, layer_axes, number_layers, write_behind, write_head
from .score_facts import least_important, scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CHART, GAP, ABOVE, NUMBERS = 0.62, 0.17, 0.36, 0.3  # inches: a chart, what is below it, words above it, the layers' numbers below the last
LISTED = 5  # layers that matter least, by name


def importance_height(scores: Scores, columns: Columns) -> float:
    """Return what the charts take of a sheet, in inches."""
    each = CHART + GAP + (0 if columns.wide else ABOVE)
    return HEAD + each * len(scores.importance) - GAP + NUMBERS if scores.importance else 0.0


def draw_importance(figure: Figure, scores: Scores, columns: Columns, top: float) -> None:
    """Draw a chart for each metric: a dot for each layer, a cross where the metric says nothing of one."""
    missing = "; ×: not scored" if any(score is None for one in scores.importance for score in one.scores) else ""
    write_head(figure, 0, top, "How much each layer matters", f"higher matters more{missing}")
    write_behind(figure, columns, top, "matter least")
    top += HEAD
    for place, one in enumerate(scores.importance):
        top += 0 if columns.wide else ABOVE
        axes = layer_axes(figure, columns, top, CHART)
        _draw_scores(axes, one, columns)
        _write_words(figure, one, columns, top)
        number_layers(axes, columns.layers, columns.cell, shown=place == len(scores.importance) - 1)
        top += CHART + GAP


def _draw_scores(axes: Axes, one: Importance, columns: Columns) -> None:
    known = [(layer, score) for layer, score in enumerate(one.scores) if score is not None]
    size = max(1.2, min(4.5, 26 * columns.cell))
    values: list[float] = [math.nan if score is None else score for score in one.scores]
    axes.plot(range(len(values)), values, color=PALETTE[0], linewidth=0.8, alpha=0.55)
    if known:
        axes.plot(*zip(*known, strict=True), color=PALETTE[0], linestyle="", marker="o", markersize=size, markeredgewidth=0)
    _set_scale(axes, one)
    missing = [layer for layer, score in enumerate(one.scores) if score is None]
    look: dict[str, Any] = {"color": INK, "alpha": 0.6, "marker": "x", "markersize": max(2.0, 0.8 * size), "markeredgewidth": 0.7}
    axes.plot(missing, [0.06] * len(missing), transform=axes.get_xaxis_transform(), linestyle="", **look)
    faint(axes, axis="y")


def _set_scale(axes: Axes, one: Importance) -> None:
    """Set the axis, with a few round numbers on it."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullFormatter

    kind, linear = scale_of(one)
    known = [score for score in one.scores if score is not None] or [0.0]
    low, high = min(known), max(known)
    if kind == "linear":
        span = high - low or abs(high) or 1.0
        axes.set_ylim(low - 0.12 * span, high + 0.12 * span)
        found = MaxNLocator(3).tick_values(low, high) if high > low else [low] * bool(high)
        ticks = [tick for tick in found if low - 0.1 * span <= tick <= high + 0.1 * span]
    elif kind == "log":
        axes.set_yscale("log")
        axes.set_ylim(low / (high / low) ** 0.12, high * (high / low) ** 0.12)
        ticks = _powers(low / 1.5, high * 1.5)
    else:
        axes.set_yscale("symlog", linthresh=linear)
        axes.set_ylim((1.6 * low if low < 0 else 0) - 0.5 * linear, 2.2 * high if high > linear else linear)
        ticks = [*(-tick for tick in _powers(linear * 3, -low)), 0.0, *_powers(linear * 3, high * 1.2)]
    axes.yaxis.set_major_locator(FixedLocator(ticks))
    axes.yaxis.set_minor_locator(FixedLocator([]))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_yticks(ticks, [tick_words(tick) for tick in ticks])


def tick_words(value: float) -> str:
    """Write a number in six signs or so: 0.08, 1e-05, 1.95 M."""
    if abs(value) < 1e4:
        return f"{value:.4g}"
    return ("-" if value < 0 else "") + scale(abs(value), ("", " k", " M", " G", " T"))


def _powers(low: float, high: float) -> list[float]:
    """The powers of ten between two positive numbers, three at most."""
    if high <= low or low <= 0:
        return []
    exponents = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    return [10.0**n for n in exponents[:: max(1, -(-len(exponents) // 3))]]


def _write_words(figure: Figure, one: Importance, columns: Columns, top: float) -> None:
    """Name the metric, its unit and the layers that matter least: beside the chart, or above a narrow one."""
    kind = {"linear": "", "log": "log axis", "symlog": "log axis, linear near 0"}[scale_of(one)[0]]
    title, unit = printable(one.metric), printable(one.unit)
    least = ", ".join(map(str, least_important(one, LISTED if columns.layers <= 100 else LISTED - 1)))
    small: dict[str, Any] = {"size": SMALL - 1, "alpha": 0.85}
    if not columns.wide:
        write_on(figure, 0.02, top - ABOVE + 0.01, shorten(title, 22), SMALL + 0.5)
        write_on(figure, columns.end, top - ABOVE + 0.02, f"least: {least}", ha="right", **small)
        write_on(figure, 0.02, top - ABOVE + 0.18, shorten(", ".join(filter(None, [unit, kind])), 56), **small)
        return
    write_on(figure, 0.02, top + 0.02, shorten(title, 21), SMALL + 0.5)
    for place, line in enumerate(textwrap.wrap(", ".join(filter(None, [unit, kind])), 24, max_lines=3, placeholder="…")):
        write_on(figure, 0.02, top + 0.195 + 0.145 * place, line, **small)
    write_on(figure, columns.left + columns.width + BEHIND, top + CHART / 2 - 0.07, least, SMALL)

"""What each rule's choice loses more than the whole model, plain and compensated: dots on one axis, as that may be a tenth or ten nats."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from ...surgery.importance.scores import Choice, Scores
from ...terminal import printable
from .drawing import INK, PALETTE, SMALL, add_axes, shorten, write_on
from .layer_columns import HEAD, LINE, faint, write_head
from .score_facts import best_choice, best_way, losses_of, ways_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROW, BELOW, KEY = 0.32, 0.64, 0.26  # inches: a rule, the axis's numbers, what explains the dots
GUTTER, BEHIND = 0.98, 1.18  # inches: for the rules' names, and for the least loss of each
LOG = 12  # an axis on which the largest is more than so many times the smallest is a log axis
DEEP = 1e4  # and shows no less than the largest by this
LOOKS = (("o", PALETTE[1]), ("^", PALETTE[4]), ("s", PALETTE[0]), ("D", PALETTE[2]), ("P", PALETTE[3]))  # of the ways, in order


def losses_height(scores: Scores) -> float:
    """Return what the losses take of a sheet, in inches."""
    return HEAD + KEY + ROW * len(scores.choices) + BELOW


def draw_losses(figure: Figure, scores: Scores, left: float, top: float, width: float) -> None:
    """Draw what each rule's ways lose more than the whole model, with whiskers of one standard error of their loss."""
    uncut = scores.uncut
    write_head(figure, left, top, "Held-out loss", f"uncut: {uncut.loss:.3f} ± {uncut.stderr:.3f} nats per token")
    write_on(figure, left + width, top + LINE, "least of each", SMALL - 0.5, ha="right", alpha=0.85)
    _draw_key(figure, scores, left, top + HEAD - 0.02)
    top += HEAD + KEY
    height = ROW * len(scores.choices)
    axes = add_axes(figure, left + GUTTER, top, width - GUTTER - BEHIND, height)
    _dress(axes, scores)
    axes.set_ylim(height, 0)
    best = best_choice(scores)
    for place, choice in enumerate(scores.choices):
        middle, way = ROW * (place + 0.5), best_way(choice)
        _draw_choice(axes, scores, choice, middle)
        bold: dict[str, Any] = {"weight": "bold"} if choice is best else {}
        write_on(figure, left + 0.02, top + middle - 0.07, shorten(printable(choice.rule), 12), SMALL + 0.5, **bold)
        least = f"{shorten(printable(way), 8)} {losses_of(choice)[way].loss:.3f}"
        write_on(figure, left + width, top + middle - 0.07, least, SMALL, ha="right", **bold)


def added(scores: Scores) -> list[float]:
    """Return what every way of every rule loses more than the whole model."""
    return [loss.loss - scores.uncut.loss for choice in scores.choices for loss in losses_of(choice).values()]


def is_log(scores: Scores) -> bool:
    """Return whether the axis is a log axis, which shows nothing that loses no more than the whole model but at its edge."""
    above = [value for value in added(scores) if value > 0]
    return len(above) > 1 and max(above) > LOG * min(above)


def _draw_choice(axes: Axes, scores: Scores, choice: Choice, middle: float) -> None:
    """A rule's ways on one line, each not left of the axis; what lies there is an arrow."""
    ways, edge = ways_of(scores), axes.get_xlim()[0]
    found = {way: (loss.loss - scores.uncut.loss, loss.added_stderr) for way, loss in losses_of(choice).items()}
    ends = [max(edge, value) for value, _ in found.values()]
    axes.plot([min(ends), max(ends)], [middle] * 2, color=INK, alpha=0.4, linewidth=0.9)
    for way, (value, stderr) in found.items():
        marker, colour = LOOKS[ways.index(way) % len(LOOKS)]
        low, high = max(edge, value - stderr), max(edge, value + stderr)
        axes.plot([low, high], [middle] * 2, color=colour, linewidth=1.6, solid_capstyle="butt")
        look: dict[str, Any] = {"markersize": 6, "color": colour, "markeredgecolor": INK, "markeredgewidth": 0.5, "clip_on": False}
        axes.plot(max(edge, value), middle, marker=marker if value >= edge else "<", linestyle="", **look)


def _dress(axes: Axes, scores: Scores) -> None:
    from matplotlib.ticker import NullFormatter, NullLocator

    values = added(scores)
    low, high = min(values), max(values)
    if log := is_log(scores):
        low = max(min(value for value in values if value > 0), high / DEEP)
        axes.set_xscale("log")
        axes.set_xlim(low / (high / low) ** 0.08, high * (high / low) ** 0.08)
        ticks = log_ticks(low / (high / low) ** 0.05, high)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xticks(ticks, [f"+{tick:g}" for tick in ticks])
    else:
        low, high = min(low, 0.0), max(high, 0.0)
        span = max(high - low, 2 * scores.uncut.stderr, 1e-6)
        axes.set_xlim(low - 0.04 * span, high + 0.08 * span)
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:+g}" if abs(value) > 1e-9 else "uncut")
        axes.axvline(0, color=INK, linewidth=1.1, linestyle=(0, (3, 2)))
    words = f"nats per token more than uncut{', log axis' if log else ''}\nwhiskers: one standard error of the difference"
    axes.set_xlabel(words, size=SMALL - 0.5, labelpad=3)
    axes.set_yticks([])
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(labelsize=SMALL - 1, length=0)
    faint(axes, axis="x")


def log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two positive ones, at most five: powers of ten, or where these are few, some between them."""
    powers = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    for factors in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        ticks = [factor * power for power in powers for factor in factors if low <= factor * power <= high]
        if len(ticks) > 2:
            break
    return ticks[:: max(1, -(-len(ticks) // 5))]


def _draw_key(figure: Figure, scores: Scores, left: float, top: float) -> None:
    """Say which dot is which way."""
    from matplotlib.lines import Line2D

    across, down = figure.get_size_inches()
    left += 0.08
    for place, way in enumerate(ways_of(scores)):
        marker, colour = LOOKS[place % len(LOOKS)]
        spot = [left / across], [1 - (top + 0.075) / down]
        look: dict[str, Any] = {"markersize": 6, "color": colour, "markeredgecolor": INK, "markeredgewidth": 0.5}
        figure.add_artist(Line2D(*spot, marker=marker, linestyle="", **look))
        shown = shorten(printable(way), 10)
        write_on(figure, left + 0.1, top, shown, SMALL - 0.5)
        left += 0.1 + 0.08 * len(shown) + 0.2

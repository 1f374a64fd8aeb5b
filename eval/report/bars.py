"""Groups of horizontal bars on one or more axes below one another: what benchmarks, perplexities, sizes and rates are drawn with."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..results import Results
from .compare import labels
from .drawing import INK, SMALL, WIDE, add_axes, add_legend, axis_top, colour_of, hatch_of, legend_height, new_sheet, shorten
from .numbers import join_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAR, GAP, LINE = 0.2, 0.16, 0.18  # inches: the height of a bar, what is between two groups, a line of a title
GUTTER, BEHIND = 1.75, 1.25  # inches: for a group's title, and for the words behind its bars


@dataclass(frozen=True)
class Bar:
    """One bar: its model's place, its value and the ends of its whisker in the axis's unit, what is written behind it."""

    model: int
    value: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Group:
    """Bars that are compared with one another. chance: what guessing gives, in the axis's unit."""

    title: str
    detail: str
    bars: tuple[Bar, ...]
    chance: float | None = None


@dataclass(frozen=True)
class Panel:
    """Groups on one axis. unit: what the axis counts. limit: the most that a value can be. log: whether the axis begins at 1, the least."""

    groups: tuple[Group, ...]
    unit: str
    limit: float = math.inf
    log: bool = False

    @property
    def bars(self) -> list[Bar]:
        """The bars of all its groups."""
        return [bar for group in self.groups for bar in group.bars]


def panel_of(groups: tuple[Group, ...], unit: str) -> Panel:
    """A log axis where values differ by a factor of ten or more. From 1, the least perplexity, a bar is as long as the loss is high."""
    values = [bar.value for group in groups for bar in group.bars]
    log = min(values) >= 1 and max(values) / min(values) >= 10
    return Panel(groups, f"{unit}; log axis" if log else unit, log=log)


def draw_panels(results: Results, what: str, panels: Sequence[Panel], width: float) -> Figure | None:
    """Draw panels below one another: groups of horizontal bars, their titles beside them, or above them on a narrow sheet."""
    if not panels:
        return None
    names, shown = labels(results), sorted({bar.model for panel in panels for bar in panel.bars})
    left = GUTTER if width >= WIDE else 0.05
    heights = [sum(_group_height(group, width) for group in panel.groups) + 0.06 for panel in panels]
    top = legend_height([names[i] for i in shown], width)
    figure = new_sheet(width, top + sum(heights) + 0.55 * len(panels), f"{what} of {join_words([names[i] for i in shown])}")
    add_legend(figure, [names[i] for i in shown], shown)
    for panel, height in zip(panels, heights, strict=True):
        axes = add_axes(figure, left, top, width - left - 0.05, height)
        axes.set_ylim(height, 0)
        _scale(axes, panel, width - left - 0.05)
        _draw_groups(axes, panel, width)
        top += height + 0.55
    return figure


def _title_lines(group: Group, width: float) -> list[str]:
    """The lines of a group's title, two at most and the detail: one below the other in a gutter, or all in one where the title is above."""
    if width >= WIDE:
        lines = textwrap.wrap(shorten(group.title, 44), 23, max_lines=2, placeholder="…")
        return [*lines, *([shorten(group.detail, 26)] if group.detail else [])]
    length = int(width / 0.085)
    text = ", ".join(filter(None, [group.title, group.detail]))
    return textwrap.wrap(shorten(text, 2 * length - 8), length, max_lines=2, placeholder="…")


def _head(group: Group, width: float) -> float:
    """What a title takes above the bars, in inches."""
    return 0.0 if width >= WIDE else LINE * len(_title_lines(group, width)) + 0.08


def _group_height(group: Group, width: float) -> float:
    beside = LINE * len(_title_lines(group, width)) if width >= WIDE else 0.0
    return _head(group, width) + max(BAR * len(group.bars), beside) + GAP


def _scale(axes: Axes, panel: Panel, width: float) -> None:
    """Set the axis, with room behind the longest bar for its words."""
    highest = max([bar.high for bar in panel.bars] + [group.chance or 0 for group in panel.groups])
    lowest = min([bar.low for bar in panel.bars if bar.value < 0], default=0.0)
    share = width / (width - BEHIND)
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0, labelsize=SMALL)
    axes.set_yticks([])
    if panel.log:
        powers = int(math.log10(highest)) + 1
        ticks: list[float] = [10.0**n for n in range(0, powers, -(-powers // 6))]
        axes.set_xscale("log")
        axes.set_xlim(1, highest**share)
        axes.set_xticks([], minor=True)
    else:
        low = -axis_top(-lowest) if lowest < 0 else 0.0
        top = min(axis_top(highest), panel.limit) if highest > 0 else 0.0 if low else 1.0
        ticks = [low + (top - low) * n / 4 for n in range(5)]
        axes.set_xlim(low, low + (top - low) * share)
    axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    axes.set_xlabel(panel.unit, size=SMALL, loc="left")
    axes.grid(axis="x", color=INK, alpha=0.15, linewidth=0.8)
    axes.set_axisbelow(True)


def _draw_groups(axes: Axes, panel: Panel, width: float) -> None:
    top, words = 0.06, axes.get_xlim()[1] * BEHIND / (width - (GUTTER if width >= WIDE else 0.05) - 0.05)
    for group in panel.groups:
        head, height = _head(group, width), _group_height(group, width) - GAP
        _write_title(axes, group, top, height, width)
        start = top + head + (height - head - BAR * len(group.bars)) / 2
        for place, bar in enumerate(group.bars):
            middle = start + BAR * (place + 0.5)
            draw_bar(axes, bar, middle, 1.0 if panel.log else 0.0, panel.limit)
            if group.chance and not bar.high < group.chance < bar.high + words:  # no line through words
                axes.plot([group.chance] * 2, [middle - BAR / 2, middle + BAR / 2], color=INK, linewidth=1.2, linestyle=(0, (2, 1.5)))
        if group.chance:
            axes.plot([group.chance] * 2, [start - 0.07, start - 0.01], color=INK, linewidth=1.2)
        top += height + GAP


def _write_title(axes: Axes, group: Group, top: float, height: float, width: float) -> None:
    lines, place = _title_lines(group, width), axes.get_yaxis_transform()
    if width < WIDE:
        for number, line in enumerate(lines):
            axes.text(0, top + 0.1 + LINE * number, line, transform=place, va="center")
        return
    for number, line in enumerate(lines):
        look: dict[str, Any] = {"size": SMALL - 0.5, "alpha": 0.75} if group.detail and number == len(lines) - 1 else {}
        middle = top + height / 2 + LINE * (number - (len(lines) - 1) / 2)
        axes.text(-0.02, middle, line, transform=place, ha="right", va="center", **look)


def draw_bar(axes: Axes, bar: Bar, middle: float, zero: float, limit: float = math.inf) -> None:
    """Draw a bar, its whisker and its words. A whisker ends where the axis begins and at the limit, there without a cap."""
    style: dict[str, Any] = {"color": colour_of(bar.model), "hatch": hatch_of(bar.model), "edgecolor": INK, "linewidth": 0}
    axes.barh(middle, bar.value - zero, height=BAR * 0.85, left=zero, **style)
    low, high = max(bar.low, axes.get_xlim()[0]), min(bar.high, limit)
    if bar.high > bar.low:
        axes.plot([low, high], [middle, middle], color=INK, linewidth=1.1, solid_capstyle="butt")
        for end in (end for end in (bar.low, bar.high) if low <= end <= high):
            axes.plot([end] * 2, [middle - 0.04, middle + 0.04], color=INK, linewidth=1.1)
    axes.annotate(bar.text, (max(high, zero), middle), (4, 0), textcoords="offset points", va="center_baseline", size=SMALL)

"""The comparison as figures: what was kept, what it cost, how it healed, what it saves. Each is None where there is nothing to show.

A model has the same colour in each. Drawn on sheets of a given width, and as high as they need to be.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ...terminal import format_bytes
from ..origin import UNKNOWN
from ..results import ModelResult, Results
from .bars import BAR, BEHIND, Bar, Group, Panel, draw_bar, draw_panels, panel_of
from .compare import ScoreRow, TextRow, labels, score_rows, text_rows
from .drawing import INK, SMALL, WIDE, add_axes, add_legend, colour_of, legend_height, new_sheet, plain_style, shorten, write_on
from .loss_curve import loss_curve
from .numbers import join_words, write_count, write_figure, write_score, write_share
from .ternary_weights import ternary_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CELL, BELOW = 0.3, 0.16  # inches: the height of a layer, and what is left below a model's layers


@plain_style()
def layer_map(results: Results, width: float = WIDE) -> Figure | None:
    """Draw the first parent's layers for each model, those kept in full and those dropped as outlines, numbered from 0."""
    if not any(model.kept for model in results.models):
        return None
    names = labels(results)
    rows = [(i, model) for i, model in enumerate(results.models) if model.kept is not None or model.role != UNKNOWN]
    depth = max(model.depth or model.layers for _, model in rows)
    across = -(-depth // -(-depth // (42 if width >= WIDE else 16)))  # layers in a line, in lines of about the same length
    cell = min(0.5, (width - 0.04) / across)
    heads = [_kept_words(model) for _, model in rows]
    end = 0.02 + cell * across
    head = 0.32 if all(len(names[i]) + len(words) < end / 0.092 for (i, _), words in zip(rows, heads, strict=True)) else 0.5
    height = sum(head + CELL * -(-(model.depth or model.layers) // across) + BELOW for _, model in rows)
    figure = new_sheet(width, height, f"Layers kept and dropped by {join_words([names[i] for i, _ in rows])}")
    axes = add_axes(figure, 0, 0, width, height)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    top = 0.0
    for (index, model), words in zip(rows, heads, strict=True):
        axes.text(0.02, top + 0.17, shorten(names[index], int(width / 0.1)), weight="bold", va="center")
        where = {"x": end, "y": top + 0.17, "ha": "right"} if head < 0.5 else {"x": 0.02, "y": top + 0.36}
        axes.text(**where, s=words, size=SMALL, va="center", alpha=0.8)
        top += head
        kept = _counts(model)
        for layer in range(total := model.depth or model.layers):
            _draw_cell(axes, index, layer, kept[layer], (0.02 + cell * (layer % across), top + CELL * (layer // across)), cell)
        top += CELL * -(-total // across) + BELOW
    return figure


@plain_style()
def benchmark_bars(results: Results, width: float = WIDE) -> Figure | None:
    """Draw each benchmark's scores side by side, whiskers of one standard error, chance, and the share of the first model's score left."""
    rows = score_rows(results)
    points, others = [row for row in rows if row.percent], [row for row in rows if not row.percent]
    chance = "; dashed: chance" if any(row.chance for row in rows) else ""
    panels = [Panel(tuple(map(_score_group, points)), f"of 100{chance}; whiskers: one standard error", limit=100)] if points else []
    panels += [Panel((_score_group(row),), "higher is better" if row.higher_is_better else "lower is better") for row in others]
    return draw_panels(results, "Benchmarks", panels, width)


@plain_style()
def perplexity_bars(results: Results, width: float = WIDE) -> Figure | None:
    """Draw each text's perplexity, or bits per byte where the models' tokenizers differ; on a log axis where they differ by ten or more."""
    rows = text_rows(results)
    panels = []
    for comparable in (True, False):
        if groups := tuple(_text_group(row) for row in rows if row.comparable is comparable):
            unit = "perplexity, lower is better" if comparable else "bits per byte, lower is better; tokenizers differ"
            panels.append(panel_of(groups, unit))
    return draw_panels(results, "Perplexity", panels, width)


@plain_style()
def size_and_speed(results: Results, width: float = WIDE) -> Figure | None:
    """Draw size, memory and rates of each model, with its share of the first one's; None for a model alone."""
    facts: list[tuple[str, Callable[[ModelResult], float | None], Callable[[float], str]]] = [
        ("Parameters", lambda model: model.parameters, write_count),
        ("Size of the tensors", lambda model: model.nbytes, format_bytes),
        ("Peak memory", lambda model: model.speed.peak_bytes if model.speed else None, format_bytes),
        ("Prefill, tokens per second", lambda model: model.speed.prefill_rate if model.speed else None, write_figure),
        ("Decoding, tokens per second", lambda model: model.speed.decode_rate if model.speed else None, write_figure),
    ]
    names, count = labels(results), len(results.models)
    panels = [(title, [read(model) for model in results.models], write) for title, read, write in facts]
    panels = [panel for panel in panels if any(panel[1])]
    if count < 2:
        return None
    columns = 3 if width >= WIDE else 1
    top, high, wide = legend_height(names, width) + 0.1, 0.3 + BAR * 1.15 * count + 0.2, width / columns
    figure = new_sheet(width, top + high * -(-len(panels) // columns), f"Size and speed of {join_words(names)}")
    add_legend(figure, names, range(count))
    for place, (title, values, write) in enumerate(panels):
        left, down = wide * (place % columns), top + high * (place // columns)
        write_on(figure, left, down, title, weight="bold")
        bars = [Bar(i, v, v, v, f"{write(v)}{_share_words(v, values[0], i)}") for i, v in enumerate(values) if v]
        axes = add_axes(figure, left, down + 0.28, wide - 0.1, BAR * 1.15 * count)
        axes.set_axis_off()
        axes.set(ylim=(BAR * 1.15 * count, 0), xlim=(0, max(bar.value for bar in bars) * (wide - 0.1) / (wide - 0.1 - BEHIND)))
        for bar in bars:
            draw_bar(axes, bar, BAR * 1.15 * (bar.model + 0.5), zero=0)
    return figure


def _counts(model: ModelResult) -> Counter[int]:
    """How often each layer of the first parent is kept; all are by a model that was not cut."""
    return Counter(range(model.layers) if model.kept is None else model.kept)


def _kept_words(model: ModelResult) -> str:
    if model.kept is None:
        return f"{model.layers} layers"
    counts = _counts(model)
    return f"{len(counts)} of {model.depth} layers kept" + (f", {model.layers} in all" if max(counts.values()) > 1 else "")


def _draw_cell(axes: Axes, index: int, layer: int, times: int, corner: tuple[float, float], cell: float) -> None:
    """Draw one layer with its number, and how often it is kept where that is more than once."""
    from matplotlib.patches import Rectangle

    left, down = corner
    box = Rectangle((left + 0.01, down + 0.015), cell - 0.02, CELL - 0.03, facecolor=colour_of(index) if times else "none")
    box.set(edgecolor=INK, linewidth=0.5, linestyle="-" if times else (0, (2, 2)), alpha=None if times else 0.55)
    axes.add_patch(box)
    style: dict[str, Any] = {"ha": "center", "va": "center", "color": _on(index) if times else INK, "alpha": None if times else 0.75}
    middle = left + cell / 2
    axes.text(middle, down + CELL * (0.5 if times < 2 else 0.32), str(layer), size=7 if times < 2 else 6.5, **style)
    if times > 1:
        axes.text(middle, down + CELL * 0.71, f"×{times}", size=6.5, weight="bold", **style)


def _on(index: int) -> str:
    """The colour of text on a model's colour: white on blue and none else, for a contrast of 4.5 or more."""
    return "#ffffff" if colour_of(index) == "#0072b2" else "#0b0b0b"


def _share_words(value: float, first: float | None, index: int) -> str:
    return f" · {write_share(value / first)}" if first and index else ""


def _score_group(row: ScoreRow) -> Group:
    scale = 100 if row.percent else 1
    bars = []
    for index, (value, stderr) in enumerate(zip(row.values, row.stderrs, strict=True)):
        if value is not None:
            share = write_share(row.retained(index)) if index else ""
            text = f"{write_score(value, row.percent)}{f' · {share}' if share else ''}"
            bars.append(Bar(index, scale * value, scale * (value - (stderr or 0)), scale * (value + (stderr or 0)), text))
    shots = "" if row.shots is None else "1 shot" if row.shots == 1 else f"{row.shots} shots"
    words = [row.group, row.part or f"{row.tasks} tasks"] if row.tasks > 1 else [shots, row.part]
    return Group(row.title, ", ".join(filter(None, words)), tuple(bars), None if row.chance is None else scale * row.chance)


def _text_group(row: TextRow) -> Group:
    bars = []
    for index, one in enumerate(row.models):
        if one and row.comparable:
            low, high = math.exp(one.loss - one.stderr), math.exp(one.loss + one.stderr)
            bars.append(Bar(index, one.perplexity, low, high, write_figure(one.perplexity)))
        elif one:
            error = one.bits_per_byte * one.stderr / one.loss if one.loss else 0.0
            bars.append(
                Bar(index, one.bits_per_byte, one.bits_per_byte - error, one.bits_per_byte + error, write_figure(one.bits_per_byte))
            )
    return Group(row.text, f"window {row.length:,}", tuple(bars))


FIGURES: dict[str, Callable[[Results, float], Figure | None]] = {
    "layers": layer_map,
    "benchmarks": benchmark_bars,
    "perplexity": perplexity_bars,
    "loss": loss_curve,
    "speed": size_and_speed,
    "ternary": ternary_figure,
}

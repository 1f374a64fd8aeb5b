"""The ternary weights of packed models, as a table and a figure: shares of -1, 0 and 1 in each layer, and what rounding changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...terminal import format_bytes
from ..results import LayerWeights, ModelResult, Results, all_layers
from .compare import labels
from .drawing import INK, PALETTE, SMALL, WIDE, add_legend, axis_top, legend_height, new_sheet, plain_style, shorten, write_on
from .layer_columns import BEHIND, HEAD, Columns, columns_of, faint, layer_axes, number_layers, write_head
from .markup import NONE, html_table, plain, remark
from .numbers import join_words, write_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VALUES = ("−1", "0", "1")
COLOURS = (1, 6, 0)  # of the palette, for the values: two that stand apart, and grey for what is nothing
SHARES, ERRORS, GAP, NUMBERS, ABOVE = 1.3, 0.75, 0.2, 0.3, 0.24  # inches: the two charts, what parts them, numbers, words above one
OUTSIDE = "others"  # matrices in no layer


def ternary_tables(results: Results) -> str:
    """For each packed model a table: a row for each layer, and one for all."""
    parts = []
    for name, model in zip(labels(results), results.models, strict=True):
        if model.ternary:
            rows = [(_title(one), _cells(one)) for one in model.ternary] + [("All", _cells(all_layers(model.ternary)))]
            heads = [*(f"{value}" for value in VALUES), "Error", "Before", "After"]
            table = html_table(heads, rows, "Layer", marked=[len(rows) - 1])
            parts.append(f"<h3>{plain(name)}</h3>\n{_note(model)}{table}")
    return "\n".join(parts)


@plain_style()
def ternary_figure(results: Results, width: float = WIDE) -> Figure | None:
    """Draw for each packed model the shares of -1, 0 and 1 in each layer as stacked bars, and the error of rounding below."""
    shown = [(name, model) for name, model in zip(labels(results), results.models, strict=True) if _layers(model)]
    if not shown:
        return None
    heights = [HEAD + SHARES + NUMBERS + (GAP + ABOVE + ERRORS if _errors(model) else 0) for _, model in shown]
    top = legend_height(VALUES, width) + 0.1
    label = f"Ternary weights of {join_words([name for name, _ in shown])}: {'; '.join(map(_in_words, (model for _, model in shown)))}"
    figure = new_sheet(width, top + sum(heights) + GAP * (len(shown) - 1), label)
    add_legend(figure, VALUES, COLOURS)
    for (name, model), height in zip(shown, heights, strict=True):
        _draw_model(figure, name, model, columns_of(max(_layers(model)) + 1, width), top)
        top += height + GAP
    return figure


def _draw_model(figure: Figure, name: str, model: ModelResult, columns: Columns, top: float) -> None:
    layers, errors = _layers(model), _errors(model)
    write_head(figure, 0, top, shorten(name, 80 if columns.wide else 34), "share of the weights by value, layer by layer")
    axes = layer_axes(figure, columns, top + HEAD, SHARES)
    _draw_shares(axes, layers)
    number_layers(axes, columns.layers, columns.cell, shown=not errors)
    if columns.wide:
        zero = all_layers(model.ternary).zero / all_layers(model.ternary).weights
        write_on(figure, columns.left + columns.width + BEHIND, top + HEAD + SHARES / 2 - 0.07, f"0: {write_share(zero)}", SMALL)
    if errors:
        below = top + HEAD + SHARES + GAP
        write_on(figure, 0.02, below, "error: |W − sT| / |W|", SMALL, alpha=0.85)
        axes = layer_axes(figure, columns, below + ABOVE, ERRORS)
        _draw_errors(axes, errors, columns)
        if columns.wide and (error := all_layers(model.ternary).error) is not None:
            write_on(figure, columns.left + columns.width + BEHIND, below + ABOVE + ERRORS / 2 - 0.07, f"all: {write_share(error)}", SMALL)


def _draw_shares(axes: Axes, layers: dict[int, LayerWeights]) -> None:
    bottom = [0.0] * len(layers)
    for part, colour in zip(("minus", "zero", "plus"), COLOURS, strict=True):
        shares = [getattr(one, part) / one.weights for one in layers.values()]
        axes.bar(list(layers), shares, width=0.86, bottom=bottom, color=PALETTE[colour], edgecolor=INK, linewidth=0)
        bottom = [low + share for low, share in zip(bottom, shares, strict=True)]
    axes.set_ylim(0, 1)
    axes.set_yticks([0, 0.5, 1], ["0%", "50%", "100%"])


def _draw_errors(axes: Axes, errors: dict[int, float], columns: Columns) -> None:
    axes.plot(list(errors), list(errors.values()), color=PALETTE[2], linewidth=0.8, alpha=0.6)
    size = max(1.5, min(4.5, 26 * columns.cell))
    axes.plot(list(errors), list(errors.values()), color=PALETTE[2], linestyle="", marker="o", markersize=size, markeredgewidth=0)
    top = axis_top(max(errors.values())) if any(errors.values()) else 1.0
    axes.set_ylim(0, 1.08 * top)
    axes.set_yticks([0, top / 2, top], [f"{100 * tick:.3g}%" for tick in (0, top / 2, top)])
    faint(axes, axis="y")
    number_layers(axes, columns.layers, columns.cell)


def _layers(model: ModelResult) -> dict[int, LayerWeights]:
    return {one.layer: one for one in model.ternary if one.layer is not None}


def _errors(model: ModelResult) -> dict[int, float]:
    return {layer: one.error for layer, one in _layers(model).items() if one.error is not None}


def _title(one: LayerWeights) -> str:
    return OUTSIDE if one.layer is None else str(one.layer)


def _cells(one: LayerWeights) -> list[str]:
    shares = [write_share(count / one.weights) for count in (one.minus, one.zero, one.plus)]
    error = NONE if one.error is None else write_share(one.error)
    return [*shares, error, NONE if one.before is None else format_bytes(one.before), format_bytes(one.after)]


def _note(model: ModelResult) -> str:
    whole = all_layers(model.ternary)
    said = f"{whole.weights:,} weights in {8 * whole.after / whole.weights:.2f} bits each."
    error = " Error: |W − sT| / |W|, of the weights W that were rounded to s times −1, 0 or 1 (T); 51.3% where W is normally distributed."
    lost = " What they were rounded from is not on this machine; how far off they are is not known."
    return remark(said + (lost if whole.error is None else error))


def _in_words(model: ModelResult) -> str:
    whole = all_layers(model.ternary)
    shares = (
        f"{value}: {write_share(count / whole.weights)}" for value, count in zip(VALUES, (whole.minus, whole.zero, whole.plus), strict=True)
    )
    error = "" if whole.error is None else f", error {write_share(whole.error)}"
    return f"{', '.join(shares)}{error}"

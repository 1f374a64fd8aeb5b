"""How healing went: a trainer's losses over its steps, as a figure and as the rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..results import Logged, Results
from .compare import finite_losses, labels
from .drawing import INK, SMALL, WIDE, add_axes, add_legend, colour_of, legend_height, new_sheet, plain_style, write_on
from .numbers import join_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 500  # of a line; more would not be seen
POINT: dict[str, Any] = {"marker": "o", "markersize": 5, "markeredgecolor": INK, "markeredgewidth": 0.6}
ROWS = 24  # of a table
SETTLED = 0.05  # share of the steps after which a loss has left its first heights


@plain_style()
def loss_curve(results: Results, width: float = WIDE) -> Figure | None:
    """Draw the losses that were logged while models were trained: of the training text as lines, of the held-out text as points."""
    trained = [(i, curves(model.training)) for i, model in enumerate(results.models)]
    trained = [(i, found) for i, found in trained if found[0] or found[1]]
    if not trained:
        return None
    names = [name for i, name in enumerate(labels(results)) if i in dict(trained)]
    top = legend_height(names, width)
    figure = new_sheet(width, top + (4.1 if width >= WIDE else 3.4), f"Loss while training {join_words(names)}")
    add_legend(figure, names, [i for i, _ in trained])
    height = figure.get_size_inches()[1] - top - 1.03
    axes = add_axes(figure, 0.45, top + 0.58, width - 0.6, height)
    for index, (training, held_out) in trained:
        if training:
            line = thin(training)
            axes.plot(*zip(*line, strict=True), color=colour_of(index), linewidth=1.3, marker="." if len(line) < 3 else "")
        if held_out:
            axes.plot(*zip(*held_out, strict=True), color=colour_of(index), linestyle=(0, (3, 2)), linewidth=0.9, **POINT)
    above = _limit(axes, [point for _, found in trained for part in found for point in part])
    write_on(figure, 0, top, f"Nats per token. {_legend(trained)}\n{above}", SMALL, alpha=0.85)
    _mark_epochs(axes, [results.models[i].training[-1] for i, _ in trained], 10 if width >= WIDE else 5)
    _dress(axes)
    return figure


def curves(log: Sequence[Logged]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """Return (step, loss) of the training text and of the held-out text."""
    entries = [finite_losses(entry) for entry in log]
    training = [(entry.step, entry.loss) for entry in entries if entry.loss is not None]
    return training, [(entry.step, entry.eval_loss) for entry in entries if entry.eval_loss is not None]


def _legend(trained: Sequence[tuple[int, tuple[list[tuple[int, float]], list[tuple[int, float]]]]]) -> str:
    """Say which of the two losses is which."""
    shown = {"line: training text": any(one[0] for _, one in trained), "points: held-out text": any(one[1] for _, one in trained)}
    return "; ".join(words for words, there in shown.items() if there).capitalize() + "."


def thin(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """Return at most POINTS points: the means of runs of neighbours, all of about the same number."""
    count = min(len(points), POINTS)
    runs = [points[len(points) * i // count : len(points) * (i + 1) // count] for i in range(count)]
    return [(sum(step for step, _ in run) / len(run), sum(loss for _, loss in run) / len(run)) for run in runs]


def loss_rows(log: Sequence[Logged]) -> list[Logged]:
    """Return at most ROWS rows, first and last among them: each evaluation with the last training loss before it, or training losses."""
    rows: list[Logged] = []
    latest: float | None = None
    for entry in (log := sorted(map(finite_losses, log), key=lambda entry: (entry.step, entry.loss is None))):
        latest = entry.loss if entry.loss is not None else latest
        if entry.eval_loss is not None:
            rows.append(Logged(entry.step, entry.epoch, latest, entry.eval_loss))
    rows = rows or [entry for entry in log if entry.loss is not None]
    if len(rows) <= ROWS:
        return rows
    return [rows[round(i * (len(rows) - 1) / (ROWS - 1))] for i in range(ROWS)]


def _limit(axes: Axes, points: list[tuple[int, float]]) -> str:
    """Leave the first steps above the picture where they would flatten the rest, and say how high they are."""
    last = max(step for step, _ in points)
    settled = [loss for step, loss in points if step > SETTLED * last] or [loss for _, loss in points]
    low, high, peak = min(loss for _, loss in points), max(settled), max(points, key=lambda point: point[1])
    margin = 0.06 * (high - low) or 0.1
    axes.set_xlim(-0.01 * last, last * 1.01 + 1)
    if peak[1] - low <= 2.5 * (high - low) or high == low:
        axes.set_ylim(low - margin, max(peak[1], high) + margin)
        return ""
    axes.set_ylim(low - margin, high + 4 * margin)
    return f"Above the picture: the first steps, up to {peak[1]:.2f} at step {peak[0]:,}."


def _mark_epochs(axes: Axes, ends: list[Logged], most: int) -> None:
    """Mark where each epoch ends, or at most so many of them; nowhere where the models' epochs are of different lengths."""
    entry = max(ends, key=lambda entry: entry.epoch)
    if entry.epoch <= 0 or any(abs(end.step * entry.epoch - entry.step * end.epoch) > 0.01 * entry.step * entry.epoch for end in ends):
        return
    count = int(entry.epoch + 0.01)  # trainers round it
    every = -(-count // most) or 1
    for epoch in range(every, count + 1, every):
        step = entry.step * epoch / entry.epoch
        axes.axvline(step, color=INK, alpha=0.5, linewidth=0.9, linestyle=(0, (1, 2)))
        place = axes.get_xaxis_transform()
        axes.text(step, 1.01, f"epoch {epoch}", transform=place, ha="right", va="bottom", size=SMALL - 0.5, alpha=0.8)


def _dress(axes: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, prune=None))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel("optimiser step", size=SMALL)
    axes.grid(axis="y", color=INK, alpha=0.15, linewidth=0.8)

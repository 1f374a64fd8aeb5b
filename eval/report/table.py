"""The comparison in a terminal, or as plain text where it is piped: models as columns. Needs neither torch nor matplotlib."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, TextIO

from ...terminal import format_bytes
from ..results import ModelResult, Results
from .compare import ScoreRow, TextRow, labels, likely_parent, score_rows, text_rows
from .numbers import write_chance, write_count, write_figure, write_share, write_spread
from .summary import kept_words

if TYPE_CHECKING:
    from rich.table import Table

FIRST, LEAST = 29, 24  # signs: the first column at most, and where models would else not fit
COLUMN = 17  # signs: the narrowest column of a model with what parts it from the next


def print_table(results: Results, file: TextIO | None = None, width: int | None = None) -> None:
    """Print the comparison, in as many tables as the models need to fit: stdout and the terminal's width, where nothing else is given."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, width=width, highlight=False, emoji=False, markup=False)
    sign = "±" if "utf" in (console.encoding or "").lower() else "+-"
    fit = max(1, (console.width - LEAST) // COLUMN)
    count = len(results.models)
    for start in range(0, count, fit):
        if start:
            console.print()
        console.print(table(results, range(start, min(start + fit, count)), sign))
    if count > 1:
        console.print(f"Percentages: of {labels(results)[0]}.", soft_wrap=True)
    if said := _order_words(results):
        console.print(said, soft_wrap=True)


def table(results: Results, indices: Sequence[int] | None = None, sign: str = "±") -> Table:
    """Return a table of some of the models, or of all: what they are, and what was measured, against the first of all.

    Args:
        sign: stands before a standard error.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    chosen = range(len(results.models)) if indices is None else indices
    names = labels(results)
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    made.add_column("", overflow="fold", max_width=FIRST)
    for index in chosen:
        made.add_column(Text(names[index]), justify="right", overflow="fold", min_width=min(COLUMN - 2, len(names[index])))
    for title, cells in _rows(results, sign):
        if any(cells[index] for index in chosen):
            made.add_row(Text(title), *(Text(cells[index]) for index in chosen))
    return made


def _rows(results: Results, sign: str) -> list[tuple[str, list[str]]]:
    """Every row's title, and a cell for each model; empty where that was not measured."""
    models, first = results.models, results.baseline
    rows = [
        ("made as", [model.role for model in models]),
        ("layers", [kept_words(model) for model in models]),
        ("parameters", [_shared(write_count(model.parameters), model.parameters, first.parameters, i) for i, model in enumerate(models)]),
        ("size", [_shared(format_bytes(model.nbytes), model.nbytes, first.nbytes, i) for i, model in enumerate(models)]),
        ("measured in", [f"{model.load}, {model.device}" for model in models]),
    ]
    for text in text_rows(results):
        rows += _text_lines(text, sign)
    rows += [(_score_title(row), _score_cells(row, sign)) for row in score_rows(results)]
    return rows + _speed_lines(models)


def _order_words(results: Results) -> str:
    """Say that the first model's parent may stand behind it; nothing where none of the others can be that."""
    place, names, first = likely_parent(results), labels(results), results.baseline
    if place is None:
        return ""
    why = f"{names[0]} was cut from a model of {first.depth} layers, and {names[place]} has {first.depth}"
    return f"{why}. If that is its parent, name it first: `downcycle eval` compares with the first."


def _text_lines(row: TextRow, sign: str) -> list[tuple[str, list[str]]]:
    note = "" if row.comparable else " (tokenizers differ)"
    return [
        (f"perplexity, {row.text}{note}", [write_figure(one.perplexity) if one else "" for one in row.models]),
        ("  loss, nats per token", [f"{one.loss:.4f} {sign}{one.stderr:.4f}" if one else "" for one in row.models]),
        ("  bits per byte", [f"{one.bits_per_byte:.4f}" if one else "" for one in row.models]),
    ]


def _score_title(row: ScoreRow) -> str:
    words = ["average", row.group, row.part] if row.tasks > 1 else [row.title, row.metric, row.part]
    title = ", ".join(filter(None, words)) + ("" if row.higher_is_better else " (less is better)")
    chance = f"(chance {write_chance(row.chance, row.percent)})" if row.chance else ""
    between = " " if len(f"{title} {chance}") <= FIRST else "\n"
    return f"{title}{between}{chance}".rstrip()


def _score_cells(row: ScoreRow, sign: str) -> list[str]:
    cells = []
    for index, (value, stderr) in enumerate(zip(row.values, row.stderrs, strict=True)):
        share = write_share(row.retained(index)) if index else ""
        cells.append(
            "" if value is None else f"{write_spread(value, stderr, row.percent, sign).replace(f'{sign} ', sign)}  {share}".rstrip()
        )
    return cells


def _speed_lines(models: Sequence[ModelResult]) -> list[tuple[str, list[str]]]:
    facts = [("peak memory", "peak_bytes", format_bytes), ("prefill, tokens/s", "prefill_rate", write_figure)]
    facts.append(("decoding, tokens/s", "decode_rate", write_figure))
    lines = []
    for title, field, write in facts:
        values = [getattr(model.speed, field) if model.speed else None for model in models]
        lines.append((title, ["" if value is None else _shared(write(value), value, values[0], i) for i, value in enumerate(values)]))
    return lines


def _shared(text: str, value: float, first: float | None, index: int) -> str:
    return f"{text}  {write_share(value / first)}" if index and first else text

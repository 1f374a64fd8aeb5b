"""The scores of layers in a terminal, or as plain text where piped: maps, curves and losses. Needs no torch and no matplotlib."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from ...surgery.importance.scores import Choice, Scores
from ...terminal import layer_map, printable
from .score_facts import best_choice, best_way, heights, kept_words, least_important, losses_of, scale_of, ways_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

MAP, MAP_PLAIN = "░█", ".#"
CURVE, CURVE_PLAIN = "▁▂▃▄▅▆▇█", "01234567"
TITLE = 18  # signs: a rule or a metric at most
LISTED = 6  # layers that matter least, by name


def print_scores(scores: Scores, file: TextIO | None = None, width: int | None = None) -> None:
    """Print what was measured: stdout and the terminal's width, where nothing else is given."""
    from rich.console import Console

    console = Console(file=file or sys.stdout, width=width, highlight=False, emoji=False, markup=False)
    unicode = "utf" in (console.encoding or "").lower()
    lines = [line for block in map_lines(scores, console.width, unicode) for line in (*block, "")]
    console.print("\n".join([*_explanation(scores, unicode), "", *lines]), soft_wrap=True)
    if scores.choices:
        console.print(_losses(scores))
        console.print("\n".join(["", *_kept_lines(scores, console.width), ""]), soft_wrap=True)
    if scores.importance:
        console.print(_metrics(scores))
        console.print()
    _print_remarks(console, scores)


def map_lines(scores: Scores, width: int, unicode: bool = True) -> Iterator[list[str]]:
    """Return the map of each rule and the curve of each metric, layer below layer; in as many blocks of lines as the width takes."""
    signs, levels = (MAP, CURVE) if unicode else (MAP_PLAIN, CURVE_PLAIN)
    rows = [(choice.rule, layer_map(scores.layers, choice.kept, signs)) for choice in scores.choices]
    for one in scores.importance:
        places = (" " if height is None else levels[round(height * (len(levels) - 1))] for height in heights(one))
        rows.append((one.metric, "".join(places)))
    titles = [_short(title) for title, _ in rows]
    gutter = max(map(len, ["layer", *titles])) + 2
    parts = -(-scores.layers // max(10, width - gutter))
    across = -(-scores.layers // parts)
    across = -(-across // 10) * 10 if parts > 1 and gutter + -(-across // 10) * 10 <= width else across
    for start in range(0, scores.layers, across) if rows else ():
        end = min(start + across, scores.layers)
        yield [f"{'layer':<{gutter}}{_ruler(start, end)}"] + [
            f"{title:<{gutter}}{row[start:end]}".rstrip() for title, (_, row) in zip(titles, rows, strict=True)
        ]


def _ruler(start: int, end: int) -> str:
    """Every tenth layer's number above it, and the first one's."""
    line = [" "] * (end - start + 3)
    for layer in (layer for layer in range(start, end) if layer % 10 == 0 or layer == start):
        if all(sign == " " for sign in line[layer - start : layer - start + len(str(layer))]):
            line[layer - start : layer - start + len(str(layer))] = str(layer)
    return "".join(line).rstrip()


def _explanation(scores: Scores, unicode: bool) -> list[str]:
    uncut, sign = scores.uncut, "±" if unicode else "+-"
    full, empty = reversed(MAP if unicode else MAP_PLAIN)
    low, high = (CURVE[0], CURVE[-1]) if unicode else (CURVE_PLAIN[0], CURVE_PLAIN[-1])
    name = printable(scores.model)
    return [
        f"{name}: keep {scores.keep} of {scores.layers} layers; uncut it loses {uncut.loss:.4f} {sign}{uncut.stderr:.4f} nats per token",
        f"{full} kept  {empty} dropped; {low} matters least  {high} most" if scores.choices or scores.importance else "",
    ]


def _losses(scores: Scores) -> Table:
    """For each rule, the loss of each way, and how much more that is than the whole model's; the least of each is marked, and of all."""
    made, best = _table(), best_choice(scores)
    made.add_column("rule", overflow="fold", max_width=TITLE)
    for way in (ways := ways_of(scores)):
        made.add_column(printable(way), justify="right", overflow="fold")
    for choice in scores.choices:
        rule = f"{printable(choice.rule)}{'*' if choice is best else ''}"
        made.add_row(rule, *(_cell(scores, choice, way) for way in ways))
    return made


def _kept_lines(scores: Scores, width: int) -> list[str]:
    """Which layers each rule keeps, folded between ranges."""
    gutter = max(len(_short(choice.rule)) for choice in scores.choices) + 2
    lines = []
    for choice in scores.choices:
        head, *more = textwrap.wrap(kept_words(choice), max(10, width - gutter - len("keeps ")))
        lines += [f"{_short(choice.rule):<{gutter}}keeps {head}", *(" " * (gutter + len("keeps ")) + line for line in more)]
    return lines


def _cell(scores: Scores, choice: Choice, way: str) -> str:
    loss = losses_of(choice).get(way)
    if loss is None:
        return "plain kept" if way in choice.kept_plain else "not done" if way in choice.refused else ""
    mark = ("*" if way == best_way(choice) else " ") if len(ways_of(scores)) > 1 else ""
    return f"{loss.loss:.4f} {loss.loss - scores.uncut.loss:+.4f}{mark}"


def _metrics(scores: Scores) -> Table:
    """For each metric its range, and the layers that matter least by it."""
    made = _table()
    for title in ("metric", "unit", "least", "most", "matter least"):
        made.add_column(title, justify="right" if title in ("least", "most") else "left", overflow="fold")
    for one in scores.importance:
        known = [score for score in one.scores if score is not None]
        ends = [f"{end:.3g}" for end in (min(known), max(known))] if known else ["", ""]
        unit = one.unit if scale_of(one)[0] == "linear" else f"{one.unit}, log"
        made.add_row(printable(one.metric), printable(unit), *ends, ", ".join(map(str, least_important(one, LISTED))))
    return made


def _print_remarks(console: Console, scores: Scores) -> None:
    """Say what a mark means, and what could not be done, each reason once."""
    if best := best_choice(scores):
        which = printable(f"{best.rule}, {best_way(best)}")
        console.print(f"* least: of the ways of a rule, and of all rules ({which})", soft_wrap=True)
    reasons: dict[str, list[str]] = {}
    for metric, why in scores.refused.items():
        reasons.setdefault(why, []).append(metric)
    for choice in scores.choices:
        for word, part in (("", choice.refused), (" kept plain", choice.kept_plain)):
            for method, why in part.items():
                reasons.setdefault(why, []).append(f"{method} for {choice.rule}{word}")
    for why, what in reasons.items():
        console.print(f"{printable(', '.join(what))}: {printable(why)}", soft_wrap=True)


def _table() -> Table:
    from rich import box
    from rich.table import Table

    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _short(title: str) -> str:
    title = printable(title)
    return title if len(title) <= TITLE else title[: TITLE - 1] + "."

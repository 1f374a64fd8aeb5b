"""The scores of layers as one page that needs nothing but itself, with its figure as a PNG and its numbers as scores.json beside it.

Measures nothing. The page holds no script and asks no server for anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from ...surgery.importance.scores import Scores, scores_json
from .drawing import WIDE, save_png
from .layer_scores import draw_scores, scores_name
from .markup import fill_page, plain, section
from .page import REPORT, figure_twice, put_files
from .score_facts import best_choice, best_way, check_finite_scores, cut_command, losses_of, won_back
from .score_sections import choices_table, command_line, commands_list, importance_table, measured_terms, refused_terms, work_table

SCORES = "scores.json"
PICTURE = "scores.png"


def write_scores_report(scores: Scores, folder: Path) -> Path:
    """Write report.html, scores.json and scores.png into a folder, new or not; return the page's path.

    All are made before the first is put in place; other files of the folder are left alone.

    Raises:
        DowncycleError: matplotlib is not installed, a number is not finite, the folder is a file or cannot be written.
    """
    check_finite_scores(scores)
    return put_files(folder, partial(_make, scores), SCORES, [])[0]


def scores_page(scores: Scores) -> str:
    """Return the page as HTML."""
    lead = "".join(f"<p>{plain(line)}</p>\n" for line in summarise_scores(scores))
    best = best_choice(scores)
    command = command_line(cut_command(scores, best, best_way(best))) if best else ""
    return fill_page(f"Layers of {scores_name(scores)}", lead + command, list(_sections(scores)))


def summarise_scores(scores: Scores) -> list[str]:
    """Say in a sentence or two which rule loses least, and what compensation wins back."""
    best, uncut = best_choice(scores), scores.uncut.loss
    if best is None:
        return [f"{scores_name(scores)} has {scores.layers} layers and a held-out loss of {uncut:.4f} nats per token."]
    way, losses = best_way(best), losses_of(best)
    said = (
        f"To keep {scores.keep} of {scores.layers} layers, the rule {best.rule} loses least: "
        f"{losses[way].loss:.4f} nats per token on held-out text, {losses[way].loss - uncut:+.4f} against the whole model's {uncut:.4f}"
    )
    won = won_back(best, way, scores.uncut)
    return [said + (f"; {way} wins back {won:.0%} of what its plain cut costs." if won else ".")]


def _make(scores: Scores, folder: Path) -> list[str]:
    """Write every file into an empty folder; return their names."""
    (folder / REPORT).write_text(scores_page(scores), encoding="utf-8")
    save_png(draw_scores(scores, WIDE), folder / PICTURE)
    (folder / SCORES).write_text(json.dumps(scores_json(scores), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return [REPORT, PICTURE, SCORES]


def _sections(scores: Scores) -> Iterable[str]:
    parts = [
        ("picture", "At a glance", figure_twice("scores", partial(draw_scores, scores))),
        ("choices", "What each rule keeps and loses", choices_table(scores)),
        ("commands", "Commands", commands_list(scores)),
        ("importance", "Importance of each layer", importance_table(scores)),
        ("work", "Work", work_table(scores)),
        ("refused", "Refused, or kept plain", refused_terms(scores)),
        ("method", "How it was measured", measured_terms(scores)),
    ]
    for anchor, heading, text in parts:
        if text:
            yield section(anchor, heading, [text])

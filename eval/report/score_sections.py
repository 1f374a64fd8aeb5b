"""The tables of the page of scores, and how they were measured, as HTML. Every text that comes from outside is escaped."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ...surgery.choose import format_layers
from ...surgery.importance.scores import Choice, Loss, Scores, Work
from ...terminal import printable
from .markup import NONE, html_table, plain, remark, small, term_list
from .numbers import write_share
from .score_facts import (
    asked_block,
    best_choice,
    best_way,
    cut_command,
    kept_words,
    least_important,
    load_words,
    losses_of,
    ways_of,
    won_back,
)


def choices_table(scores: Scores) -> str:
    """A row for each rule: which layers it keeps, and the loss of each way; the rule that loses least stands out."""
    if not scores.choices:
        return ""
    ways = ways_of(scores)
    rows = [("uncut", [_loss(scores.uncut), *([""] * (len(ways) - 1))])]
    for choice in scores.choices:
        rows.append((f"{plain(choice.rule)}{small(kept_words(choice))}", [_way_cell(scores, choice, way) for way in ways]))
    best = best_choice(scores)
    marked = [place for place, choice in enumerate(scores.choices, 1) if choice is best]
    note = (
        "Held-out loss in nats per token ± one standard error. Below it: how much more that is than the whole model’s, "
        "and the share of what the cut costs that is won back. Marked: the rule that loses least in one of its ways."
    )
    return remark(note) + html_table([plain(way) for way in ways], rows, "Rule, layers kept", marked=marked)


def commands_list(scores: Scores) -> str:
    """What to type for each rule's child, in the way of it that loses least."""
    lines = [command_line(cut_command(scores, choice, best_way(choice))) for choice in scores.choices]
    return remark("Each rule in the way of it that loses least.") + "\n".join(lines) if lines else ""


def command_line(words: Sequence[str]) -> str:
    """A command as a paragraph whose lines are broken between options, not in them."""
    parts: list[list[str]] = [[]]
    for word in words:
        parts += [[]] if word.startswith("--") else []
        parts[-1].append(word)
    return "<p><code>" + " ".join(f"<span>{plain(shlex.join(part))}</span>" for part in parts) + "</code></p>"


def importance_table(scores: Scores) -> str:
    """A row for each layer: its score by each metric, and the distance over the block of the asked length that begins at it."""
    columns = [f"{plain(one.metric)}{small(printable(one.unit))}" for one in scores.importance]
    drop = scores.layers - scores.keep
    least = [set(least_important(one, drop)) for one in scores.importance]
    scored = list(zip(scores.importance, least, strict=True))
    rows = [(f"{layer}", [_score(one.scores[layer], layer in low) for one, low in scored]) for layer in range(scores.layers)]
    note = f"In bold: the {drop} that matter least by each metric, with no layer protected." if drop else ""
    if block := asked_block(scores):
        begins = scores.angular[block.length - 1]
        columns.append(f"d(i, {block.length}){small(f'angle / π over the {block.length} layers from here')}")
        for layer, (_, cells) in enumerate(rows):
            cells.append(_score(begins[layer] if layer < len(begins) else None, layer == block.begin))
        note += f" The least of blocks of {block.length} as well; blocks of other lengths are in scores.json."
    return remark(note.strip()) + html_table(columns, rows, "Layer") if columns else ""


def work_table(scores: Scores) -> str:
    """What measuring took, against running the whole model again for every candidate."""
    if not scores.work:
        return ""
    columns = ["Passes over all weights", "Layers read", "Layers run", "Layers read, naively", "Layers run, naively"]
    note = (
        "A layer is run once over the calibration samples, on one path; paths that begin alike share what they share. "
        "Naively: the whole model is run again for every candidate."
    )
    return remark(note) + html_table(columns, [(plain(one.what), _work_cells(one)) for one in scores.work], "To measure")


def refused_terms(scores: Scores) -> str:
    """What this model cannot have, and where plain weights were kept, with why."""
    terms = list(scores.refused.items())
    for choice in scores.choices:
        terms += [(f"{method} for {choice.rule}", f"not done: {why}") for method, why in choice.refused.items()]
        terms += [(f"{method} for {choice.rule}", f"plain weights kept: {why}") for method, why in choice.kept_plain.items()]
    return term_list(terms) if terms else ""


def measured_terms(scores: Scores) -> str:
    """What was measured on what, how and with what, as a list of terms."""
    revision = f" at {scores.revision}" if scores.revision else ""
    model = f"{scores.model}{revision}; {scores.layers} layers; {load_words(scores)}"
    protected = "each rule's own" if scores.protect is None else format_layers(list(scores.protect)).replace(",", ", ") or "none"
    names = {"text": "Text", "text_digest": "SHA-256 of its documents", "digest": "SHA-256 of the tokens"}
    calibration = [(names.get(name, name.replace("_", " ").capitalize()), _written(value)) for name, value in scores.calibration.items()]
    return term_list([
        ("Model", f"{model}; SHA-256 of its content {scores.content[:12]}"),
        ("Protected layers", protected),
        *calibration,
        ("Versions", ", ".join(f"{name} {version}" for name, version in scores.versions.items())),
        ("Machine", scores.machine),
    ])  # fmt: skip


def _way_cell(scores: Scores, choice: Choice, way: str) -> str:
    loss = losses_of(choice).get(way)
    kept = "plain kept" if way in choice.kept_plain else ""
    if loss is None:
        return NONE + small(kept or ("not done" if way in choice.refused else ""))
    won = won_back(choice, way, scores.uncut)
    words = [f"{loss.loss - scores.uncut.loss:+.4f}", f"won back {write_share(won)}" if won is not None else "", kept]
    return _loss(loss) + "".join(map(small, words))


def _loss(loss: Loss) -> str:
    return f"{loss.loss:.4f} ± {loss.stderr:.4f}"


def _score(score: float | None, marked: bool) -> str:
    text = NONE if score is None else f"{score:,.0f}" if 1e4 <= abs(score) < 1e12 else f"{score:.4g}"
    return f"<b>{text}</b>" if marked else text


def _work_cells(one: Work) -> list[str]:
    loads = f"{one.naive_loads:,}" + small(_times(one.naive_loads, one.layer_loads))
    runs = f"{one.naive_forwards:,}" + small(_times(one.naive_forwards, one.layer_forwards))
    return [f"{one.passes:,}", f"{one.layer_loads:,}", f"{one.layer_forwards:,}", loads, runs]


def _times(naive: int, counted: int) -> str:
    return f"{naive / counted:.3g} times as many" if counted and naive != counted else ""


def _written(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return "" if value is None else str(value)

"""What happened, in sentences: for each model what is left of the first one, in layers, parameters, scores and perplexity."""

from __future__ import annotations

from ...surgery.choose import format_layers
from ..results import ModelResult, Results
from .compare import ScoreRow, averages, labels, recovered, score_rows, text_rows
from .numbers import join_words, write_count, write_figure, write_score, write_share

LISTED = 24  # signs of a list of layers; a longer one is left to the picture


def title_of(results: Results) -> str:
    """Name what is compared."""
    names = labels(results)
    return join_words(names if len(names) < 4 else [names[0], f"{len(names) - 1} others"])


def summarise(results: Results) -> list[str]:
    """Return a sentence or two for each model but the first, or for the only one."""
    if len(results.models) == 1:
        return [_alone(results)]
    return [_compared(results, index) for index in range(1, len(results.models))]


def kept_words(model: ModelResult) -> str:
    """Say how many of the first parent's layers a model has, and which where that is short: 24 of 32 (0-23)."""
    if model.kept is None or model.depth is None:
        return f"{model.layers}"
    repeated = f", {model.layers} in all" if len(set(model.kept)) < len(model.kept) else ""
    which = format_layers(list(model.kept))
    return f"{len(set(model.kept))} of {model.depth}{repeated}" + (f" ({which})" if len(which) <= LISTED else "")


def _alone(results: Results) -> str:
    model = results.baseline
    facts = [f"{labels(results)[0]} has {model.layers} layers and {write_count(model.parameters)} parameters"]
    facts += [
        f"an average score of {write_score(row.values[0], True)} of 100{_part_words(row, ' ({})')}"
        for row in averages(results)[:1]
        if row.values[0] is not None
    ]
    facts += [f"a perplexity of {write_figure(one.perplexity)} on {one.text}" for one in model.perplexity[:1]]
    return f"{join_words(facts)}."


def _compared(results: Results, index: int) -> str:
    names, model, first = labels(results), results.models[index], results.baseline
    share = write_share(model.parameters / first.parameters) if first.parameters else ""
    if model.kept is not None and model.depth is not None:
        again = f", {model.layers} in all with those that it repeats" if len(set(model.kept)) < len(model.kept) else ""
        begin = f"{names[index]} keeps {len(set(model.kept))} of {model.depth} layers{again} ({share} of the parameters of {names[0]})"
    else:
        begin = f"{names[index]} has {model.layers} layers ({share} of the parameters of {names[0]})"
    text = begin + _score_words(results, index)
    for row in text_rows(results)[:1]:
        ours, theirs = row.models[index], row.models[0]
        if ours and theirs:
            what = "perplexity" if row.comparable else "bits per byte"
            before, after = (one.perplexity if row.comparable else one.bits_per_byte for one in (theirs, ours))
            text += f"; {what} on {row.text}: {write_figure(before)} → {write_figure(after)}"
    won = recovered(results, index)
    return text + (f". Healing won back {write_share(won)} of the loss that the cut added." if won is not None else ".")


def _score_words(results: Results, index: int) -> str:
    """The average of the first suite, or a benchmark that was run alone."""
    for row in averages(results) or score_rows(results)[:1]:
        if (share := row.retained(index)) is not None:
            average = f"average score ({row.group}{_part_words(row, ', {}')})"
            what = average if row.tasks > 1 else f"result on {row.title}{_part_words(row, ' ({})')}"
            return f" and {write_share(share)} of its {what}"
    return ""


def _part_words(row: ScoreRow, form: str) -> str:
    """How many examples were used of each benchmark, where these may not be all."""
    return form.format(f"{row.part} example{'' if row.limit == 1 else 's'}") if row.part else ""

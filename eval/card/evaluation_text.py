"""The section of a card that shows what was measured: this model beside those that it was measured with, and how.

Writes Markdown from results; compares by eval/report's rules, so that card, report and terminal say the same.
"""

from __future__ import annotations

from ...terminal import format_bytes
from ..report.compare import ScoreRow, TextRow, labels, recovered, score_rows, text_rows
from ..report.numbers import write_chance, write_count, write_figure, write_share, write_spread
from ..results import Results
from .facts import Facts
from .metadata import plain_name
from .wording import paragraphs, plain, table

BARS_PICTURE = "figures/benchmarks.png"
PACKAGES = {"torch": "torch", "transformers": "transformers", "lm_eval": "lm-evaluation-harness", "bitsandbytes": "bitsandbytes"}


def evaluation(facts: Facts) -> str:
    """Show scores with standard errors and the share of the first model's that is left, perplexity, size and speed, and how it was done."""
    results = facts.results
    if results is None or facts.measured is None:
        return ""
    names = [plain(plain_name(name)) for name in labels(results)]
    scores, texts = score_rows(results), text_rows(results)
    picture = f"![Benchmark scores of the models]({BARS_PICTURE})" if BARS_PICTURE in facts.files and scores else ""
    parts = [
        table(["Benchmark", "Metric", *names], [_score(row) for row in scores]) if scores else "",
        f"In brackets: the share of the score of {names[0]} that is left." if scores and len(names) > 1 else "",
        picture,
        table(["Text", "", *names], [cells for row in texts for cells in _text(row)]) if texts else "",
        _recovered(facts),
        table(["Size and speed", *names], _sizes(results)),
        _how(results),
    ]
    return paragraphs(["## Evaluation", *parts])


def _score(row: ScoreRow) -> list[str]:
    shots = f" ({row.shots}-shot)" if row.shots is not None else ""
    title = f"**{plain(row.title)}**" if row.tasks > 1 else plain(row.title) + shots
    chance = f"chance {write_chance(row.chance, row.percent)}" if row.chance else ""
    metric = filter(None, [plain(row.metric), row.part, chance])
    return [title, ", ".join(metric), *(_cell(row, place) for place in range(len(row.values)))]


def _cell(row: ScoreRow, place: int) -> str:
    value = row.values[place]
    if value is None:
        return ""
    share = row.retained(place) if place else None
    return write_spread(value, row.stderrs[place], row.percent) + (f" ({write_share(share)})" if share is not None else "")


def _text(row: TextRow) -> list[list[str]]:
    """A line for perplexity, where all models read the text as the same tokens, one for the loss, and one for bits per byte."""
    name = plain(plain_name(row.text))
    lines = []
    if row.comparable:
        lines.append([name, "perplexity", *(write_figure(one.perplexity) if one else "" for one in row.models)])
        lines.append(["", "loss, nats per token", *(f"{one.loss:.4f} ± {one.stderr:.4f}" if one else "" for one in row.models)])
    lines.append(["" if lines else name, "bits per byte", *(f"{one.bits_per_byte:.4f}" if one else "" for one in row.models)])
    return lines


def _recovered(facts: Facts) -> str:
    assert facts.results and facts.measured
    share = recovered(facts.results, facts.results.models.index(facts.measured))
    return "" if share is None else f"Healing won back {write_share(share)} of the loss that the cut had added."


def _sizes(results: Results) -> list[list[str]]:
    models = results.models
    rows = [
        ["layers", *(f"{one.layers}" for one in models)],
        ["parameters", *(write_count(one.parameters) for one in models)],
        ["bytes of weights", *(format_bytes(one.nbytes) for one in models)],
    ]
    if any(one.speed for one in models):
        rows += [
            ["prefill, tokens per second", *(write_figure(one.speed.prefill_rate) if one.speed else "" for one in models)],
            ["decode, tokens per second", *(write_figure(one.speed.decode_rate) if one.speed else "" for one in models)],
            ["peak memory", *(format_bytes(one.speed.peak_bytes) if one.speed else "" for one in models)],
        ]
    return rows


def _how(results: Results) -> str:
    """Say how and where it was measured."""
    loads = list(dict.fromkeys((one.load, one.device) for one in results.models))
    loaded = " and ".join(f"{load} on {device}" for load, device in loads if load)
    lines = [f"Measured by `downcycle eval`{f' in {loaded}' if loaded else ''}{f' ({plain(results.machine)})' if results.machine else ''}."]
    if any(one.scores for one in results.models):
        lines.append("± is one standard error.")
    for row in text_rows(results):
        first = next(one for one in row.models if one)
        lines.append(
            f"{plain(plain_name(row.text))}: {first.tokens:,} tokens in windows of {row.length:,} with a stride of {row.stride:,}, "
            "each token scored once."
        )
    speeds = [one.speed for one in results.models if one.speed]
    if speeds:
        lines.append(
            f"Speed: one sequence, {speeds[0].prompt:,} tokens of prompt and {speeds[0].generated:,} generated, "
            f"median of {speeds[0].runs} runs."
        )
    used = [f"{PACKAGES[name]} {release}" for name, release in results.versions.items() if name in PACKAGES]
    return " ".join([*lines, *([f"With {', '.join(used)}."] if used else [])])

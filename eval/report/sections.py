"""The tables of the page, and how things were measured, as HTML. Every text that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from ...terminal import format_bytes
from ..results import ModelResult, Perplexity, Results
from .compare import ScoreRow, averages, finite_losses, labels, score_rows, text_rows
from .drawing import colour_of
from .loss_curve import ROWS, loss_rows
from .markup import NONE, html_table, plain, remark, small, term_list
from .numbers import join_words, write_chance, write_count, write_figure, write_share, write_spread
from .summary import kept_words


def summary_table(results: Results) -> str:
    """The models side by side: what they are and what they reach."""
    models, first = results.models, results.baseline
    rows: list[tuple[str, list[str]]] = [
        ("Made as", [plain(model.role) for model in models]),
        ("Layers", [escape(kept_words(model)) for model in models]),
        (
            "Parameters",
            [_with_share(write_count(model.parameters), model.parameters, first.parameters, i) for i, model in enumerate(models)],
        ),
        ("Size of the tensors", [_with_share(format_bytes(model.nbytes), model.nbytes, first.nbytes, i) for i, model in enumerate(models)]),
        ("Measured in", [plain(f"{model.load} on {model.device}") for model in models]),
    ]
    rows += [(f"Average score{small(', '.join(filter(None, [row.group, row.part])))}", _score_cells(row)) for row in averages(results)]
    for row in text_rows(results):
        rows.append((f"Perplexity{small(row.text)}", [write_figure(one.perplexity) if one else NONE for one in row.models]))
        rows.append((f"Bits per byte{small(row.text)}", [_bits(one) if one else NONE for one in row.models]))
    return html_table(_names(results), rows, words=("Layers", "Made as", "Measured in"))


def benchmarks_table(results: Results) -> str:
    """A row for each benchmark: scores with standard errors, and the share of the first model's that is left."""
    rows = score_rows(results)
    if not rows:
        return ""
    cells = [(f"{escape(row.title)}{small(_row_words(row))}", _score_cells(row)) for row in rows]
    note = "Scores ± one standard error; of 100, where nothing else is said."
    if len(results.models) > 1:
        note += f" Below a score: the share of {labels(results)[0]}’s that is left."
    if any(row.tasks > 1 for row in rows):
        note += " An average is over the benchmarks of a suite, its error that of independent ones, its share that of the averages."
    return remark(note) + html_table(_names(results), cells, marked=[i for i, row in enumerate(rows) if row.tasks > 1])


def perplexity_tables(results: Results) -> str:
    """A table for each text: loss, perplexity, bits per byte, and how much was scored."""
    parts = []
    columns = ["Model", "Loss <small>nats per token</small>", "Perplexity", "Bits per byte", "Tokens scored"]
    for row in text_rows(results):
        lines = []
        for name, one in zip(_names(results), row.models, strict=True):
            if one:
                loss = f"{one.loss:.4f}{small(f'± {one.stderr:.4f}')}"
                lines.append((name, [loss, write_figure(one.perplexity), _bits(one), f"{one.tokens:,}"]))
        note = "" if row.comparable else remark("Their tokenizers differ: compare bits per byte, and not perplexities.")
        parts.append(f"<h3>{escape(row.text)}</h3>\n{note}{html_table(columns[1:], lines, columns[0])}")
    return "\n".join(parts)


def loss_tables(results: Results) -> str:
    """For each model that was trained, its losses by epoch and step."""
    parts = []
    for name, model in zip(_names(results), results.models, strict=True):
        if rows := loss_rows(model.training):
            cells = [(f"{row.epoch:.2f}", [f"{row.step:,}", _loss(row.loss), _loss(row.eval_loss)]) for row in rows]
            note = remark(f"{ROWS} of the logged steps, evenly spaced.") if len(rows) == ROWS else ""
            wanted = [i for i in range(3) if any(line[1][i] != NONE for line in cells)]
            heads = ["Step", "Training loss", "Held-out loss"]
            table = html_table([heads[i] for i in wanted], [(first, [line[i] for i in wanted]) for first, line in cells], "Epoch")
            parts.append(f"<h3>{name}</h3>\n{note}{table}")
        if lost := [entry.step for entry in model.training if finite_losses(entry) != entry]:
            parts.append(remark(f"The loss that was logged at {_steps(lost)} is no finite number; it is left out."))
    return "\n".join(parts)


def speed_table(results: Results) -> str:
    """Memory and rates of each model; empty where no speed was measured."""
    speeds, first = [model.speed for model in results.models], results.baseline.speed
    if not any(speeds):
        return ""
    rows = []
    facts = [
        ("Peak memory", "peak_bytes", format_bytes),
        ("Prefill", "prefill_rate", write_figure),
        ("Decoding", "decode_rate", write_figure),
    ]
    for title, field, write in facts:
        values = [getattr(speed, field) if speed else None for speed in speeds]
        base = getattr(first, field) if first else None
        cells = [NONE if value is None else _with_share(write(value), value, base, i) for i, value in enumerate(values)]
        rows.append((title + ("" if field == "peak_bytes" else small("tokens per second")), cells))
    return html_table(_names(results), rows)


def measured_how(results: Results) -> str:
    """What was measured on what, how and with what, as a list of terms."""
    terms: list[tuple[str, str]] = []
    for row in text_rows(results):
        one = next(one for one in row.models if one)
        terms.append(("Text", f"{_text_words(one)}; windows of {row.length:,} tokens, {row.stride:,} from one to the next"))
    if rows := [row for row in score_rows(results) if row.tasks == 1]:
        terms.append(("Benchmarks", "; ".join(f"{row.title}: {_row_words(row)}, version {row.version}" for row in rows)))
    for speed in dict.fromkeys((one.prompt, one.generated, one.runs) for one in (model.speed for model in results.models) if one):
        prompt, generated, runs = speed
        said = f"a prompt of {prompt:,} tokens, {generated:,} decoded after it, one sequence; the median of {_count(runs, 'run')}"
        terms.append(("Speed", f"{said}; memory above what the process held before loading"))
    terms += [(f"Model {i}", _model_words(model)) for i, model in enumerate(results.models, 1)]
    terms.append(("Versions", ", ".join(f"{name} {version}" for name, version in results.versions.items())))
    terms += [("Machine", results.machine), ("Measured", results.created)]
    return term_list(terms)


def _names(results: Results) -> list[str]:
    """The models' names behind their colours."""
    keys = (f'<span class="key" style="background:{colour_of(i)}"></span>' for i in range(len(results.models)))
    return [f'{key}<span class="name">{escape(name)}</span>' for key, name in zip(keys, labels(results), strict=True)]


def _score_cells(row: ScoreRow) -> list[str]:
    cells = []
    for index, (value, stderr) in enumerate(zip(row.values, row.stderrs, strict=True)):
        share = write_share(row.retained(index)) if index else ""
        cells.append(NONE if value is None else write_spread(value, stderr, row.percent) + small(share))
    return cells


def _row_words(row: ScoreRow) -> str:
    """Under which conditions a benchmark was run."""
    if row.tasks > 1:
        return ", ".join(filter(None, [row.group, f"{row.tasks} benchmarks", row.part]))
    words = [row.metric, "" if row.shots is None else _count(row.shots, "shot"), f"{row.examples:,} examples"]
    words += [row.part]
    words += [] if row.higher_is_better else ["lower is better"]
    words += [f"chance {write_chance(row.chance, row.percent)}"] if row.chance else []
    return ", ".join(filter(None, words))


def _text_words(one: Perplexity) -> str:
    return f"{one.text} ({_count(one.documents, 'document')}, {one.bytes:,} bytes scored, SHA-256 {one.digest[:12]})"


def _model_words(model: ModelResult) -> str:
    revision = f" at {model.revision}" if model.revision else ""
    return f"{model.name}{revision}; loaded in {model.load} on {model.device}; SHA-256 of its content {model.content[:12]}"


def _with_share(text: str, value: float, first: float | None, index: int) -> str:
    return text + (small(write_share(value / first)) if index and first else "")


def _steps(steps: Sequence[int]) -> str:
    shown = [f"{step:,}" for step in steps[:10]] + ([f"{len(steps) - 10:,} more"] if len(steps) > 10 else [])
    return f"step{'s' if len(steps) > 1 else ''} {join_words(shown)}"


def _count(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def _bits(one: Perplexity) -> str:
    return f"{one.bits_per_byte:.4f}"


def _loss(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"

"""Results laid side by side: one row for each benchmark or text, one entry for each model, and what follows from them in words.

Draws nothing and formats no page; needs neither torch nor matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import TypeVar

from ...surgery.errors import DowncycleError
from ...terminal import printable
from ..origin import CUT_ONLY, HEALED, PARENT, TERNARY, UNKNOWN
from ..results import Logged, ModelResult, Perplexity, Results, Score, Speed, retained

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class ScoreRow:
    """One benchmark, for each model in order; None where a model was not measured so.

    percent: all values are 0-1 and higher is better. tasks: how many it averages; 1 for a benchmark itself.
    """

    title: str
    metric: str
    group: str
    shots: int | None
    examples: int
    limit: int | None
    version: str
    higher_is_better: bool
    chance: float | None
    percent: bool
    values: tuple[float | None, ...]
    stderrs: tuple[float | None, ...]
    tasks: int = 1

    @property
    def part(self) -> str:
        """How much of each benchmark was used, where that may not be all: first 100."""
        return f"first {self.limit:,}" if self.limit is not None and self.limit <= self.examples else ""

    def retained(self, index: int) -> float | None:
        """Return the share of the first model's score that a model has; None for what was not measured or is negative."""
        first, value = self.values[0], self.values[index]
        if first is None or value is None or min(first, value) < 0:  # a ratio to less than nothing says nothing
            return None
        return retained(value, first, self.higher_is_better)


@dataclass(frozen=True)
class TextRow:
    """One text, read in windows of one length and stride, for each model in order; None where a model was not measured on it.

    comparable: all read it as the same tokens, so that their perplexities can be compared; else only bits per byte can.
    """

    text: str
    length: int
    stride: int
    comparable: bool
    models: tuple[Perplexity | None, ...]


def check_finite(results: Results) -> Results:
    """Return results that hold numbers only: losses that a trainer logged as no number become None.

    Raises:
        DowncycleError: something that was measured is no finite number.
    """
    for model in results.models:
        parts: dict[str, Perplexity | Score | Speed] = {f"perplexity on {one.text}": one for one in model.perplexity}
        parts |= {f"{one.title} ({one.metric})": one for one in model.scores}
        parts |= {"speed": model.speed} if model.speed else {}
        for what, part in parts.items():
            for name, value in asdict(part).items():
                if isinstance(value, float) and not math.isfinite(value):
                    raise DowncycleError(f"{model.name}: {what}: {name} is {value}, no finite number; measure this model again")
    models = (replace(model, training=tuple(map(finite_losses, model.training))) for model in results.models)
    return replace(results, models=tuple(models))


def finite_losses(entry: Logged) -> Logged:
    """Return an entry of a log without the losses that are no finite number."""
    loss, eval_loss = (value if value is not None and math.isfinite(value) else None for value in (entry.loss, entry.eval_loss))
    return replace(entry, loss=loss, eval_loss=eval_loss)


def labels(results: Results) -> list[str]:
    """Return a short name for each model, no two alike: its last part, or more where that does not tell them apart."""
    ways: list[Callable[[ModelResult], str]] = [
        lambda model: PurePath(model.name).name or model.name,
        lambda model: model.name,
        lambda model: f"{model.name} ({model.load})",
        lambda model: f"{model.name} ({model.load}, {model.content[:8]})",
    ]
    names: list[str] = []
    for way in ways:
        names = [printable(way(model)) for model in results.models]
        if len(set(names)) == len(names):
            return names
    return [f"{name} #{place}" for place, name in enumerate(names, 1)]


def score_rows(results: Results) -> list[ScoreRow]:
    """Return a row for each benchmark as it was run (shots, limit and version alike), and behind a suite's rows their average."""
    scores = [{_identity(score): score for score in model.scores} for model in results.models]
    rows = [_score_row([one.get(identity) for one in scores]) for identity in _in_order(scores)]
    ordered: list[ScoreRow] = []
    for group in dict.fromkeys(row.group for row in rows):
        suite = [row for row in rows if row.group == group]
        ordered += suite + _average(group, suite)
    return ordered


def averages(results: Results) -> list[ScoreRow]:
    """Return the averages among the rows."""
    return [row for row in score_rows(results) if row.tasks > 1]


def text_rows(results: Results) -> list[TextRow]:
    """Return a row for each text and way of reading it."""
    found = [{(one.digest, one.length, one.stride): one for one in model.perplexity} for model in results.models]
    rows = []
    for key in _in_order(found):
        models = tuple(one.get(key) for one in found)
        known = [one for one in models if one]
        alike = len({(one.tokens, one.bytes) for one in known}) == 1
        rows.append(TextRow(printable(known[0].text), known[0].length, known[0].stride, alike, models))
    return rows


def recovered(results: Results, index: int) -> float | None:
    """Return the share of the loss which a cut added that healing took away again; None where not all three were measured."""
    healed, parent = results.models[index], results.baseline
    cut = next((i for i, model in enumerate(results.models) if model.role == CUT_ONLY and model.kept == healed.kept), None)
    if healed.role != HEALED or healed.kept is None or cut is None or parent.role != PARENT:
        return None
    for row in text_rows(results):
        whole, less, more = row.models[0], row.models[cut], row.models[index]
        if row.comparable and whole and less and more:
            return (less.loss - more.loss) / (less.loss - whole.loss) if less.loss > whole.loss else None
    return None


def likely_parent(results: Results) -> int | None:
    """Return which model has as many layers as the one that the first was cut from, and was not made here; None where none has."""
    first = results.baseline
    if first.role not in (CUT_ONLY, HEALED, TERNARY) or first.depth is None:
        return None
    found = (i for i, model in enumerate(results.models) if model.role in (PARENT, UNKNOWN) and model.layers == first.depth)
    return next(found, None)


def _identity(score: Score) -> tuple[Hashable, ...]:
    return score.group, score.task, score.metric, score.shots, score.limit, score.version, score.higher_is_better


def _in_order(found: Iterable[Mapping[Key, object]]) -> list[Key]:
    """Every key once, in the order in which the models have them."""
    return list(dict.fromkeys(key for one in found for key in one))


def _score_row(scores: list[Score | None]) -> ScoreRow:
    known = [score for score in scores if score]
    first = known[0]
    return ScoreRow(
        title=printable(first.title),
        metric=printable(first.metric),
        group=printable(first.group),
        shots=first.shots,
        examples=first.examples,
        limit=first.limit,
        version=first.version,
        higher_is_better=first.higher_is_better,
        chance=first.chance,
        percent=first.higher_is_better and all(0 <= score.value <= 1 for score in known),
        values=tuple(score.value if score else None for score in scores),
        stderrs=tuple(score.stderr if score else None for score in scores),
    )


def _average(group: str, suite: list[ScoreRow]) -> list[ScoreRow]:
    """The mean over a suite's benchmarks, one metric of each, for the models that have them all; errors as of independent benchmarks."""
    rows = list({row.title: row for row in reversed(suite) if row.percent}.values())[::-1]
    if len(rows) < 2 or not group:
        return []
    values = tuple(_mean([row.values[i] for row in rows]) for i in range(len(rows[0].values)))
    errors = tuple(_mean([row.stderrs[i] for row in rows], squares=True) for i in range(len(values)))
    if not any(value is not None for value in values):
        return []
    return [
        ScoreRow(
            title="Average",
            metric=f"of {len(rows)}",
            group=group,
            shots=None,
            examples=sum(row.examples for row in rows),
            limit=next((row.limit for row in rows if row.part), None),
            version="",
            higher_is_better=True,
            chance=_mean([row.chance for row in rows]),
            percent=True,
            values=values,
            stderrs=tuple(error if value is not None else None for value, error in zip(values, errors, strict=True)),
            tasks=len(rows),
        )
    ]


def _mean(values: list[float | None], squares: bool = False) -> float | None:
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return None
    return math.sqrt(math.fsum(value * value for value in known)) / len(known) if squares else math.fsum(known) / len(known)

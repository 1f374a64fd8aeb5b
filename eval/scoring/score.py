"""Score a model's layers by every metric, choose by every rule, and measure what each choice loses. Knows no picture and no command."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...surgery.choose import RULES as WITHOUT_DATA
from ...surgery.choose import format_layers
from ...surgery.compensation.fold import METHODS
from ...surgery.errors import DowncycleError, UnsuitableError
from ...surgery.importance.paths import WHOLE, Dropped
from ...surgery.importance.rules import RULES, protected_layers
from ...surgery.importance.scores import Choice, Importance, Loss, Scores, Work
from ...surgery.importance.search import can_drop, count_naive, count_work, leave_one_out
from ...surgery.layers import keep_layers
from ..machine import machine_words, release_of
from .choose import choose_layers
from .compensated import Outcome, compensated
from .measure import ALONE, HIDDEN, TAYLOR, alone, held_out_losses, measure, search
from .study import Study

PACKAGES = ("downcycle", "torch", "transformers", "bitsandbytes")


def score(study: Study, keep: int, protect: Sequence[int] | None = None, methods: Sequence[str] = METHODS) -> Scores:
    """Measure everything that can be measured of a model's layers.

    Args:
        keep: how many layers each rule keeps. protect: layers that must stay. methods: of compensation, each tried on each choice that
            drops a layer.
    Raises:
        DowncycleError: too few or too many layers to keep, `protect` cannot be kept, or what keeps the model from being measured at all.
    """
    depth = study.checkpoint.num_layers
    protected_layers("bi", depth, keep, protect)  # what no rule can keep is refused before anything is measured
    refused: dict[str, str] = {}
    found = _measure(study, refused)
    kept = _choices(study, keep, protect, refused)
    paths = {rule: frozenset(range(depth)) - frozenset(layers) for rule, layers in kept.items()}
    losses = held_out_losses(study, [WHOLE, *paths.values()])
    outcomes = {path: [(method, compensated(study, path, method)) for method in methods if path] for path in set(paths.values())}
    choices = [_choice(rule, layers, losses[paths[rule]], outcomes[paths[rule]]) for rule, layers in kept.items()]
    return Scores(
        model=study.checkpoint.name,
        revision=study.checkpoint.revision,
        content=study.content,
        layers=depth,
        keep=keep,
        protect=None if protect is None else tuple(protect),
        load=study.load,
        device=study.device,
        calibration=study.calibration.facts(),
        uncut=losses[WHOLE],
        importance=tuple(_importance(depth, found)),
        angular=tuple(tuple(row) for row in found[HIDDEN]["angular"]),
        choices=tuple(sorted(choices, key=lambda choice: choice.cut.loss)),
        work=tuple(_work(study, keep, protect, refused)),
        refused=refused,
        machine=machine_words(),
        versions={name: release for name in PACKAGES if (release := release_of(name))},
    )


def _measure(study: Study, refused: dict[str, str]) -> dict[str, Any]:
    """Measure all metrics; of those that this model cannot have, say why."""
    try:
        return measure(study, HIDDEN, ALONE, TAYLOR)
    except UnsuitableError as error:
        refused["taylor"] = str(error)
        return measure(study, HIDDEN, ALONE)


def _choices(study: Study, keep: int, protect: Sequence[int] | None, refused: dict[str, str]) -> dict[str, list[int]]:
    kept = {}
    for rule in (*RULES, *WITHOUT_DATA):
        if rule not in refused:
            try:
                layers = choose_layers(study, rule, keep, protect)
                if gone := sorted(set(protect or ()) - set(layers)):  # a rule without data knows of no protection
                    raise DowncycleError(f"drops {format_layers(gone)}, which must stay")
                keep_layers(study.checkpoint, layers)  # refuses what the family's config cannot say
                kept[rule] = layers
            except DowncycleError as error:
                refused[rule] = str(error)
    return kept


def _choice(rule: str, kept: list[int], cut: Loss, outcomes: Sequence[tuple[str, Outcome]]) -> Choice:
    return Choice(
        rule,
        tuple(kept),
        cut,
        compensated={method: found.loss for method, found in outcomes if found.loss and not found.worse_than(cut)},
        kept_plain={method: why for method, found in outcomes if (why := found.worse_than(cut))},
        refused={method: found.refused for method, found in outcomes if found.refused},
    )


def _importance(depth: int, found: dict[str, Any]) -> Iterator[Importance]:
    """Give each metric's score of each layer alone."""
    without = leave_one_out(depth, found[ALONE])
    scores = {"bi": found[HIDDEN]["bi"], "angular": found[HIDDEN]["angular"][0], "ppl": without, "magnitude": found[HIDDEN]["magnitude"]}
    if TAYLOR in found:
        scores["taylor"] = found[TAYLOR]
    for rule in (rule for rule in RULES if rule in scores):
        yield Importance(RULES[rule].metric, RULES[rule].unit, tuple(scores[rule]))


def _work(study: Study, keep: int, protect: Sequence[int] | None, refused: dict[str, str]) -> Iterator[Work]:
    """Count the work of the searches, each layer run of a path once; and that of running the whole model for each candidate."""
    depth = study.checkpoint.num_layers
    yield _work_of("leave one out", depth, [alone(study)])
    if "ppl" not in refused:
        protected = protected_layers("ppl", depth, keep, protect)
        gone = [one.layer for one in search(study, depth - keep, protected)]
        rounds = []
        for number in range(len(gone)):
            before = frozenset(gone[:number])
            able = can_drop(study.checkpoint, before, [layer for layer in range(depth) if layer not in before | set(protected)])
            rounds.append([before | {layer} for layer in able])
        yield _work_of("greedy search", depth, rounds)


def _work_of(what: str, depth: int, rounds: Sequence[Sequence[Dropped]]) -> Work:
    counted = [count_work(depth, paths) for paths in rounds]
    naive = sum(count_naive(depth, paths) for paths in rounds)
    return Work(what, len(rounds), sum(loads for loads, _ in counted), sum(runs for _, runs in counted), naive, naive)

"""What a rule needs of a model's layers: hidden states, losses without layers, gradients, losses of cuts.

Each function recalls what is known, and runs layers only for what is not.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple
from typing import Any

from ...surgery.choose import format_layers, parse_layers
from ...surgery.errors import UnsuitableError
from ...surgery.importance.gradients import taylor_scores
from ...surgery.importance.observers import ChannelMagnitudes, Influences, LastTokens, Magnitudes
from ...surgery.importance.paths import WHOLE, Dropped, SampleLoss, run_paths
from ...surgery.importance.scores import Loss
from ...surgery.importance.search import Drop, can_drop, greedy, mean_loss
from ...surgery.importance.states import States
from ..measure.perplexity import clustered_error
from .study import Study

HIDDEN, ALONE, TAYLOR = "hidden states", "leave one out", "taylor"
FIT, HELD_OUT, SEARCH, REFUSED = "losses", "held-out losses", "search", "refused"


def measure(study: Study, *wanted: str) -> dict[str, Any]:
    """Return what is wanted of HIDDEN, ALONE and TAYLOR; what is missing is measured in as few passes over the weights as can be.

    HIDDEN: a mapping with `bi` and `magnitude`, a score per layer, `angular`, the triangle, and `ratios`, by how much hidden states grow
    between any two depths. ALONE: losses by path, of the whole model and of it without each layer. TAYLOR: a score per layer.

    Raises:
        UnsuitableError: a model without gradients, where TAYLOR is wanted; all else is measured and kept by then.
        DowncycleError: what cannot be measured of this model.
    """
    known = {what: found for what in (HIDDEN, TAYLOR) if what in wanted and (found := study.recall(what)) is not None}
    if ALONE in wanted:
        paths = alone(study)
        losses = {path: loss for path, loss in _recall_losses(study, FIT).items() if path in paths}
        known |= {ALONE: losses} if len(losses) == len(paths) else {}
    missing = set(wanted) - known.keys()
    if TAYLOR in missing and (why := study.recall(TAYLOR, REFUSED)):
        raise UnsuitableError(why)
    return (_forward(study, wanted, missing) if missing else {}) | known


def alone(study: Study) -> list[Dropped]:
    """Return the paths of the whole model, and of it without each layer that it can do without."""
    return [WHOLE, *(frozenset({layer}) for layer in can_drop(study.checkpoint, WHOLE, range(study.checkpoint.num_layers)))]


def _forward(study: Study, wanted: Sequence[str], missing: set[str]) -> dict[str, Any]:
    """Run the whole model once, and it without each layer where that is missing; then go back, where gradients are.

    States lie under what is wanted: what is missing becomes less on the way, and a killed run must find them again.
    """
    parts = study.parts
    bi, last, magnitudes = Influences(parts.depth), LastTokens(parts.depth), Magnitudes(parts.depth)
    channels = ChannelMagnitudes(parts.depth)
    states = study.states("forward", sorted(wanted))
    found = run_paths(
        parts,
        study.fit,
        alone(study) if ALONE in missing else [WHOLE],
        states,
        observers=(bi, last, magnitudes, channels),
        keep_states=TAYLOR in missing,
        what="scoring the layers",
        progress=study.progress,
    )
    hidden = {"bi": bi.scores(), "angular": last.triangle(), "magnitude": magnitudes.scores, "ratios": channels.ratios()}
    known = {HIDDEN: study.keep(hidden, HIDDEN), ALONE: {path: mean_loss(losses) for path, losses in found.items()}}
    _keep_losses(study, FIT, known[ALONE])
    if TAYLOR in missing:
        known[TAYLOR] = _backward(study, states)
    states.clear()
    return known


def _backward(study: Study, states: States) -> list[float]:
    """Measure TAYLOR from the whole model's states; where it cannot be had, remember that, as they are gone then."""
    gradients = study.states("gradients")
    try:
        found = study.keep(taylor_scores(study.parts, study.fit, states, gradients, study.progress), TAYLOR)
    except UnsuitableError as error:
        study.keep(str(error), TAYLOR, REFUSED)
        states.clear()
        gradients.clear()
        raise
    gradients.clear()
    return found


def search(study: Study, drop: int, protected: Sequence[int]) -> list[Drop]:
    """Return the layers that a greedy search drops, in its order (see `search.greedy`)."""
    place = (SEARCH, sorted(protected))
    found = [Drop(**one) for one in study.recall(*place) or []]
    if len(found) < drop:
        found = greedy(study.checkpoint, drop, protected, lambda paths, what: fit_losses(study, paths, what), found)
        study.keep([asdict(one) for one in found], *place)
    return found[:drop]


def fit_losses(study: Study, paths: Sequence[Dropped], what: str) -> dict[Dropped, float]:
    """Return the losses of paths on the samples to fit on, in nats per token."""
    known = _recall_losses(study, FIT)
    if missing := [path for path in paths if path not in known]:
        known |= {path: mean_loss(found) for path, found in run(study, missing, what, held_out=False).items()}
        _keep_losses(study, FIT, known)
    return {path: known[path] for path in paths}


def held_out_losses(study: Study, paths: Iterable[Dropped]) -> dict[Dropped, Loss]:
    """Return the losses of paths on the held-out samples."""
    wanted = sorted({WHOLE, *paths}, key=sorted)
    known = {_path(text): [SampleLoss(*one) for one in samples] for text, samples in (study.recall(HELD_OUT) or {}).items()}
    if missing := [path for path in wanted if path not in known]:
        known |= run(study, missing, "measuring the cuts")
        study.keep({_text(path): [astuple(one) for one in samples] for path, samples in known.items()}, HELD_OUT)
    return {path: to_loss(known[path], known[WHOLE]) for path in wanted}


def held_out_loss(study: Study, path: Dropped, fitted: Study) -> Loss:
    """Return the loss of a path on the held-out samples with other weights. fitted: the study of a model that has them."""
    held_out_losses(study, [WHOLE])
    whole = [SampleLoss(*one) for one in study.recall(HELD_OUT)[_text(WHOLE)]]
    return to_loss(run(fitted, [path], "measuring what was fitted")[path], whole)


def run(study: Study, paths: Sequence[Dropped], what: str, held_out: bool = True) -> dict[Dropped, list[SampleLoss]]:
    """Take the held-out samples, or those to fit on, through paths of the model."""
    states = study.states("paths", study.content, [_text(path) for path in paths], held_out)
    batches = study.held_out if held_out else study.fit
    found = run_paths(study.parts, batches, paths, states, what=what, progress=study.progress)
    states.clear()
    return found


def to_loss(samples: Sequence[SampleLoss], whole: Sequence[SampleLoss]) -> Loss:
    """Return the mean loss per token, and its standard errors, clustered by document, or by sample where there is one document only.

    Args:
        whole: the losses of the uncut model on the same samples.
    """
    several = len({one.document for one in samples}) > 1
    nats, more, tokens = defaultdict[int, float](float), defaultdict[int, float](float), Counter[int]()
    for number, (one, uncut) in enumerate(zip(samples, whole, strict=True)):
        cluster = one.document if several else number
        nats[cluster] += one.nats
        more[cluster] += one.nats - uncut.nats
        tokens[cluster] += one.tokens
    counts = list(tokens.values())
    mean, added = (math.fsum(sums.values()) / sum(counts) for sums in (nats, more))
    if len(counts) == 1:
        return Loss(mean, 0.0)
    return Loss(mean, clustered_error(mean, list(nats.values()), counts), clustered_error(added, list(more.values()), counts))


def _recall_losses(study: Study, what: str) -> dict[Dropped, float]:
    return {_path(text): loss for text, loss in (study.recall(what) or {}).items()}


def _keep_losses(study: Study, what: str, losses: Mapping[Dropped, float]) -> None:
    study.keep({_text(path): loss for path, loss in (_recall_losses(study, what) | dict(losses)).items()}, what)


def _text(path: Dropped) -> str:
    return format_layers(sorted(path))


def _path(text: str) -> Dropped:
    return frozenset(parse_layers(text, 10**9)) if text else WHOLE

"""Compensate for what a cut drops, keep what was fitted, and see on held-out samples whether it helps."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from hashlib import file_digest
from pathlib import Path

from ...surgery.checkpoint import Checkpoint
from ...surgery.choose import format_layers
from ...surgery.compensation.fold import Fitted, keep_compensated, open_fitted, save_fitted, with_fitted
from ...surgery.errors import DowncycleError, UnsuitableError
from ...surgery.importance.paths import Dropped
from ...surgery.importance.scores import Loss
from ...surgery.importance.states import States
from ...surgery.layers import keep_layers
from ..content import cache_folder, content_digest
from .measure import HIDDEN, held_out_loss, held_out_losses, measure
from .study import Study, check_equations


@dataclass(frozen=True)
class Outcome:
    """What became of a compensation. loss: None where it is refused, with why. file, digest: of the fitted weights, in the cache."""

    loss: Loss | None = None
    refused: str = ""
    file: str = ""
    digest: str = ""
    notes: tuple[str, ...] = ()

    def worse_than(self, plain: Loss) -> str:
        """Say why the plain weights are kept; nothing where the fitted ones lose less."""
        if self.loss is None or self.loss.loss < plain.loss:
            return ""
        return f"loses {self.loss.loss:.4f} nats per token on held-out samples, and the plain cut {plain.loss:.4f}"


def compensated(study: Study, path: Dropped, method: str) -> Outcome:
    """Fit weights to make up for dropped layers, and measure the model that has them; recalled, where that was done before."""
    place = ("compensated", method, format_layers(sorted(path)))
    if (found := study.recall(*place)) and (not found["file"] or _digest(Path(found["file"])) == found["digest"]):
        return Outcome(**{**found, "loss": found["loss"] and Loss(**found["loss"]), "notes": tuple(found["notes"])})
    try:
        outcome = _fit(study, path, method)
    except DowncycleError as error:
        outcome = Outcome(refused=str(error))
        if not isinstance(error, UnsuitableError):
            return outcome  # may go another time
    study.keep(asdict(outcome), *place)
    return outcome


def _fit(study: Study, path: Dropped, method: str) -> Outcome:
    file = cache_folder() / "fitted" / f"{study.content[:16]}-{study.key[:16]}" / f"{method}-{format_layers(sorted(path))}.safetensors"
    states = study.states("fit", sorted(path))
    try:
        fitted = _fitted(study, path, method, states)
    except UnsuitableError:
        states.clear()
        raise
    if not fitted.tensors:
        states.clear()
        return Outcome(held_out_losses(study, [path])[path])
    save_fitted(file, fitted.tensors)
    parent = with_fitted(study.checkpoint, open_fitted(file))
    loss = held_out_loss(study, path, replace(study, checkpoint=parent, content=content_digest(parent)))
    states.clear()  # not before, as a run that is killed on the way fits nothing again
    return Outcome(loss, file=str(file), digest=_digest(file), notes=tuple(fitted.notes))


def _digest(file: Path) -> str:
    """Return the SHA-256 of a file; nothing where there is none."""
    try:
        with open(file, "rb") as data:
            return file_digest(data, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _fitted(study: Study, path: Dropped, method: str, states: States) -> Fitted:
    if method == "scale":
        from ...surgery.compensation.scale import scale

        return scale(study.parts, path, measure(study, HIDDEN)[HIDDEN]["ratios"])
    from ...surgery.compensation.refit import refit

    check_equations(study.checkpoint, study.device)
    return refit(study.parts, study.fit, path, states, study.progress)


def compensate(study: Study, kept: list[int], rule: str, method: str) -> tuple[Checkpoint, list[str]]:
    """Return the child of these layers, compensated where that helps, and what is to be said of it.

    Raises:
        DowncycleError: the method cannot be used on this model.
    """
    if kept != sorted(set(kept)):
        raise DowncycleError(
            f"--compensate {method}: needs layers in their order, each once, and {format_layers(kept)} are not; leave --compensate out"
        )
    plain_child = keep_layers(study.checkpoint, kept, rule)
    path = frozenset(range(study.checkpoint.num_layers)) - frozenset(kept)
    if not path:
        return plain_child, ["no layer is dropped, and so nothing is compensated for"]
    outcome, plain = compensated(study, path, method), held_out_losses(study, [path])[path]
    if outcome.loss is None:
        raise DowncycleError(f"--compensate {method}: {outcome.refused}")
    if why := outcome.worse_than(plain):
        return plain_child, [f"{method} {why}: the plain weights are kept"]
    how = {"method": method, "loss": {"plain": plain.loss, method: outcome.loss.loss}}
    child = keep_compensated(study.checkpoint, kept, rule, open_fitted(Path(outcome.file)), how)
    return child, [f"{method}: {plain.loss:.3f} -> {outcome.loss.loss:.3f} nats per token on held-out samples", *outcome.notes]

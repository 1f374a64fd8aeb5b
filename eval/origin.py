"""Where a model comes from, as its downcycle.json says: its first parent, which of that one's layers are left, what was merged.

Reads the lineage of a Checkpoint value; opens no parent, and of adapters only what tells them apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipes.training import has_history, history
from ..surgery.adapter.merge import adapter_fingerprint
from ..surgery.checkpoint import Checkpoint, find_source, open_checkpoint
from ..surgery.compensation.fold import CALIBRATION, COMPENSATION
from ..surgery.errors import DowncycleError
from ..surgery.lineage import MERGE
from ..surgery.lineage import TERNARY as CONVERT
from .results import Logged

PARENT, CUT_ONLY, HEALED, TERNARY, UNKNOWN = "parent", "cut", "healed", "ternary", "model"
LATENT = "floats beneath ternary weights"  # what a ternary training saves; ternarize makes of it the model that was trained


@dataclass(frozen=True)
class Step:
    """One operation that led to a model. cut: the layers kept and the rule; merge: the adapter (a folder, or a Hub id).

    calibration: the samples that the rule measured on, or a compensation; compensation: the method, its losses, the fitted tensors.
    fingerprint: of the parent.
    """

    operation: str
    parent: str
    revision: str | None
    layers: tuple[int, ...] = ()
    rule: str = ""
    calibration: Mapping[str, Any] = field(default_factory=dict)
    compensation: Mapping[str, Any] = field(default_factory=dict)
    adapter: str = ""
    adapter_revision: str | None = None
    adapter_fingerprint: str = ""
    fingerprint: str = ""


@dataclass(frozen=True)
class Origin:
    """How a model came about, the first operation first; empty for one that was not made here.

    kept: the layers of the first parent (numbers from 0) that are left, in their order now, of `depth`; None where none was cut.
    """

    steps: tuple[Step, ...] = ()
    kept: tuple[int, ...] | None = None
    depth: int | None = None

    @property
    def root(self) -> str | None:
        """The first parent: a folder or a Hub id."""
        return self.steps[0].parent if self.steps else None

    @property
    def role(self) -> str:
        """parent (nothing is known of its making), cut, healed (something was merged after the cut, or at all), or ternary (converted)."""
        if not self.steps:
            return PARENT
        if any(step.operation == CONVERT for step in self.steps):
            return TERNARY
        return HEALED if self.is_healed else CUT_ONLY

    @property
    def is_healed(self) -> bool:
        """Whether something that was trained was merged into it."""
        return any(step.operation == MERGE for step in self.steps)

    def after(self, before: Origin) -> Origin:
        """Return how a model came about whose first parent came about so itself."""
        kept = self.kept if self.kept is None or before.kept is None else tuple(before.kept[layer] for layer in self.kept)
        return Origin((*before.steps, *self.steps), before.kept if kept is None else kept, before.depth or self.depth)


def origin_of(checkpoint: Checkpoint) -> Origin:
    """Read a model's origin from its lineage."""
    links: list[Mapping[str, Any]] = []
    lineage: Any = checkpoint.lineage
    while isinstance(lineage, Mapping) and lineage:
        links.insert(0, lineage)
        lineage = lineage.get("parent_lineage")
    steps = tuple(map(_step, links))
    kept: tuple[int, ...] | None = None
    depth: int | None = None
    for link, step in zip(links, steps, strict=True):
        if step.layers:
            depth = depth or link["parent_layers"]
            kept = tuple(kept[layer] for layer in step.layers) if kept else step.layers
    return Origin(steps, kept, depth)


def _step(link: Mapping[str, Any]) -> Step:
    return Step(
        operation=link.get("operation", "cut"),
        parent=link["parent"],
        revision=link.get("revision"),
        layers=tuple(link.get("layers", ())),
        rule=link.get("rule", ""),
        calibration=link.get(CALIBRATION, {}),
        compensation=link.get(COMPENSATION, {}),
        adapter=link.get("adapter", ""),
        adapter_revision=link.get("adapter_revision"),
        adapter_fingerprint=link.get("adapter_fingerprint", ""),
        fingerprint=link.get("fingerprint", ""),
    )


def training_folder(checkpoint: Checkpoint, folder: Path | None = None) -> Path | None:
    """Return the output folder of the training that healed a model, where it is still on this machine.

    That of the last adapter merged, the folder of the weights that were converted, or the model's own folder, where every weight was
    trained and it was saved there. A folder that another training was put into since then is none of them.
    """
    places = (place for step in reversed(origin_of(checkpoint).steps) if (place := adapter_folder(step) or converted_folder(step)))
    return next((place for place in (*places, *filter(None, [folder])) if has_history(place)), None)


def adapter_folder(step: Step) -> Path | None:
    """Return the folder that an adapter was merged from, where it holds that adapter still, by its config, names and shapes."""
    if step.adapter and not step.adapter_revision:
        with suppress(DowncycleError, OSError):
            if adapter_fingerprint(find_source(place := Path(step.adapter).expanduser())) == step.adapter_fingerprint:
                return place
    return None


def converted_folder(step: Step) -> Path | None:
    """Return the folder of the weights that were made ternary, where it holds them still, by their config, names and shapes."""
    if step.operation == CONVERT and not step.revision:
        with suppress(DowncycleError, OSError):
            if open_checkpoint(place := Path(step.parent).expanduser()).fingerprint == step.fingerprint:
                return place
    return None


def training_log(folder: Path) -> tuple[Logged, ...]:
    """Return the losses that a trainer logged, from its output folder; none where there is no state, or a damaged one.

    A loss that is no finite number is None.
    """
    with suppress(DowncycleError):
        found = (one for one in history(folder) if "loss" in one or "eval_loss" in one)
        return tuple(Logged(one["step"], float(one.get("epoch") or 0), _loss(one, "loss"), _loss(one, "eval_loss")) for one in found)
    return ()


def _loss(entry: Mapping[str, Any], key: str) -> float | None:
    value = entry.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

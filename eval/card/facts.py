"""Everything that is known of a model and may be published, gathered once: itself, its parents, its training, its licence.

Opens what lies on this machine and reads small files; computes no digest, measures nothing, and invents nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...recipes.commands import RECIPE
from ...surgery.checkpoint import DEMO, Checkpoint, file_bytes, open_checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.filenames import ADAPTER_CONFIG, INDEX, LINEAGE, SINGLE, is_licence_text
from ...surgery.lineage import MERGE
from ...surgery.quantizer import packed_by
from ...surgery.ternary.record import Record, read_record
from ...surgery.weights import num_parameters
from ..origin import Origin, adapter_folder, converted_folder, origin_of, training_folder
from ..report.compare import check_finite
from ..results import ModelResult, Results
from .licences import Licence, base_models, known_licence, licence_in_card, licence_in_text, licence_of_id
from .parents import Parent, open_sources, read_named, read_parent, read_parents
from .redact import scrub
from .training_record import Training, read_training


@dataclass(frozen=True)
class Facts:
    """What is known of a model, fit for publication. name: under which it is shown, USER/NAME where it has a user.

    parents: the nearest first, the first parent last. layers, parameters, nbytes, dtype: of the model itself, 0 and "" of an adapter.
    adapter: its adapter_config.json, where it is one. licence: as licences.py calls it. files: of its folder, by their names.
    measured: this model's own part of the results.
    """

    name: str
    config: Mapping[str, Any] = field(default_factory=dict)
    origin: Origin = field(default_factory=Origin)
    parents: tuple[Parent, ...] = ()
    layers: int = 0
    parameters: int = 0
    nbytes: int = 0
    dtype: str = ""
    adapter: Mapping[str, Any] | None = None
    licence: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    training: Training | None = None
    made_with: str = ""
    files: tuple[str, ...] = ()
    results: Results | None = None
    measured: ModelResult | None = None

    @property
    def parent(self) -> Parent | None:
        """The first parent: what all of it comes from."""
        return self.parents[-1] if self.parents else None

    @property
    def is_cut(self) -> bool:
        """Whether layers of the first parent were chosen."""
        return self.origin.kept is not None and self.adapter is None

    @property
    def is_healed(self) -> bool:
        """Whether it was trained: something was merged into it, its config or its own folder says so, or that of its float weights."""
        return self.origin.is_healed or self.training is not None or self.record is not None

    @property
    def record(self) -> Record | None:
        """What its config says of how it learnt ternary weights."""
        return read_record(self.config, self.name)

    @property
    def licences(self) -> tuple[Licence, ...]:
        """The licences known here that it is under, or its card, what that names as base model, or a parent."""
        named = [self.licence, licence_in_card(self.card), *map(licence_of_id, base_models(self.card))]
        named += [parent.licence for parent in self.parents]
        return tuple(licence for key in dict.fromkeys(named) if (licence := known_licence(key)))

    @property
    def title(self) -> str:
        """The name without its user."""
        return self.name.rpartition("/")[2]


def gather(checkpoint: Checkpoint, name: str, folder: Path | None, own_card: Mapping[str, Any], *, ask: bool = False) -> Facts:
    """Gather what is known of a model.

    Args:
        folder: its own, where it is written: what else lies there counts too. own_card: metadata of the card that is there already.
        ask: whether the Hub may be asked for a parent's card.
    """
    origin = _origin(checkpoint)
    training = _training(checkpoint, origin, folder)
    near_by = folder.parent if folder else Path()
    parents = read_parents(origin, list(open_sources(checkpoint)), ask=ask, near=near_by)
    trained = converted_folder(origin.steps[0]) if origin.steps else folder  # where it was saved by the trainer, if that trained all of it
    made = checkpoint.lineage
    if training and (trained or not origin.steps):
        base, named = _trained_base(training, trained), training.config.get("base_model")
        if base is not None:
            made, before = made or base.lineage, _origin(base)
            near = read_parent(base.name, base.revision, ask=ask)
            parents = (*parents, near, *read_parents(before, list(open_sources(base)), ask=ask, near=Path()))
            origin = origin.after(before)
        elif isinstance(named, str) and named:
            parents = (*parents, read_named(named, base_models(own_card), ask=ask, near=near_by))
    return Facts(
        name=name,
        config=checkpoint.config,
        origin=origin,
        parents=parents,
        layers=checkpoint.num_layers,
        parameters=num_parameters(checkpoint),
        nbytes=checkpoint.nbytes,
        dtype=_dtype(checkpoint),
        licence=_licence(_legal_texts(checkpoint), own_card, parents),
        card=own_card,
        training=training,
        made_with=str(made.get("downcycle", "")),
        files=_files(checkpoint, folder),
    )


def gather_adapter(folder: Path, name: str, own_card: Mapping[str, Any], *, ask: bool = False) -> Facts:
    """Gather what is known of an adapter of peft and of the model that it was trained on.

    Raises:
        DowncycleError: adapter_config.json cannot be read.
    """
    try:
        adapter = json.loads((folder / ADAPTER_CONFIG).read_text())
        named = adapter["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DowncycleError(f"{folder / ADAPTER_CONFIG}: no config of an adapter ({str(error)[:80]}); save the adapter again") from error
    base = _open_base(named, folder)
    origin = _origin(base) if base else Origin()
    near = (read_named(named, base_models(own_card), ask=ask, near=folder.parent),) if isinstance(named, str) and named else ()
    parents = (*near, *(read_parents(origin, list(open_sources(base)), ask=ask, near=folder.parent) if base else ()))
    texts = [path.read_text(errors="replace") for path in sorted(folder.iterdir()) if is_licence_text(path.name) and path.is_file()]
    return Facts(
        name=name,
        origin=origin,
        parents=parents,
        dtype=_dtype(base) if base else "",
        adapter=adapter,
        licence=_licence(texts, own_card, parents),
        card=own_card,
        training=read_training(folder, _recipes(base, folder)),
        files=tuple(sorted(path.name for path in folder.iterdir() if path.is_file())),
    )


def with_results(facts: Facts, results: Results, measured: ModelResult) -> Facts:
    """Add what was measured, and the models that it was measured beside.

    Raises:
        DowncycleError: something measured is no finite number.
    """
    results = check_finite(results)
    return replace(facts, results=results, measured=next(one for one in results.models if one.content == measured.content))


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no model."""
    return (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (SINGLE, INDEX))


def own_version() -> str:
    """The release of this package."""
    return version("downcycle")


def describe_result(facts: Facts) -> ModelResult:
    """Return a model's facts as the figures take them, without any measurement."""
    role = facts.origin.role
    log = facts.training.log if facts.training else ()
    return ModelResult(
        name=facts.title,
        content="",
        role=role,
        layers=facts.layers,
        parameters=facts.parameters,
        nbytes=facts.nbytes,
        load="",
        device="",
        depth=facts.origin.depth,
        kept=facts.origin.kept,
        training=log,
    )


def _origin(checkpoint: Checkpoint) -> Origin:
    try:
        origin = origin_of(checkpoint)
        if all(isinstance(text, str) for step in origin.steps for text in (step.parent, step.adapter, step.rule)):
            return origin
    except (KeyError, TypeError, AttributeError, IndexError, ValueError):
        pass
    raise DowncycleError(f"{checkpoint.name}/{LINEAGE}: does not say how the model was made; it was changed, or is another version's")


def _training(checkpoint: Checkpoint, origin: Origin, folder: Path | None) -> Training | None:
    """Find what is known of the training behind a model: that of the last adapter merged into it, or its own."""
    merges = [step for step in origin.steps if step.operation == MERGE]
    output = training_folder(checkpoint, folder)
    if output is None and merges:
        output = adapter_folder(merges[-1])
    if output is None:
        return None
    beside = [Path(step.parent).expanduser() / RECIPE for step in reversed(merges) if step.revision is None and step.parent != DEMO]
    return read_training(output, [*beside, output.parent / RECIPE])


def _recipes(base: Checkpoint | None, folder: Path) -> Iterable[Path]:
    return [*([Path(base.name) / RECIPE] if base and base.revision is None else []), folder.parent / RECIPE]


def _trained_base(training: Training, folder: Path | None) -> Checkpoint | None:
    """Open what a fully trained model was made from, where its recipe names a folder that is still here."""
    base = _open_base(training.config.get("base_model"), folder)
    return base if base is not None and base.lineage else None


def _open_base(named: Any, folder: Path | None) -> Checkpoint | None:
    if isinstance(named, str) and named:
        for place in (Path(named).expanduser(), *([folder.parent / named] if folder else [])):
            with suppress(DowncycleError, OSError):
                if place.is_dir():
                    return open_checkpoint(place)
    return None


def _licence(texts: Iterable[str], own_card: Mapping[str, Any], parents: Iterable[Parent]) -> str | None:
    """Say under which licence a model is.

    Its nearest parent's that is known, that of its own texts, that of what its card says it was made from, or what its card says.
    """
    found = [parent.licence for parent in parents]
    found += [*map(licence_in_text, texts), *map(licence_of_id, base_models(own_card)), licence_in_card(own_card)]
    return next(filter(None, found), None)


def _legal_texts(checkpoint: Checkpoint) -> list[str]:
    texts = []
    for path, data in checkpoint.files.items():
        if is_licence_text(path):
            with suppress(DowncycleError, OSError):
                texts.append(file_bytes(data).decode(errors="replace"))
    return texts


def _files(checkpoint: Checkpoint, folder: Path | None) -> tuple[str, ...]:
    there = (path.name for path in folder.iterdir() if path.is_file()) if folder else ()
    lineage = {LINEAGE} if checkpoint.lineage else set()  # which is written, or lies there
    return tuple(sorted({*checkpoint.files, *there, *lineage}))


def _dtype(checkpoint: Checkpoint) -> str:
    """Return the dtype that a config states, as torch spells it; empty where it states none or the weights are packed."""
    text = checkpoint.config.get("text_config")
    for config in (checkpoint.config, text if isinstance(text, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if isinstance(stated := config.get(key), str) and not packed_by(checkpoint.config):
                return scrub(stated.removeprefix("torch."))
    return ""

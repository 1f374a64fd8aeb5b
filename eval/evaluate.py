"""Measure models side by side: what is known already is recalled, and a model is loaded only for what is not.

Decides what is measured and puts it together; how, it refuses to know.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

from ..surgery.checkpoint import Checkpoint, open_checkpoint, split_revision
from ..surgery.errors import DowncycleError
from ..surgery.ternary.record import is_latent
from ..surgery.weights import num_parameters
from .benchmarks.harness import require_lm_eval
from .benchmarks.tasks import Task, parse_tasks, task_key
from .cache import keep, keep_results, key_of, recall
from .content import cache_folder, content_digest
from .machine import gpu_names, machine_words, release_of
from .measure.loading import Loaded, check_load, held_as, load
from .measure.perplexity import check_windows, perplexity
from .measure.speed import measure_speed
from .measure.text import Documents, read_documents
from .origin import HEALED, LATENT, PARENT, UNKNOWN, Origin, origin_of, training_folder, training_log
from .results import ModelResult, Perplexity, Results, Score, Speed
from .ternary.layers import layer_weights

TURNS = 2
PACKAGES = ("downcycle", "torch", "transformers", "bitsandbytes", "lm_eval")
Measured = dict[str, Any]  # by key
Progress = Callable[[str, int, int], None]  # what is being done, how much is, of how much (0: unknown)


@dataclass(frozen=True)
class Plan:
    """What is measured of every model, and how it is loaded. length, stride: of perplexity's windows; None: as the model lets."""

    texts: tuple[Documents, ...]
    tasks: tuple[Task, ...] = ()
    limit: int | None = None
    load: str = "stored"
    offload: bool = False
    length: int | None = None
    stride: int | None = None
    batch: int | None = None
    trust_remote_code: bool = False

    @cached_property
    def how(self) -> list[Any]:
        """What decides every number beside the model and the measure: how it is loaded, on what, by which releases."""
        releases = [release_of(name) for name in ("torch", "transformers", "bitsandbytes")]
        return [self.load, self.offload, "cuda" if gpu_names() else "cpu", *releases]


@dataclass(frozen=True)
class Subject:
    """A model to be measured, under the name that it is shown by."""

    name: str
    checkpoint: Checkpoint
    content: str


def evaluate(
    models: Sequence[str],
    texts: Sequence[str | None] = (None,),
    tasks: str = "",
    *,
    limit: int | None = None,
    load: str = "stored",
    offload: bool = False,
    length: int | None = None,
    stride: int | None = None,
    batch: int | None = None,
    trust_remote_code: bool = False,
    progress: Progress = lambda what, done, total: None,
) -> Results:
    """Measure perplexity, benchmarks, speed and size of models; the first is what the others are compared with.

    Args:
        models: folders, Hub ids (USER/NAME, USER/NAME@REVISION), or `demo`.
        texts: files, folders or Hub data sets for perplexity; None is the built-in held-out text.
        tasks: benchmarks, as `--tasks` spells them. limit: examples of each, and documents of each text.
        load: stored, bf16, fp32, int8 or nf4. offload: let a model that is larger than memory run, slowly.
        length, stride, batch: of perplexity's windows, in tokens, and how many go through at once.
    Raises:
        DowncycleError: what cannot be opened, loaded or measured; says why.
    """
    check_windows(length, stride, batch)
    check_load(load)
    plan = Plan(
        tuple(read_documents(text, limit) for text in texts),
        tuple(parse_tasks(tasks)) if tasks else (),
        limit,
        load,
        offload,
        length,
        stride,
        batch,
        trust_remote_code,
    )
    subjects = _subjects(models, trust_remote_code, progress)
    machine = machine_words()
    side_by_side = key_of("speed", sorted(subject.content for subject in subjects), machine, plan.how)
    speeds = [recall(subject.content, side_by_side) for subject in subjects]
    if None in speeds:
        speeds = [asdict(speed) for speed in _race(subjects, plan, progress)]
        for subject, speed in zip(subjects, speeds, strict=True):
            keep(subject.content, side_by_side, speed)
    measured = [_measure(subject, plan, progress) for subject in subjects]
    described = [_describe(subject, plan, known, speed, progress) for subject, known, speed in zip(subjects, measured, speeds, strict=True)]
    versions = {name: release for name in PACKAGES if (release := release_of(name))}
    results = Results(_with_roles(described), machine, versions, time.strftime("%Y-%m-%d"), limit)
    keep_results(results)
    return results


def _subjects(models: Sequence[str], trust_remote_code: bool, progress: Progress) -> list[Subject]:
    """Open the models; each is shown by the last part of a folder's name, where that names one of them only."""
    if repeated := next((src for src in models if models.count(src) > 1), None):
        raise DowncycleError(f"{repeated}: given twice; name each model once")
    opened = [open_checkpoint(*split_revision(src), trust_remote_code=trust_remote_code) for src in models]
    short = [one.name if one.revision else Path(os.path.abspath(one.name)).name for one in opened]
    subjects = []
    for src, checkpoint, name in zip(models, opened, short, strict=True):
        content = content_digest(checkpoint, lambda count, what=f"reading {name}": progress(what, 0, 0))  # type: ignore[misc]
        subjects.append(Subject(name if short.count(name) == 1 else src, checkpoint, content))
    return subjects


def _race(subjects: Sequence[Subject], plan: Plan, progress: Progress) -> Iterator[Speed]:
    """Measure the speed of all models in turn, and once more in turn, so that what else the machine does falls on each of them.

    The peak is that of the turn that held less: in the other, libraries took memory for the first time.
    """
    speeds: list[list[Speed]] = [[] for _ in subjects]
    amount: Any = {"runs": 1, "prompt": 64, "generated": 4} if plan.offload else {}  # a token may take as long as reading all weights
    for turn in range(1 if plan.offload else TURNS):
        for subject, own in zip(subjects, speeds, strict=True):
            say = partial(_told, progress, f"{subject.name}, turn {turn + 1}")
            own.append(measure_speed(_load(subject, plan, progress), **amount, progress=say))
            gc.collect()
    for own in speeds:
        middle = {name: median(getattr(speed, name) for speed in own) for name in ("prefill_rate", "decode_rate")}
        yield replace(own[0], **middle, peak_bytes=min(speed.peak_bytes for speed in own), runs=sum(speed.runs for speed in own))


def _measure(subject: Subject, plan: Plan, progress: Progress) -> Measured:
    """Return what is measured of a model, by key; it is loaded, once, if anything is not known yet."""
    jobs = _jobs(subject, plan, partial(_told, progress, subject.name))
    known = {key: recall(subject.content, key) for key in jobs}
    if missing := [key for key in jobs if known[key] is None]:
        if any(_task_key(plan, task) in missing for task in plan.tasks):
            require_lm_eval()
        loaded = _load(subject, plan, progress)
        for key in missing:
            known[key] = jobs[key](loaded)
            if not keep(subject.content, key, known[key]):
                progress(f"{cache_folder()} cannot be written: nothing that is measured is kept", 0, 0)
        del loaded
        gc.collect()
    return known


def _load(subject: Subject, plan: Plan, progress: Progress) -> Loaded:
    progress(f"loading {subject.name}", 0, 0)
    return load(subject.checkpoint, plan.load, offload=plan.offload, trust_remote_code=plan.trust_remote_code)


def _told(progress: Progress, name: str, what: str, done: int, total: int) -> None:
    progress(f"{name}, {what}", done, total)


def _jobs(subject: Subject, plan: Plan, say: Progress) -> dict[str, Callable[[Loaded], Any]]:
    """What there is to measure: for each key, a function of the loaded model that gives a value for JSON."""
    jobs: dict[str, Callable[[Loaded], Any]] = {
        _key(plan, "loaded"): lambda loaded: {"load": held_as(loaded), "device": loaded.device.type}
    }
    jobs |= {_text_key(plan, text): partial(_perplexity, text, plan, say) for text in plan.texts}
    return jobs | {_task_key(plan, task): partial(_scores, task, plan, subject, say) for task in plan.tasks}


def _perplexity(text: Documents, plan: Plan, say: Progress, loaded: Loaded) -> dict[str, Any]:
    return asdict(perplexity(loaded, text, length=plan.length, stride=plan.stride, batch=plan.batch, progress=say))


def _scores(task: Task, plan: Plan, subject: Subject, say: Progress, loaded: Loaded) -> list[dict[str, Any]]:
    from .benchmarks.run import run_task

    answers = f"{subject.content}-{key_of(plan.how)[:8]}"
    return [asdict(score) for score in run_task(loaded, task, limit=plan.limit, batch=plan.batch, content=answers, progress=say)]


def _key(plan: Plan, *parts: Any) -> str:
    return key_of(*parts, plan.how)


def _text_key(plan: Plan, text: Documents) -> str:
    return _key(plan, "perplexity", text.digest, plan.length, plan.stride)


def _task_key(plan: Plan, task: Task) -> str:
    return _key(plan, "task", task_key(task, plan.limit))


def _describe(subject: Subject, plan: Plan, known: Measured, speed: dict[str, Any], progress: Progress) -> ModelResult:
    """Put together what is known of a model."""
    checkpoint, origin = subject.checkpoint, origin_of(subject.checkpoint)
    texts = (replace(Perplexity(**known[_text_key(plan, text)]), text=_shown(text, plan.limit)) for text in plan.texts)
    training = training_folder(checkpoint, Path(checkpoint.name) if not checkpoint.revision else None)
    return ModelResult(
        name=subject.name,
        content=subject.content,
        role=_role(checkpoint, bool(training), origin),
        layers=checkpoint.num_layers,
        parameters=num_parameters(checkpoint),
        nbytes=checkpoint.nbytes,
        **known[_key(plan, "loaded")],
        revision=checkpoint.revision,
        depth=origin.depth,
        kept=origin.kept,
        perplexity=tuple(texts),
        scores=tuple(Score(**score) for task in plan.tasks for score in known[_task_key(plan, task)]),
        speed=Speed(**speed),
        training=training_log(training) if training else (),
        ternary=layer_weights(checkpoint, subject.content, partial(_told, progress, subject.name)),
    )


def _role(checkpoint: Checkpoint, trained: bool, origin: Origin) -> str:
    """Say in a word what a model is."""
    if is_latent(checkpoint.config, checkpoint.name):
        return LATENT
    return HEALED if trained and not origin.steps else origin.role


def _shown(text: Documents, limit: int | None) -> str:
    """A text's name without the folders of this machine, and how much of it was read where that may not be all."""
    name = Path(text.name).name if os.path.exists(os.path.expanduser(text.name)) else text.name
    return f"{name}, first {limit} document{'s' if limit != 1 else ''}" if limit == len(text.texts) else name


def _with_roles(models: Sequence[ModelResult]) -> tuple[ModelResult, ...]:
    """Of models that were not made here, only the first is taken for the parent of the others."""
    return tuple(replace(one, role=UNKNOWN) if number and one.role == PARENT else one for number, one in enumerate(models))

"""Scoring on the command line: the options that say what layers are measured on, the measured part of a cut, and `downcycle score`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ...surgery.checkpoint import DEMO, Checkpoint, open_checkpoint
from ...surgery.choose import RULES as WITHOUT_DATA
from ...surgery.choose import choose
from ...surgery.compensation.fold import CALIBRATION, METHODS
from ...surgery.errors import DowncycleError
from ...surgery.importance.calibration import SAMPLES, SEED
from ...surgery.importance.rules import RULES, find_rule, parse_protected, protected_layers
from ...surgery.layers import keep_layers
from ...terminal import Json, Revision, Src, Trust, parse_count, print_json, stage_bar

if TYPE_CHECKING:
    from .study import Study

Calibrate = Annotated[
    str | None, typer.Option(metavar="TEXT", help="Text to measure layers on: file, folder or Hub data set; 'demo' is built in.")
]
Samples = Annotated[int, typer.Option(metavar="N", help="Pieces of the text to measure on; a quarter as many are held out.")]
Length = Annotated[int | None, typer.Option(metavar="N", help="Tokens in a piece at most [default: 512 or the model's positions].")]
Seed = Annotated[int, typer.Option(metavar="N", help="Draws the pieces.")]
Protect = Annotated[
    str | None, typer.Option(metavar="LIST", help="Layers that a measuring rule must keep, like 0-3,31, or none [default: the rule's own].")
]
Load = Annotated[str, typer.Option(metavar="HOW", help="Weights as layers are measured: stored, bf16, fp32, int8 or nf4.")]


@dataclass(frozen=True)
class Measuring:
    """What layers are measured on, as the options say it."""

    calibrate: str | None
    samples: int = SAMPLES
    length: int | None = None
    seed: int = SEED
    protect: str | None = None
    load: str = "stored"
    trust_remote_code: bool = False


def choose_child(
    parent: Checkpoint, keep: int | list[int], rule: str, method: str, measuring: Measuring, quiet: bool
) -> tuple[Checkpoint, list[str]]:
    """Return the child that a rule makes of a parent, compensated as asked, and what is to be said of it.

    Args:
        keep: how many layers, or which. rule: how they are chosen, or were.
    Raises:
        DowncycleError: no such rule or method, or a text is missing that they need.
    """
    if method not in ("none", *METHODS):
        raise DowncycleError(f"--compensate {method}: no such method; choose {', '.join(METHODS)}, or none")
    measured = isinstance(keep, int) and rule not in WITHOUT_DATA and bool(find_rule(rule))
    if not measured and method == "none":
        kept = choose(parent.num_layers, keep, rule) if isinstance(keep, int) else keep
        return keep_layers(parent, kept, rule), []
    if measuring.calibrate is None:
        what = f"--select {rule}" if measured else f"--compensate {method}"
        raise DowncycleError(f"{what}: measures the model on a text; give one with --calibrate TEXT ('demo' is the built-in one)")
    from ..commands import hush

    hush()
    from .choose import choose_layers
    from .compensated import compensate

    protect = None if measuring.protect is None else parse_protected(measuring.protect, parent.num_layers)
    if isinstance(keep, int):  # what cannot be kept is refused before a text is read
        protected_layers(rule if measured else "bi", parent.num_layers, keep, protect)
    with stage_bar(quiet) as say:
        study = replace(open_study(parent, measuring), progress=say)
        with study.held():
            kept = choose_layers(study, rule, keep, protect) if isinstance(keep, int) else keep
            child, notes = (keep_layers(parent, kept, rule), []) if method == "none" else compensate(study, kept, rule, method)
    facts = study.calibration.facts() | {"load": study.load} | ({} if protect is None else {"protect": list(protect)})
    return replace(child, lineage={**child.lineage, CALIBRATION: facts}), notes


def open_study(checkpoint: Checkpoint, measuring: Measuring) -> Study:
    """Draw the samples and see that the model can be measured here."""
    from ..content import content_digest
    from ..measure.calibration import make_calibration
    from ..measure.loading import check_how, find_device
    from .study import Study, check_memory

    check_how(checkpoint, measuring.load)
    check_memory(checkpoint, measuring.load, device := find_device("auto"))
    calibration = make_calibration(
        checkpoint,
        None if measuring.calibrate == DEMO else measuring.calibrate,
        samples=measuring.samples,
        length=measuring.length,
        seed=measuring.seed,
        trust_remote_code=measuring.trust_remote_code,
    )
    return Study(checkpoint, content_digest(checkpoint), calibration, measuring.load, device)


def score(
    src: Src,
    calibrate: Calibrate = None,
    keep: Annotated[str | None, typer.Option(metavar="N", help="How many layers each rule keeps [default: three of four].")] = None,
    compensate: Annotated[str, typer.Option(metavar="LIST", help="Compensations to try on each rule's choice.")] = ",".join(METHODS),
    protect: Protect = None,
    samples: Samples = SAMPLES,
    length: Length = None,
    seed: Seed = SEED,
    load: Load = "stored",
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.html, scores.json and figures here.")] = None,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure how much each layer matters, and what every rule would keep and lose. What was measured before is not measured again."""
    from ..commands import hush

    hush()
    from ...surgery.importance.scores import scores_json
    from ..report.page import check_folder
    from ..report.scores_page import write_scores_report
    from ..report.scores_table import print_scores
    from .score import score as measure_all

    if calibrate is None:
        raise typer.BadParameter("give a text to measure on, with --calibrate TEXT ('demo' is the built-in one)")
    methods = _methods(compensate)
    if report is not None:
        check_folder(report)
    checkpoint = open_checkpoint(src, revision, trust_remote_code=trust_remote_code)
    depth = checkpoint.num_layers
    count = depth - depth // 4 if keep is None else parse_count(keep, "--keep")
    protected = None if protect is None else parse_protected(protect, depth)
    protected_layers("bi", depth, count, protected)
    measuring = Measuring(calibrate, samples, length, seed, protect, load, trust_remote_code=trust_remote_code)
    with stage_bar(as_json) as say:
        study = replace(open_study(checkpoint, measuring), progress=say)
        with study.held():
            scores = measure_all(study, count, protected, methods)
    page = write_scores_report(scores, report) if report is not None else None
    if as_json:
        print_json(scores_json(scores))
        return
    print_scores(scores)
    if page is not None:
        typer.echo(page)


def rule_names() -> str:
    """Name the rules of --select: those without data first."""
    return f"{', '.join(WITHOUT_DATA)}; measured with --calibrate: {', '.join(RULES)}"


def _methods(text: str) -> Sequence[str]:
    names = [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]
    if unknown := [name for name in names if name not in METHODS]:
        raise DowncycleError(f"--compensate {unknown[0]}: no such method; choose from {', '.join(METHODS)}, or none")
    return names

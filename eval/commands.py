"""The commands of this folder: each parses, calls one function and prints."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Json, Trust, parse_count, print_json, stage_bar
from .results import results_json


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for everything that is made.")] = Path("downcycle-demo"),
    as_json: Json = False,
) -> None:
    """Show the whole path on the built-in model, on this CPU, in minutes: cut, heal with Axolotl, merge, compare."""
    _hush()
    from .demo import loss_lines, run_demo

    with stage_bar(as_json) as say:
        result = run_demo(out, progress=lambda now: say(now.stage + (f": loss {now.loss:.2f}" if now.loss else ""), now.step, now.steps))
    if as_json:
        print_json(asdict(result))
        return
    sign = "█" if "utf" in (sys.stdout.encoding or "").lower() else "#"
    for line in loss_lines(result, sign):
        typer.echo(line)
    typer.echo("child and healed model are verified: each holds what it was made from, byte for byte")
    typer.echo(f"healing won back {result.recovered:.0%} of what the cut cost, in {result.seconds:.0f} s; picture: {result.picture}")


def eval_models(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="Folders or Hub ids, the parent first; 'demo' is built in.")],
    text: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Text for perplexity: file, folder or Hub data set; may repeat [default: a built-in text]."),
    ] = None,
    tasks: Annotated[str, typer.Option(metavar="LIST", help="Benchmarks: quick, openllm, names of lm-eval or YAML files, by commas.")] = "",
    limit: Annotated[str | None, typer.Option(metavar="N", help="At most N examples of each task, and documents of each text.")] = None,
    load: Annotated[str, typer.Option(metavar="HOW", help="Weights: stored, bf16, fp32, int8 or nf4.")] = "stored",
    offload: Annotated[bool, typer.Option("--offload", help="Let a model larger than memory run from the disk, slowly.")] = False,
    length: Annotated[int | None, typer.Option(metavar="N", help="Tokens in a window of text [default: 2048 or the model's].")] = None,
    stride: Annotated[int | None, typer.Option(metavar="N", help="Tokens from one window to the next [default: half a window].")] = None,
    batch: Annotated[int | None, typer.Option(metavar="N", help="Windows or examples at once [default: what fits].")] = None,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.html, results.json and figures here.")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Measure models side by side: perplexity, benchmarks, speed and size. What was measured before is not measured again."""
    _hush()
    from .evaluate import evaluate
    from .report.table import print_table

    count = None if limit is None else parse_count(limit, "--limit")
    with stage_bar(as_json) as say:
        results = evaluate(
            models,
            text or [None],
            tasks,
            limit=count,
            load=load,
            offload=offload,
            length=length,
            stride=stride,
            batch=batch,
            trust_remote_code=trust_remote_code,
            progress=say,
        )
    if report is not None:
        from .report.page import write_report

        write_report(results, report)
    if as_json:
        typer.echo(results_json(results), nl=False)
        return
    print_table(results)
    if report is not None:
        typer.echo(report / "report.html")


def _hush() -> None:
    """Keep libraries from talking into the progress, and their threads, which spin while they wait, from taking the cores of others."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)

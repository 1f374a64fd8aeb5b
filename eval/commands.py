"""The commands of this folder: each parses, calls one function and prints."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..terminal import Json, print_json, stage_bar


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for everything that is made.")] = Path("downcycle-demo"),
    as_json: Json = False,
) -> None:
    """Show the whole path on the built-in model, on this CPU, in minutes: cut, heal with Axolotl, merge, compare."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # threads that spin take the cores from Axolotl's
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
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

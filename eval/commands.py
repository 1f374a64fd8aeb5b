"""The commands of this folder: each parses, calls one function and prints."""

from __future__ import annotations

import logging
import os
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..recipes.commands import RECIPE
from ..surgery.checkpoint import Checkpoint
from ..surgery.errors import DowncycleError
from ..terminal import Json, Trust, format_bytes, parse_count, print_json, printable, progress_bar, stage_bar
from .results import RESULTS, read_results, results_json

if TYPE_CHECKING:
    from .publish.files import PushPlan
    from .publish.push import Pushed


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for everything that is made.")] = Path("downcycle-demo"),
    as_json: Json = False,
) -> None:
    """Show the whole path on the built-in model, on this CPU, in minutes: cut, heal with Axolotl, merge, compare."""
    hush()
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
    hush()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # not in `demo`: Axolotl would show no steps
    from .evaluate import evaluate
    from .report.page import check_folder, write_report
    from .report.table import print_table

    if report is not None:
        check_folder(report)
    count = None if limit is None else parse_count(limit, "--limit")
    if count == 0:
        raise DowncycleError("--limit 0: give 1 or more, or leave it out")
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
        write_report(results, report)
    if as_json:
        typer.echo(results_json(results), nl=False)
        return
    print_table(results)
    if report is not None:
        typer.echo(report / "report.html")


def card(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds a model or an adapter.")],
    report: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A report of `downcycle eval` [default: the last one that this model was in].")
    ] = None,
    name: Annotated[str | None, typer.Option(metavar="USER/NAME", help="Name on the Hub [default: the folder's].")] = None,
    as_json: Json = False,
) -> None:
    """Write the model card, README.md, with everything that is known; what a person wrote in it stays."""
    from .card.card import known_results, write_card

    source = (report or folder) / RESULTS
    results = read_results(source) if report is not None else known_results(folder)
    written = write_card(folder, results, name=name, source=source)
    if as_json:
        print_json({**asdict(written), "path": str(written.path)})
        return
    for line in written.remarks():
        typer.echo(printable(line), err=True)
    typer.echo(written.path)


def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that holds a model or an adapter.")],
    repo: Annotated[str, typer.Argument(metavar="USER/NAME", help="The repo, which is made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repo private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, list what would be sent, and send nothing.")] = False,
    include_recipe: Annotated[bool, typer.Option("--include-recipe", help=f"Send the {RECIPE} that healed it too.")] = False,
    src: Annotated[str | None, typer.Option(metavar="SRC", help="What it was made from [default: as downcycle.json says].")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="ADAPTER", help="What was merged [default: as downcycle.json says].")] = None,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch to commit to [default: main].")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Publish a folder on the Hub: what does not verify, holds secrets or breaks its licence's naming is refused."""
    from .publish.files import plan_push
    from .publish.push import check_settings
    from .publish.push import push as push_plan

    if not dry_run:
        check_settings(revision)
    weights = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    with progress_bar("verifying", weights, as_json) as advance:
        plan = plan_push(
            folder,
            repo,
            include_recipe=include_recipe,
            src=src,
            adapter=adapter,
            trust_remote_code=trust_remote_code,
            progress=advance,
        )
    planned = {"files": dict(plan.files), "left_out": dict(plan.left_out), "bytes": plan.bytes, "proof": plan.proof, "notes": plan.notes}
    if not as_json:
        _print_plan(plan, dry_run)
    if dry_run:
        if as_json:
            print_json({"repo": repo, **planned, "pushed": None})
        return
    try:
        pushed = push_plan(plan, private=private, revision=revision, quiet=as_json, say=lambda text: typer.echo(text, err=True))
    except KeyboardInterrupt as stopped:
        typer.echo(f"downcycle: {str(stopped) or 'interrupted'}", err=True)
        sys.stdout.flush()
        os._exit(130)  # Python would wait for threads of huggingface_hub that wait to try again
    if as_json:
        print_json({"repo": repo, **planned, "pushed": asdict(pushed)})
    else:
        _print_pushed(pushed)


def _print_pushed(pushed: Pushed) -> None:
    """Say what the Hub holds now; its address is the answer."""
    if pushed.others:
        typer.echo(f"note: {len(pushed.others)} other files were there and stayed, such as {printable(pushed.others[0])}", err=True)
    seen = "private" if pushed.private else "public"
    sent = f"{pushed.new_files} new files, {format_bytes(pushed.new_bytes)}" if pushed.new_files else "nothing new to send"
    typer.echo(f"{seen}; {sent}; the Hub lists {pushed.files} files, {format_bytes(pushed.bytes)}, equal to the folder's", err=True)
    typer.echo(pushed.url)


def _print_plan(plan: PushPlan, dry_run: bool) -> None:
    """List what goes and what stays: on stdout where that is the answer."""
    lines = [f"{plan.repo}: {plan.proof}"]
    lines += [f"  {path}  {format_bytes(size)}" for path, size in plan.files.items()]
    lines += [f"  left out: {path}: {why}" for path, why in plan.left_out.items()]
    lines += [f"note: {note}" for note in plan.notes]
    lines.append(f"{'would send' if dry_run else 'sending'} {len(plan.files)} files, {format_bytes(plan.bytes)}")
    for line in lines:
        typer.echo(printable(line), err=not dry_run)


def add_card(model: Checkpoint, target: str) -> Checkpoint:
    """Put a model card into a model that is about to be written; where there can be none, say why."""
    from .card.card import card_files

    try:
        return replace(model, files={**model.files, **card_files(model, target)})
    except DowncycleError as error:
        typer.echo(f"no model card: {printable(str(error))}", err=True)
        return model


def hush() -> None:
    """Keep libraries from talking into the progress, and their threads, which spin while they wait, from taking the cores of others."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    for name in ("torchao", "torch.utils._pytree", "kernels", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)

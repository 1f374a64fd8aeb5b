"""The command line: each command parses, calls one function and prints. Progress and maps go to stderr, answers to stdout."""

from __future__ import annotations

import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from .eval import commands as eval_commands
from .eval import gguf_command
from .eval.commands import add_card
from .eval.scoring import commands as scoring
from .eval.scoring.commands import Calibrate, Length, Load, Measuring, Protect, Samples, Seed, choose_child, rule_names
from .eval.ternary import commands as ternary_commands
from .recipes import commands as recipe_commands
from .recipes.commands import RECIPE
from .recipes.presets import PRESETS, RECIPES
from .recipes.recipe import make_recipe
from .recipes.recipe_text import recipe_text
from .surgery.checkpoint import Checkpoint, open_checkpoint
from .surgery.choose import RULES, format_layers, parse_layers
from .surgery.errors import DowncycleError
from .surgery.importance.calibration import SAMPLES, SEED
from .surgery.naming import child_name
from .surgery.plan import Plan, plan_write
from .surgery.staging import target_path
from .surgery.verify import verify as verify_folder
from .surgery.weights import num_parameters
from .surgery.write import check_free, check_target, write
from .terminal import (
    Json,
    Revision,
    Trust,
    format_bytes,
    layer_map,
    parse_count,
    print_json,
    printable,
    progress_bar,
    refuse_given,
    say_staging,
    was_given,
)


class Commands(typer.core.TyperGroup):
    """The commands; Ctrl-C is answered here, because typer would end without a word."""

    def invoke(self, context: Any) -> Any:
        """Run a command; where the user stops it, say so and end with 130."""
        try:
            return super().invoke(context)
        except KeyboardInterrupt as error:
            sys.exit(_fail(str(error) or "interrupted", 130))


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.callback(invoke_without_command=True)
def cut(
    context: typer.Context,
    src: Annotated[str | None, typer.Option(metavar="SRC", help="Parent: folder, Hub id, or 'demo', the built-in model.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="N", help="How many decoder layers to keep.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Which layers to keep, like 0-19,28-31; may repeat.")] = None,
    select: Annotated[str, typer.Option(metavar="RULE", help=f"How --keep chooses: {rule_names()}.")] = "first",
    calibrate: Calibrate = None,
    compensate: Annotated[str, typer.Option(metavar="none|scale|refit", help="Fold what is dropped into kept weights.")] = "none",
    protect: Protect = None,
    samples: Samples = SAMPLES,
    length: Length = None,
    seed: Seed = SEED,
    load: Load = "stored",
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Child folder [default: the parent's name, size replaced].")] = None,
    revision: Revision = None,
    recipe: Annotated[str, typer.Option(metavar="PRESET|none", help=f"Recipe that trains the child, as {RECIPE} in it.")] = "qlora",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest safetensors file.")] = "5GB",
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and read no weight.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing child.")] = False,
    as_json: Json = False,
) -> None:
    """Make a small language model out of a large one.

    downcycle --src meta-llama/Meta-Llama-3-8B --keep 24

    copies 24 of its 32 decoder layers, the embeddings and the head, byte for byte, into a checkpoint that transformers loads.
    """
    if context.invoked_subcommand:
        refuse_given(context, context.params, f"belongs to a cut; give {context.invoked_subcommand} its own options, behind it")
        return
    if src is None and len(sys.argv) > 1:
        raise typer.BadParameter("give the parent with --src SRC", context)
    if src is None:
        typer.echo(context.get_help())
        return
    if (keep is None) == (layers is None):
        raise typer.BadParameter("give either --keep N or --layers LIST", context)
    if layers is not None:
        refuse_given(context, ["select", "protect"], "chooses for --keep; with --layers you choose")
    if select in RULES:
        refuse_given(context, ["protect"], f"is for rules that measure, and --select {select} does not")
    if compensate == "none" and (layers is not None or select in RULES):
        refuse_given(context, ["calibrate", "samples", "length", "seed", "load"], "is for rules that measure, and for --compensate")
    if recipe not in ("none", *PRESETS):
        raise DowncycleError(f"--recipe {recipe}: no such preset; choose one of {', '.join(PRESETS)}, or none")
    parent = open_checkpoint(src, revision, trust_remote_code=trust_remote_code)
    if layers is None:
        keep_what: int | list[int] = parse_count(keep or "", "--keep")
    else:
        keep_what, select = parse_layers(layers, parent.num_layers), "layers"
    if out is not None and not dry_run:
        with suppress(OSError):  # said below, with what would be written
            check_free(target_path(out), overwrite)  # before anything is measured
    measuring = Measuring(calibrate, samples, length, seed, protect, load, trust_remote_code=trust_remote_code)
    child, notes = choose_child(parent, keep_what, select, compensate, measuring, as_json)
    kept = child.lineage["layers"]
    target = child_name(parent, child) if out is None else out
    if recipe != "none":
        child = _add_recipe(context, child, target, recipe)
    child = add_card(child, target)
    plan = plan_write(child, size := parse_count(max_shard_size, "--max-shard-size"))
    summary = _summary(parent, child, kept, plan, target, notes)
    try:
        check_target(target_path(target), plan, overwrite)
    except DowncycleError as error:
        if not dry_run:
            raise
        summary["obstacle"] = str(error)
    if not as_json:
        _print_cut(parent, kept, summary, dry_run)
    if not dry_run:
        with progress_bar("writing", plan.write_bytes, as_json) as advance, say_staging(target):
            write(child, target, max_shard_size=size, overwrite=overwrite, progress=advance)
    if as_json:
        print_json(summary | {"written": not dry_run})
    elif not dry_run:
        typer.echo(target)


@app.command()
def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that downcycle wrote.")],
    src: Annotated[str | None, typer.Option(metavar="SRC", help="What it was made from [default: as downcycle.json says].")] = None,
    adapter: Annotated[str | None, typer.Option(metavar="ADAPTER", help="What was merged [default: as downcycle.json says].")] = None,
    trust_remote_code: Trust = False,
    as_json: Json = False,
) -> None:
    """Prove, byte for byte, that a folder holds exactly what it was made from: a parent's layers, or a model and an adapter."""
    total = open_checkpoint(folder, trust_remote_code=trust_remote_code).nbytes
    with progress_bar("comparing", total, as_json) as advance:
        proof = verify_folder(folder, src, adapter=adapter, trust_remote_code=trust_remote_code, progress=advance)
    if as_json:
        print_json({"verified": True, **vars(proof)})
    else:
        typer.echo(
            f"{folder} is {proof.what}: {proof.tensors} tensors, {format_bytes(proof.bytes)} and {proof.files} files compared, all equal"
        )


@app.command()
def merge(
    base: Annotated[str, typer.Argument(metavar="DIR", help="The model that the adapter was trained on: folder or Hub id.")],
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="LoRA or DoRA: folder, such as Axolotl's output_dir, or Hub id (USER/NAME@REVISION).")
    ],
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the merged model.")],
    revision: Revision = None,
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest safetensors file.")] = "5GB",
    trust_remote_code: Trust = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model.")] = False,
    as_json: Json = False,
) -> None:
    """Merge an adapter into its model, exactly: each weight W becomes W + BA, rounded once; all else is copied byte for byte."""
    from .surgery.adapter.merge import merge_adapter

    model = open_checkpoint(base, revision, trust_remote_code=trust_remote_code)
    merged = add_card(merge_adapter(model, adapter), out)
    plan = plan_write(merged, size := parse_count(max_shard_size, "--max-shard-size"))
    changed = sum(merged.tensors[name] is not tensor for name, tensor in model.tensors.items())
    with progress_bar("merging", plan.write_bytes, as_json) as advance, say_staging(out):
        write(merged, out, max_shard_size=size, overwrite=overwrite, progress=advance)
    if as_json:
        print_json({"out": out, "base": model.name, "adapter": adapter, "changed": changed, "tensors": len(merged.tensors)})
    else:
        if (named := merged.lineage["adapter_base"]) and Path(named).name != Path(model.name).name:
            typer.echo(f"note: the adapter says that it was trained on {named}; it fits {model.name}", err=True)
        typer.echo(f"{changed} of {len(merged.tensors)} tensors changed, the rest copied", err=True)
        typer.echo(out)


app.command()(recipe_commands.inspect)
app.command()(scoring.score)
app.command()(recipe_commands.recipe)
app.command()(recipe_commands.data)
app.command()(ternary_commands.ternarize)
app.command()(gguf_command.gguf)
app.command("eval")(eval_commands.eval_models)
app.command()(eval_commands.card)
app.command()(eval_commands.push)
app.command()(eval_commands.demo)


def _add_recipe(context: typer.Context, child: Checkpoint, target: str, preset: str) -> Checkpoint:
    """Put a recipe into the child; where there can be none, say why, and fail only if the user asked for it."""
    try:
        text = recipe_text(make_recipe(child, target, preset), str(Path(target) / PRESETS[preset].file))
    except DowncycleError as error:
        if was_given(context, "recipe"):
            raise
        typer.echo(f"no recipe: {printable(str(error))}", err=True)
        return child
    return replace(child, files={**child.files, PRESETS[preset].file: text.encode()})


def main() -> None:
    """Run the command line; end with 0, 1 (one line on stderr), 2 (usage) or 130 (Ctrl-C)."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # names of files can be any bytes
    try:
        app()
    except DowncycleError as error:
        sys.exit(_fail(str(error), 1))
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        sys.exit(_fail(f"{error.filename or 'reading or writing failed'}: {error.strerror or error}", 1))


def _fail(text: str, status: int) -> int:
    print(f"downcycle: {printable(text)}", file=sys.stderr)
    return status


def _summary(parent: Checkpoint, child: Checkpoint, kept: list[int], plan: Plan, target: str, notes: list[str]) -> dict[str, Any]:
    return {
        "parent": parent.name,
        "revision": parent.revision,
        "out": target,
        "layers": kept,
        "dropped": sorted(set(range(parent.num_layers)) - set(kept)),
        "parameters": {"parent": num_parameters(parent), "child": num_parameters(child)},
        "shards": {shard.name: shard.size for shard in plan.shards},
        "files": sorted(plan.files),
        "bytes": {"read": plan.read_bytes, "write": plan.write_bytes, "download": plan.download_bytes},
        "obstacle": None,
        "notes": notes,
    }


def _print_cut(parent: Checkpoint, kept: list[int], summary: dict[str, Any], dry_run: bool) -> None:
    before, after, size = summary["parameters"]["parent"], summary["parameters"]["child"], summary["bytes"]
    signs = "░█" if "utf" in (sys.stderr.encoding or "").lower() else ".#"
    lines = [
        f"{layer_map(parent.num_layers, kept, signs)}  keep {format_layers(kept)} of {parent.num_layers}",
        f"{before:,} parameters -> {after:,} ({after / before:.1%})",
        *(printable(note) for note in summary["notes"]),
    ]
    if dry_run:
        download = f", download {format_bytes(size['download'])}" if size["download"] else ""
        lines.append(f"would read {format_bytes(size['read'])}{download}, write {format_bytes(size['write'])} into {summary['out']}:")
        lines += [f"  {name}  {format_bytes(count)}" for name, count in summary["shards"].items()]
        lines.append(f"  {', '.join(summary['files'])}")
        lines += [f"but as things are it would be refused: {summary['obstacle']}"] if summary["obstacle"] else []
    elif named := [name for name in summary["files"] if name in RECIPES]:
        how = "" if named[0] == RECIPE else f" --preset {named[0].removeprefix('axolotl-').removesuffix('.yaml')}"
        what = f"with {named[0]}, which {'trains' if how else 'heals'} it"
        lines.append(f"{what}; for your GPUs: downcycle recipe {summary['out']}{how} --gpus N --gpu-memory GIB")
    for line in lines:
        typer.echo(line, err=not dry_run)

"""The commands of this folder: each parses, calls one function and prints."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from ..surgery.checkpoint import DEMO, DEMO_FOLDER, open_checkpoint
from ..surgery.describe import describe
from ..surgery.errors import DowncycleError
from ..surgery.staging import replace_file
from ..terminal import Json, Revision, Src, Trust, format_bytes, parse_count, print_json, printable, refuse_given, say_staging, stage_bar
from .dataset.source import FINEWEB, LLAMA
from .machine import PARALLEL, Machine
from .memory import format_gib, memory_table, model_size
from .presets import PRESETS, RECIPE

Gpus = Annotated[int | None, typer.Option(metavar="N", help="GPUs in each node; 0 is a CPU [default: as the preset was laid out].")]
Arch = Annotated[str, typer.Option("--gpu-arch", metavar="SM", help="Compute capability of the GPUs: sm_75, sm_80, sm_90, ...")]


def inspect(src: Src, revision: Revision = None, trust_remote_code: Trust = False, as_json: Json = False) -> None:
    """Show layers, parameters, bytes and dtypes of a checkpoint, from its headers alone."""
    checkpoint = open_checkpoint(src, revision, trust_remote_code=trust_remote_code)
    facts, memory = describe(checkpoint), memory_table(model_size(checkpoint))
    if as_json:
        print_json(facts | {"memory": memory})
        return
    sizes = facts["layer_elements"]
    dtypes = ", ".join(f"{dtype} {count:,}" for dtype, count in facts["dtypes"].items())
    rows = {
        "model": " ".join(filter(None, [facts["name"], facts["revision"]])),
        "family": f"{facts['model_type']} ({', '.join(facts['architectures']) or 'no architecture named'})",
        "layers": f"{facts['layers']} (0-{facts['layers'] - 1})" + "".join(f", {n} {kind}" for kind, n in facts["layer_kinds"].items()),
        "each layer": " to ".join(f"{count:,}" for count in sorted({min(sizes), max(sizes)})) + " parameters",
        "parameters": f"{facts['elements']:,}" + (f" (packed by {facts['quantization']})" if facts["quantization"] else ""),
        "size": f"{format_bytes(facts['bytes'])} in {facts['tensors']:,} tensors",
        "dtypes": dtypes,
        **_memory_rows(memory),
        "files": ", ".join(facts["files"]) or "none beside config and weights",
    }
    for title, text in rows.items():
        typer.echo(f"{title:<11} {printable(text)}")


def recipe(
    context: typer.Context,
    src: Annotated[str | None, typer.Argument(metavar="DIR", help="The model to train: a child's folder, or a Hub id.")] = None,
    preset: Annotated[str, typer.Option(metavar="NAME", help=f"How to train: {', '.join(PRESETS)}.")] = "qlora",
    dataset: Annotated[
        str | None, typer.Option(metavar="DATA", help="Folder of `downcycle data`, a file, or a Hub id [default: FineWeb].")
    ] = None,
    gpus: Gpus = None,
    gpu_memory: Annotated[float | None, typer.Option(metavar="GIB", help="Memory of each GPU, as it is sold: 24, 48, 80.")] = None,
    gpu_arch: Arch = "sm_80",
    nodes: Annotated[int, typer.Option(metavar="N", help="Machines with that many GPUs each.")] = 1,
    parallel: Annotated[str, typer.Option(metavar="WAY", help=f"How several GPUs share the work: {', '.join(PARALLEL)}.")] = "auto",
    ray: Annotated[bool, typer.Option("--ray", help="Launch through a Ray cluster.")] = False,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Sequences in one optimiser step, over all GPUs [default: 64; ternary 256].")
    ] = None,
    sets: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Set any Axolotl key; null takes it out. May repeat.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help=f"The file to write [default: {RECIPE} in DIR, axolotl-ternary.yaml for `ternary`; - is stdout]."
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a recipe that was changed by hand.")] = False,
    check: Annotated[Path | None, typer.Option(metavar="FILE", help="Check an Axolotl YAML, written by anyone, and write nothing.")] = None,
    as_json: Json = False,
) -> None:
    """Write the Axolotl recipe that heals a model or makes it ternary, or check one."""
    if check is not None:
        refuse_given(
            context,
            ["src", "preset", "dataset", "gpu_memory", "parallel", "ray", "batch", "sets", "out"],
            "makes a recipe, --check reads one",
        )
        _check(check, None if gpus is None else gpus * nodes, gpu_arch, as_json)
        return
    if src is None:
        raise typer.BadParameter("give the model's folder, or --check FILE", context)
    from .recipe import make_recipe
    from .recipe_text import recipe_text

    model = open_checkpoint(src)
    base_model = str(DEMO_FOLDER) if src == DEMO else src
    layout = PRESETS[preset].gpus if preset in PRESETS and gpus is None else gpus
    machine = Machine(1 if layout is None else layout, gpu_memory, nodes, gpu_arch)
    made = make_recipe(
        model,
        base_model,
        preset,
        dataset=dataset,
        machine=machine,
        parallel=parallel,
        ray=ray,
        batch=batch,
        overrides=parse_settings(sets or []),
    )
    if str(out) == "-":
        typer.echo(recipe_text(made, "FILE"), nl=False)
        return
    target = out or Path(src) / PRESETS[preset].file
    if out is None and not Path(src).is_dir():
        raise DowncycleError(f"{src}: not a folder on this machine; say with --out where the recipe goes")
    _write_recipe(target, recipe_text(made, str(target)), overwrite)
    if as_json:
        print_json({"recipe": str(target), "preset": preset, "config": made.config})
    else:
        typer.echo(target)


def data(
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to write: parquet files, a card and a report.")],
    tokens: Annotated[str, typer.Option(metavar="N", help="Training tokens, like 1B, by the tokenizer's count.")],
    src: Annotated[str, typer.Option(metavar="SRC", help="Folder of parquet files in FineWeb's schema, or a Hub data set.")] = FINEWEB,
    name: Annotated[str | None, typer.Option(metavar="PART", help="A dump (CC-MAIN-2024-10) or a sample (sample-10BT).")] = None,
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Whose tokenizer counts: the child's folder, or a Hub id.")] = LLAMA,
    language: Annotated[str | None, typer.Option(metavar="CODE", help="Only documents in this language, like en.")] = None,
    min_language_score: Annotated[float | None, typer.Option(metavar="P", help="Only documents whose language is as sure as this.")] = None,
    min_tokens: Annotated[int | None, typer.Option(metavar="N", help="Only documents of at least so many tokens (token_count).")] = None,
    max_tokens: Annotated[int | None, typer.Option(metavar="N", help="Only documents of at most so many tokens (token_count).")] = None,
    held_out: Annotated[float, typer.Option(metavar="SHARE", help="Share of the documents held out, on top of --tokens.")] = 0.001,
    workers: Annotated[int | None, typer.Option(metavar="N", help="Processes at once [default: the cores of this machine].")] = None,
    executor: Annotated[str, typer.Option(metavar="WHERE", help="local, slurm or ray: datatrove's executors.")] = "local",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a data set that downcycle made.")] = False,
    as_json: Json = False,
) -> None:
    """Take a slice of FineWeb with an exact number of tokens, to train on and to hold out."""
    from .dataset.make import Request, make_dataset

    count = parse_count(tokens, "--tokens")
    filters = {"language": language, "min_language_score": min_language_score, "min_tokens": min_tokens, "max_tokens": max_tokens}
    request = Request(count, src, name, tokenizer, held_out=held_out, **filters)  # type: ignore[arg-type]
    shown = 0
    with stage_bar(as_json) as say, say_staging(out):

        def show(documents: int, found: int) -> None:
            nonlocal shown
            if shown < count:  # the line that says that there is enough is the last
                say(f"reading: {documents:,} documents; tokens", min(found, count), count)
            shown = found

        report = make_dataset(out, request, workers=workers, executor=executor, overwrite=overwrite, progress=show)
    if as_json:
        print_json(report)
        return
    for split, held in report["splits"].items():
        typer.echo(f"{split:<5}  {held['tokens']:>15,} tokens  {held['documents']:>11,} documents", err=True)
    dropped = ", ".join(f"{count:,} {reason.replace('_', ' ')}" for reason, count in report["dropped"].items() if count)
    typer.echo(f"left out: {dropped or 'none'}", err=True)
    typer.echo(out)


def parse_settings(pairs: list[str]) -> dict[str, Any]:
    """Read KEY=VALUE pairs; values are YAML, and 2e-4 is a number as people mean it."""
    import yaml

    settings = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.strip():
            raise DowncycleError(f"--set {pair}: write KEY=VALUE, like learning_rate=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise DowncycleError(f"--set {pair}: the value is no YAML; quote it") from error
        settings[key.strip()] = _number(value)
    return settings


def _number(value: Any) -> Any:
    """YAML 1.1 takes 2e-4, which lacks a dot, for text."""
    return float(value) if isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value) else value


def _check(path: Path, gpus: int | None, arch: str, as_json: bool) -> None:
    from .validation.check import check_file

    found = check_file(path, gpus, arch)
    if as_json:
        print_json({"file": str(path), "faults": found.faults, "notes": found.notes})
    else:
        for line in [*found.faults, *(f"note: {note}" for note in found.notes)]:
            typer.echo(f"{path}: {line}", err=True)
    machine = f"{found.gpus} x {arch}" if found.gpus else "a CPU"
    if gpus is None and found.gpus > 1:
        machine += " (assumed, since the file asks for several; say otherwise with --gpus)"
    if found.faults:
        count = f"{len(found.faults)} fault{'s' if len(found.faults) > 1 else ''}"
        raise DowncycleError(f"{path}: {count} for {machine}; mend and check again")
    if not as_json:
        typer.echo(f"{path}: no fault found for {machine}" + ", by Axolotl's own validation among others" * found.by_axolotl)


def _write_recipe(path: Path, text: str, overwrite: bool) -> None:
    """Write a recipe whole or not at all; what a person changed is not replaced unasked."""
    from .recipe_text import is_untouched

    if path.exists() and not overwrite and not is_untouched(path.read_text(errors="replace")):
        raise DowncycleError(f"{path}: was changed by hand; give --overwrite to replace it, or --out for another file")
    if not path.parent.is_dir():
        raise DowncycleError(f"{path}: no such folder as {path.parent}; make it first")
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise DowncycleError(f"{path}: cannot be written: {error.strerror or error}") from error


def _memory_rows(memory: dict[str, Any]) -> dict[str, str]:
    """What running and training take, as lines; nothing where it is not known."""
    weights = [f"{dtype} {format_gib(count)}" for dtype, count in memory.get("weights", {}).items()]
    cache = [f"{format_gib(count)} at {tokens:,} tokens" for tokens, count in memory["kv_cache"].items()]
    training = [f"{method} {format_gib(count)}" for method, count in memory.get("training", {}).items()]
    rows = {
        "weights in": ", ".join(weights),
        "KV cache": ", ".join(cache) and f"bf16, {', '.join(cache)}",
        "to train": ", ".join(training) and f"{', '.join(training)} (about; 8,192 tokens at once, one GPU, LoRA of rank 128)",
    }
    return {title: text for title, text in rows.items() if text}

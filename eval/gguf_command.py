"""The command that writes GGUF files: parses, calls one function and prints."""

from __future__ import annotations

from typing import Annotated, get_args

import typer

from ..surgery.checkpoint import open_checkpoint
from ..surgery.errors import DowncycleError
from ..surgery.gguf.export import check_file, plan_gguf, write_gguf
from ..surgery.gguf.kinds import Kind
from ..surgery.staging import target_path
from ..terminal import Json, Revision, Src, format_bytes, print_json, printable, progress_bar

KINDS = get_args(Kind)
I2_S = "I2_S is experimental: only bitnet.cpp on x86 reads it, stock llama.cpp cannot; for that choose --type tq2_0"


def gguf(
    src: Src,
    out: Annotated[str, typer.Option(metavar="FILE", help="The file to write.")],
    kind: Annotated[str, typer.Option("--type", metavar="|".join(KINDS), help="Numbers of the matrices; tq* and i2_s are ternary.")],
    revision: Revision = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing GGUF file.")] = False,
    as_json: Json = False,
) -> None:
    """Write a model as one GGUF file, which llama.cpp runs: whole ones, cut ones, and ternary ones at 2 bits a weight."""
    if kind not in KINDS:
        raise DowncycleError(f"--type {kind}: no such type; choose one of {', '.join(KINDS)}")
    check_file(target_path(out), overwrite)  # before anything is read
    if kind == "i2_s":
        typer.echo(f"warning: {I2_S}", err=True)
    model = open_checkpoint(src, revision)
    plan = plan_gguf(model, kind)  # type: ignore[arg-type]
    with progress_bar("writing", plan.data_bytes, as_json) as advance:
        written = write_gguf(model, out, plan.kind, overwrite=overwrite, progress=advance, plan=plan)
    if as_json:
        facts = {"src": model.name, "out": str(written.path), "type": kind, "bytes": written.nbytes}
        print_json({**facts, "tensors": written.kinds, "notes": list(written.notes)})
        return
    for note in written.notes:
        typer.echo(printable(f"note: {note}"), err=True)
    typer.echo(f"{', '.join(f'{count} {name}' for name, count in written.kinds.items())} tensors, {format_bytes(written.nbytes)}", err=True)
    typer.echo(out)

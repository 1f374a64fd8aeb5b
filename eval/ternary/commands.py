"""`downcycle ternarize`: parses, packs, prints."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

from ...surgery.checkpoint import DEMO, Checkpoint, Span, open_checkpoint
from ...surgery.choose import RULES, choose, parse_layers
from ...surgery.layers import keep_layers
from ...surgery.plan import Plan, plan_write
from ...surgery.staging import target_path
from ...surgery.ternary.rule import Rule
from ...surgery.write import check_target, write
from ...terminal import (
    Json,
    Revision,
    Src,
    Trust,
    format_bytes,
    parse_count,
    print_json,
    printable,
    progress_bar,
    refuse_given,
    say_staging,
    stage_bar,
)
from ..commands import add_card, hush


def ternarize(
    context: typer.Context,
    src: Src,
    out: Annotated[str, typer.Option(metavar="DIR", help="Folder of the packed model.")],
    linear: Annotated[
        str, typer.Option(metavar="CLASS", help="Class of transformers that runs it: bitlinear or autobitlinear.")
    ] = "bitlinear",
    include: Annotated[
        list[str] | None, typer.Option(metavar="PATTERN", help="Maps that become ternary too: a regular expression; may repeat.")
    ] = None,
    exclude: Annotated[list[str] | None, typer.Option(metavar="PATTERN", help="Maps that stay as they are; may repeat.")] = None,
    keep: Annotated[str | None, typer.Option(metavar="N", help="Cut to so many layers first, in the same pass.")] = None,
    layers: Annotated[str | None, typer.Option(metavar="LIST", help="Cut to these layers first, like 0-19,28-31.")] = None,
    select: Annotated[str, typer.Option(metavar="RULE", help=f"How --keep chooses: {', '.join(RULES)}.")] = "first",
    text: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Measure the loss before and after on it: as `eval --text`, or 'demo', built in.")
    ] = None,
    dtype: Annotated[str, typer.Option(metavar="stored|bf16|f16", help="Of embeddings, head and all else that is not packed.")] = "stored",
    max_shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Largest safetensors file.")] = "5GB",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing model.")] = False,
    revision: Revision = None,
    trust_remote_code: Trust = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would be written, and read no weight.")] = False,
    as_json: Json = False,
) -> None:
    """Pack a model's weights as -1, 0 and 1, in 2 bits each (BitNet b1.58): stock transformers loads it. Train it with them first."""
    if keep is not None and layers is not None:
        raise typer.BadParameter("give either --keep N or --layers LIST, or neither", context)
    if keep is None:
        refuse_given(context, ["select"], "chooses for --keep")
    if dry_run:
        refuse_given(context, ["text"], "is measured on, and --dry-run reads no weight")
    hush()
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from ...surgery.ternary import ternarize as packing
    from .words import summary, warnings

    parent = open_checkpoint(src, revision, trust_remote_code=trust_remote_code)
    model = _cut(parent, keep, layers, select)
    rule = Rule(include or (), exclude or ()) if include or exclude else packing.rule_of(model)
    if include or exclude:
        packing.check_patterns(model, rule)
    tallies: dict[str, Any] = {}
    packed = add_card(packing.ternarize(model, linear=linear, rule=rule, dtype=dtype, tell=tallies.__setitem__), out)
    plan = plan_write(packed, size := parse_count(max_shard_size, "--max-shard-size"))
    check_target(target_path(out), plan, overwrite)
    notes = _cut_notes(parent, model, include, exclude)
    if dry_run:
        _print_plan(out, model, plan, packing.ternary_names(model, rule), [*notes, *warnings(model, rule, None, None)], as_json)
        return
    losses = _measure(model, packed, text, trust_remote_code, as_json) if text is not None else None
    _fetch(model, as_json)
    with progress_bar("packing", plan.write_bytes, as_json) as advance, say_staging(out):
        write(packed, out, max_shard_size=size, overwrite=overwrite, progress=advance)
    facts = _facts(model, open_checkpoint(out, trust_remote_code=True), tallies)
    total = facts.pop("total")
    notes += warnings(model, rule, total, losses)
    if as_json:
        measured = {"losses": losses and losses.facts(), "warnings": notes}
        print_json({"out": out, "source": model.name, "linear": linear, "rule": asdict(rule), **facts, **measured})
        return
    for line in (*summary(model.num_layers, facts["matrices"], total, (model.nbytes, packed.nbytes)), *(f"note: {one}" for one in notes)):
        typer.echo(printable(line), err=True)
    typer.echo(out)


def _cut(parent: Checkpoint, keep: str | None, layers: str | None, select: str) -> Checkpoint:
    if keep is not None:
        return keep_layers(parent, choose(parent.num_layers, parse_count(keep, "--keep"), select), select)
    return parent if layers is None else keep_layers(parent, parse_layers(layers, parent.num_layers))


def _cut_notes(parent: Checkpoint, model: Checkpoint, include: Sequence[str] | None, exclude: Sequence[str] | None) -> list[str]:
    """Say that a rule which numbers layers was made for those of the parent."""
    from ...surgery.ternary.record import read_record
    from .words import numbered

    record = read_record(parent.config, parent.name)
    if model is parent or record is None or include or exclude:
        return []
    named = numbered((*record.rule.include, *record.rule.exclude))
    return [f"the patterns that it was trained with may number layers ({', '.join(named)}), and the cut renumbers them"] if named else []


def _measure(model: Checkpoint, packed: Checkpoint, text: str, trust_remote_code: bool, quiet: bool) -> Any:
    from ..measure.text import read_documents
    from .losses import measure_losses

    documents = read_documents(None if text == DEMO else text)
    with stage_bar(quiet) as say:
        return measure_losses(model, packed, documents, trust_remote_code=trust_remote_code, progress=say)


def _fetch(model: Checkpoint, quiet: bool) -> None:
    """Put what lies on the Hub into the local cache first: a matrix is read twice, for its scale and for its codes."""
    from ..measure.loading import fetch

    spans = [data for tensor in model.tensors.values() for data in (tensor.data, *tensor.inputs) if isinstance(data, Span)]
    if any(span.source.local_path(span.path) is None for span in spans):
        with stage_bar(quiet) as say:
            say(f"fetching {model.name}", 0, 0)
            fetch(model)


def _facts(model: Checkpoint, packed: Checkpoint, tallies: dict[str, Any]) -> dict[str, Any]:
    """Put together what became of the weights; what an earlier run that was stopped had packed is counted from the files."""
    from ...surgery.ternary.tally import add_up, by_layer, tally_packed
    from ...surgery.weights import num_parameters, ternary_matrices
    from .layers import summed

    found = tallies if tallies.keys() >= (names := ternary_matrices(packed)).keys() else tally_packed(packed, model)
    total = add_up(found[name] for name in names)
    return {
        "total": total,
        "matrices": len(names),
        "parameters": num_parameters(packed),
        "bytes": {"before": model.nbytes, "after": packed.nbytes},
        "weights": asdict(summed(None, total)) | {"bits": 8 * total.after / total.weights},
        "layers": [asdict(summed(layer, tally)) for layer, tally in by_layer(packed, {name: found[name] for name in names}).items()],
    }


def _print_plan(out: str, model: Checkpoint, plan: Plan, names: Sequence[str], notes: list[str], as_json: bool) -> None:
    """Say what would be written."""
    if as_json:
        shards = {shard.name: shard.size for shard in plan.shards}
        sizes = {"read": plan.read_bytes, "write": plan.write_bytes, "download": plan.download_bytes}
        print_json({"out": out, "source": model.name, "matrices": len(names), "shards": shards, "bytes": sizes, "warnings": notes})
        return
    lines = [f"{len(names)} matrices of {model.num_layers} layers would become ternary: {format_bytes(model.nbytes)} of weights"]
    lines.append(f"would write {format_bytes(plan.write_bytes)} into {out}: {', '.join([*(one.name for one in plan.shards), *plan.files])}")
    for line in (*lines, *(f"note: {one}" for one in notes)):
        typer.echo(printable(line))

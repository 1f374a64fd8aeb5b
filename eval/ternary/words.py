"""What packing did to a model, in lines: how many weights, how small, how far off, and whether the model learnt to live with it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...surgery.checkpoint import Checkpoint
from ...surgery.lineage import CUT
from ...surgery.ternary.record import Record, read_record
from ...surgery.ternary.rule import Rule
from ...surgery.ternary.tally import Tally
from ...surgery.ternary.ternarize import ternary_names
from ...terminal import format_bytes
from .losses import Losses

LISTED = 3  # names of matrices in a line
CLOSE = 0.05  # nats per token from guessing, where a model knows nothing


def summary(layers: int, matrices: int, tally: Tally, sizes: tuple[int, int]) -> list[str]:
    """Say what was packed. sizes: of the whole model before and after, in bytes."""
    minus, zero, plus = tally.shares
    error = "" if tally.error is None else f"; |W - sT| / |W| = {tally.error:.1%}"
    before = "" if tally.before is None else f"{format_bytes(tally.before)} -> "
    return [
        f"{matrices} matrices of {layers} layers, {tally.weights:,} weights: {before}{format_bytes(tally.after)}, "
        f"{8 * tally.after / tally.weights:.2f} bits a weight; the model: {format_bytes(sizes[0])} -> {format_bytes(sizes[1])}",
        f"-1: {minus:.1%}, 0: {zero:.1%}, 1: {plus:.1%}{error}",
    ]


def warnings(model: Checkpoint, rule: Rule, tally: Tally | None, losses: Losses | None) -> list[str]:
    """Say what a user must know before using the packed model: never trained, or not to the end, or with other maps than are packed.

    rule: by which the maps were taken. tally: of all of them; None where nothing was packed.
    """
    record = read_record(model.config, model.name)
    changed = "" if tally is None or tally.error is None else f": rounding changed its weights by {tally.error:.1%}"
    train = f"train it first: downcycle recipe {model.name} --preset ternary"
    lines = []
    if record is None and (tally is None or tally.error != 0):  # else its weights were ternary already
        use = " and the packed model is of no use but for comparing"
        lines.append(f"{model.name} was never trained with ternary weights, as far as its config.json says{changed},{use}; {train}")
    elif record and not record.whole:
        reached = f"lambda reached {record.strength:.6g} of 1"
        lines.append(
            f"{model.name} was not trained with ternary weights to the end ({reached}){changed}, and the packed model is worse than what "
            "was measured while it trained; train on until lambda is 1"
        )
    if record and model.lineage and model.lineage.get("operation", CUT) == CUT:  # what training saves has no lineage
        lines.append(f"{model.name} was cut after its training with ternary weights, and not trained since: expect worse than was measured")
    if record:
        lines += _other_maps(model, record.rule, rule)
    return lines + ([loss_words(losses, record)] if losses else [])


def loss_words(losses: Losses, record: Record | None) -> str:
    """Say what was measured before and after, which is which, and what follows."""
    after = f"after packing {losses.after.loss:.4f} +-{losses.after.stderr:.4f}"
    unit = f"nats per token on {losses.after.text} (guessing: {losses.guessing:.2f})"
    if losses.before is None:
        return f"loss: {after} {unit}; before it cannot be measured: its maps have norms of their own, which transformers runs packed only"
    before = f"before {losses.before.loss:.4f}"
    if record is not None:
        before += " (float weights, with which it was not trained in the end)" if record.whole else " (float weights)"
    if losses.after.loss > losses.guessing - CLOSE:
        follows = "the packed model knows nothing of the text"
    elif record is not None and record.whole:
        follows = "the second is the model that was trained"
    else:
        follows = f"packing costs {losses.cost:+.4f}"
    return f"loss: {before}, {after} {unit}: {follows}"


def _other_maps(model: Checkpoint, trained: Rule, taken: Rule) -> list[str]:
    """Say which maps are packed and did not learn it, and which learnt it and are not packed."""
    learnt, packed = ternary_names(model, trained), ternary_names(model, taken)
    lines = []
    if new := [name for name in packed if name not in learnt]:
        lines.append(f"{_names(new)} become ternary, and {model.name} was not trained so: these weights are only rounded")
    if left := [name for name in learnt if name not in packed]:
        lines.append(f"{_names(left)} learnt ternary weights and stay floating-point: {model.name} was not trained so")
    return lines


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return f"{', '.join(names[:LISTED])}{more}"


def numbered(patterns: Iterable[str]) -> list[str]:
    """Return the patterns that may name layers by number, which a cut moves."""
    return [pattern for pattern in patterns if any(sign.isdigit() for sign in pattern)]

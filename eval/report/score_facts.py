"""What follows from scores of layers, for the picture, the page and the terminal alike. Measures nothing, draws nothing.

A way is how a rule's layers are used: `cut`, as they are, or the method that compensates for the dropped ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

from ...surgery.checkpoint import DEMO
from ...surgery.choose import RULES, format_layers
from ...surgery.errors import DowncycleError
from ...surgery.importance.calibration import LENGTH, SAMPLES, SEED
from ...surgery.importance.scores import Choice, Importance, Loss, Scores
from ..measure.text import BUILT_IN_TRAINING

CUT = "cut"
SPANS = 30.0  # a largest value that is so many times the smallest is shown on a log scale


class Block(NamedTuple):
    """Neighbouring layers: the first of them, how many, and the angular distance from what enters to what leaves them."""

    begin: int
    length: int
    distance: float


def check_finite_scores(scores: Scores) -> Scores:
    """Return scores that hold finite numbers only.

    Raises:
        DowncycleError: something that was measured is none.
    """
    for where, value in _numbers(asdict(scores), ""):
        if not math.isfinite(value):
            raise DowncycleError(f"{scores.model}: scores{where} is {value}, no finite number; measure again")
    return scores


def ways_of(scores: Scores) -> list[str]:
    """Return `cut` and every method that was tried or refused for any rule, in the order in which they come."""
    methods = [method for one in scores.choices for part in (one.compensated, one.kept_plain, one.refused) for method in part]
    return [CUT, *sorted(dict.fromkeys(methods), key=lambda method: ({"scale": 0, "refit": 1}.get(method, 2), methods.index(method)))]


def losses_of(choice: Choice) -> dict[str, Loss]:
    """Return the loss of each way that was measured, the plain cut first."""
    return {CUT: choice.cut, **choice.compensated}


def best_way(choice: Choice) -> str:
    """Return the way that loses least; where a method gains nothing, the plain cut."""
    losses = losses_of(choice)
    return min(losses, key=lambda way: losses[way].loss)


def best_choice(scores: Scores) -> Choice | None:
    """Return the rule that loses least, each in its best way; None without any."""
    return min(scores.choices, key=lambda choice: losses_of(choice)[best_way(choice)].loss, default=None)


def best_cut(scores: Scores) -> Choice | None:
    """Return the rule whose plain cut loses least; None without any."""
    return min(scores.choices, key=lambda choice: choice.cut.loss, default=None)


def won_back(choice: Choice, way: str, uncut: Loss) -> float | None:
    """Return the share of the loss which the cut adds that a method takes away again; None where the cut adds none."""
    added = choice.cut.loss - uncut.loss
    return (choice.cut.loss - losses_of(choice)[way].loss) / added if way != CUT and added > 0 else None


def asked_block(scores: Scores) -> Block | None:
    """Return the block of as many layers as are to be dropped that turns states least: the one that the rule `angular` drops, if it chose.

    Else the least of those without a protected layer, or of all; of equal ones the last. None where no layer is to be dropped, or nothing
    was measured of such blocks.
    """
    length = scores.layers - scores.keep
    if not 1 <= length <= len(scores.angular):
        return None
    row = scores.angular[length - 1]
    for choice in scores.choices:
        dropped = sorted(set(range(scores.layers)) - set(choice.kept))
        if choice.rule == "angular" and len(dropped) == length == dropped[-1] - dropped[0] + 1 and dropped[0] < len(row):
            return Block(dropped[0], length, row[dropped[0]])
    free = [i for i in range(len(row)) if not any(i <= layer < i + length for layer in scores.protect or ())] or range(len(row))
    return min((Block(i, length, row[i]) for i in free), key=lambda block: (block.distance, -block.begin), default=None)


def least_important(importance: Importance, count: int) -> list[int]:
    """Return the layers that matter least, the least first, and of equal ones the last; those without a score are not among them."""
    known = [(score, -layer) for layer, score in enumerate(importance.scores) if score is not None]
    return [-layer for _, layer in sorted(known)[:count]]


def scale_of(importance: Importance) -> tuple[str, float]:
    """Return which axis shows the scores, and below which size one of them counts as linear (0: nowhere).

    `linear`, or `log` where they span more than SPANS times, or `symlog` where some of those are not above 0.
    """
    known = [score for score in importance.scores if score is not None]
    sizes = sorted(abs(score) for score in known if score)
    if not sizes or sizes[-1] <= SPANS * (min(known) if min(known) > 0 else sizes[len(sizes) // 2]):
        return "linear", 0.0
    return ("log", 0.0) if min(known) > 0 else ("symlog", sizes[len(sizes) // 2])


def heights(importance: Importance) -> list[float | None]:
    """Return the scores on the scale that shows them, from 0, the least, to 1, the most."""
    kind, linear = scale_of(importance)

    def place(score: float) -> float:
        if kind == "linear":
            return score
        return math.log(score) if kind == "log" else math.asinh(score / linear)

    known = [place(score) for score in importance.scores if score is not None]
    low, high = min(known, default=0.0), max(known, default=0.0)
    span = high - low or 1.0
    return [None if score is None else (place(score) - low) / span for score in importance.scores]


def cut_command(scores: Scores, choice: Choice, way: str = CUT) -> list[str]:
    """Return the words of the command that makes a rule's child, on the samples that were measured on."""
    words = ["downcycle", "--src", scores.model, *(["--revision", scores.revision] if scores.revision else [])]
    words += ["--keep", str(scores.keep), "--select", choice.rule]
    if (measured := choice.rule not in RULES) or way != CUT:
        words += _calibration_words(scores.calibration)
        words += [] if scores.load == "stored" else ["--load", scores.load]
    words += ["--protect", format_layers(list(scores.protect)) or "none"] if measured and scores.protect is not None else []
    return words + ([] if way == CUT else ["--compensate", way])


def _calibration_words(calibration: Mapping[str, Any]) -> list[str]:
    text = calibration.get("text", "TEXT")
    words = ["--calibrate", DEMO if text == BUILT_IN_TRAINING else str(text)]
    for name, default in (("samples", SAMPLES), ("length", LENGTH), ("seed", SEED)):
        words += [f"--{name}", str(calibration[name])] if calibration.get(name, default) != default else []
    return words


def kept_words(choice: Choice) -> str:
    """Write the kept layers in ranges, so that a line can be broken between them."""
    return format_layers(list(choice.kept)).replace(",", ", ")


def setting_words(scores: Scores) -> str:
    """Say on what was measured, and how."""
    samples, length, text = (scores.calibration.get(name) for name in ("samples", "length", "text"))
    said = f"{text}, {samples:,} samples of {length:,} tokens" if samples and length else f"{text or ''}"
    return f"{said}; {load_words(scores)}"


def load_words(scores: Scores) -> str:
    """Say in which dtype and on which device the model was run."""
    return f"weights {'as stored' if scores.load == 'stored' else f'in {scores.load}'}, on {scores.device}"


def _numbers(value: Any, where: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield where, value
    elif isinstance(value, Mapping):
        for name, part in value.items():
            yield from _numbers(part, f"{where}.{name}")
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for place, part in enumerate(value):
            yield from _numbers(part, f"{where}[{place}]")

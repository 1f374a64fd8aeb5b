"""What was measured of a model's layers: importance by each metric, the choice of each rule, losses. Plain data, and its JSON form.

Layers are numbered from 0 in the model that was scored; losses are nats per token on held-out samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

FORMAT = 1  # of scores.json


@dataclass(frozen=True)
class Importance:
    """How much each layer matters by one metric: a larger number matters more. scores: None where the metric says nothing of a layer."""

    metric: str
    unit: str
    scores: tuple[float | None, ...]


@dataclass(frozen=True)
class Loss:
    """A held-out loss, and its clustered standard error. added_stderr: that of its difference to the uncut model's, on the same tokens,
    which is much smaller; 0 for the uncut model itself."""

    loss: float
    stderr: float
    added_stderr: float = 0.0


@dataclass(frozen=True)
class Choice:
    """The layers that a rule keeps, and what the cut loses. compensated: by method; what no method can do stands in `refused`, with why.

    kept_plain: methods whose weights did not help, so that the plain ones are kept, with why.
    """

    rule: str
    kept: tuple[int, ...]
    cut: Loss
    compensated: Mapping[str, Loss] = field(default_factory=dict)
    kept_plain: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Work:
    """What measuring took. passes: over all weights. layer_loads: how often one layer's weights were read.

    layer_forwards: a layer run once over the calibration samples, on one path. naive_*: rerunning the whole model for every candidate.
    """

    what: str
    passes: int
    layer_loads: int
    layer_forwards: int
    naive_loads: int
    naive_forwards: int


@dataclass(frozen=True)
class Scores:
    """Everything that `downcycle score` measured. calibration: text, digests, samples, length, seed and tokens, to make it again.

    protect: layers that had to stay; None: those of each rule. angular: the triangle d(i, n), row n - 1 for blocks of n layers, entry i for
    the block that begins at layer i. refused: metrics and rules that this model cannot have, with why.
    """

    model: str
    revision: str | None
    content: str
    layers: int
    keep: int
    protect: tuple[int, ...] | None
    load: str
    device: str
    calibration: Mapping[str, Any]
    uncut: Loss
    importance: tuple[Importance, ...]
    angular: tuple[tuple[float, ...], ...]
    choices: tuple[Choice, ...]
    work: tuple[Work, ...]
    refused: Mapping[str, str]
    machine: str
    versions: Mapping[str, str]


def scores_json(scores: Scores) -> dict[str, Any]:
    """Return scores as JSON can hold them."""
    return {"format": FORMAT, **asdict(scores)}


def parse_scores(value: Mapping[str, Any]) -> Scores:
    """Read what `scores_json` wrote.

    Raises:
        ValueError, KeyError, TypeError: it is something else.
    """
    if value["format"] != FORMAT:
        raise ValueError(f"format {value['format']!r}")
    plain = {name: part for name, part in value.items() if name != "format"}
    return Scores(**plain | {
        "protect": None if value["protect"] is None else tuple(value["protect"]),
        "uncut": Loss(**value["uncut"]),
        "importance": tuple(Importance(one["metric"], one["unit"], tuple(one["scores"])) for one in value["importance"]),
        "angular": tuple(tuple(row) for row in value["angular"]),
        "choices": tuple(_choice(one) for one in value["choices"]),
        "work": tuple(Work(**one) for one in value["work"]),
    })  # fmt: skip


def _choice(value: Mapping[str, Any]) -> Choice:
    compensated = {method: Loss(**loss) for method, loss in value["compensated"].items()}
    return Choice(**{**value, "kept": tuple(value["kept"]), "cut": Loss(**value["cut"]), "compensated": compensated})

"""What was measured of models, as values and as results.json. Measures nothing, draws nothing, and needs no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..surgery.errors import DowncycleError
from ..surgery.staging import replace_file

RESULTS = "results.json"
FORMAT = 1  # of results.json; changes when a reader of the old one would be misled


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts a text.

    loss: nats per scored token. stderr: its standard error. bits_per_byte: the same information for each byte of UTF-8, which models
    with different tokenizers can be compared by. text: the text's name; digest: SHA-256 of its documents.
    tokens, bytes: that were scored; documents: how many. length: of a window, in tokens; stride: from one window to the next.
    """

    text: str
    digest: str
    loss: float
    stderr: float
    perplexity: float
    bits_per_byte: float
    tokens: int
    bytes: int
    documents: int
    length: int
    stride: int


@dataclass(frozen=True)
class Score:
    """One metric of one benchmark. task: lm-eval's name of it; version: of its definition.

    value: as lm-eval gives it (0-1 for accuracies); stderr: None where lm-eval gives none. shots: None where its parts differ.
    chance: what guessing gives, where known. group: the suite it was run as a part of (`openllm`), or the task's own name.
    """

    task: str
    title: str
    metric: str
    value: float
    stderr: float | None
    shots: int | None
    examples: int
    limit: int | None
    version: str
    higher_is_better: bool = True
    chance: float | None = None
    group: str = ""


@dataclass(frozen=True)
class Speed:
    """How fast a model runs, and in how much memory. Rates are medians, in tokens per second for the batch of one sequence.

    prompt: tokens of the prefill; generated: tokens decoded after it. peak_bytes: memory above what the process held before loading.
    """

    prompt: int
    generated: int
    prefill_rate: float
    decode_rate: float
    peak_bytes: int
    runs: int


@dataclass(frozen=True)
class Logged:
    """One entry of a trainer's log: losses in nats per token."""

    step: int
    epoch: float
    loss: float | None = None
    eval_loss: float | None = None


@dataclass(frozen=True)
class LayerWeights:
    """The ternary weights of one decoder layer; layer: its number, None for all that is in none.

    minus, zero, plus: how many are -1, 0 and 1. after: bytes of codes and scales. Where W, the weights that were rounded, is at hand:
    before: its bytes; error: |W - sT| / |W|; norm: |W|.
    """

    layer: int | None
    minus: int
    zero: int
    plus: int
    after: int
    before: int | None = None
    error: float | None = None
    norm: float | None = None

    @property
    def weights(self) -> int:
        """How many there are."""
        return self.minus + self.zero + self.plus


@dataclass(frozen=True)
class ModelResult:
    """What is known and was measured of one model.

    role: parent, cut, healed, ternary, or model, where nothing says what it was made from. content: SHA-256 of all that it computes with.
    layers: its own decoder layers; kept: those of the first parent (numbers from 0) that they came from, of `depth` in all.
    nbytes: of its tensors. load: dtype that it was measured in. training: of the run that healed it. ternary: its packed ternary weights.
    """

    name: str
    content: str
    role: str
    layers: int
    parameters: int
    nbytes: int
    load: str
    device: str
    revision: str | None = None
    depth: int | None = None
    kept: tuple[int, ...] | None = None
    perplexity: tuple[Perplexity, ...] = ()
    scores: tuple[Score, ...] = ()
    speed: Speed | None = None
    training: tuple[Logged, ...] = ()
    ternary: tuple[LayerWeights, ...] = ()


@dataclass(frozen=True)
class Results:
    """Models measured side by side; the first is what the others are compared with. machine: in words. versions: of packages.

    limit: how many examples of each benchmark and documents of each text were taken at most; None: all.
    """

    models: tuple[ModelResult, ...]
    machine: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    created: str = ""
    limit: int | None = None

    @property
    def baseline(self) -> ModelResult:
        """The model that the others are compared with."""
        return self.models[0]


def all_layers(layers: Sequence[LayerWeights]) -> LayerWeights:
    """Add layers up; at least one."""
    minus, zero, plus, after = (sum(getattr(one, name) for one in layers) for name in ("minus", "zero", "plus", "after"))
    known = [(one.before, one.error, one.norm) for one in layers]
    if any(None in one for one in known):
        return LayerWeights(None, minus, zero, plus, after)
    norm = math.hypot(*(one[2] or 0 for one in known))
    lost = math.hypot(*((one[1] or 0) * (one[2] or 0) for one in known))
    return LayerWeights(None, minus, zero, plus, after, sum(one[0] or 0 for one in known), lost / norm if norm else 0.0, norm)


def retained(value: float, baseline: float, higher_is_better: bool = True) -> float | None:
    """Return the share of the baseline's score that is left (1: all of it); None where the baseline has none."""
    if not baseline or not value:
        return None if not baseline else 0.0
    return value / baseline if higher_is_better else baseline / value


def results_json(results: Results) -> str:
    """Spell results.json."""
    return json.dumps({"format": FORMAT, **asdict(results)}, indent=1) + "\n"


def write_results(results: Results, path: Path) -> None:
    """Write results.json, whole or not at all."""
    replace_file(path, results_json(results).encode())


def read_results(path: Path) -> Results:
    """Read results.json.

    Raises:
        DowncycleError: not there, damaged, or of another format.
    """
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise DowncycleError(f"{path}: {error.strerror}; make it with `downcycle eval MODEL... --report DIR`") from error
    except (ValueError, RecursionError) as error:
        raise DowncycleError(f"{path}: not valid JSON ({str(error)[:80]}); run `downcycle eval` again") from error
    try:
        return parse_results(value)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DowncycleError(f"{path}: not what this version of `downcycle eval` writes ({str(error)[:80]}); run it again") from error


def parse_results(value: Mapping[str, Any]) -> Results:
    """Make the value of what `json` read."""
    if value["format"] != FORMAT or not value["models"]:
        raise ValueError(f"format {value['format']!r}")
    return Results(tuple(map(_model, value["models"])), value["machine"], value["versions"], value["created"], value["limit"])


def _model(value: Mapping[str, Any]) -> ModelResult:
    parts = {
        "perplexity": tuple(Perplexity(**one) for one in value["perplexity"]),
        "scores": tuple(Score(**one) for one in value["scores"]),
        "speed": value["speed"] and Speed(**value["speed"]),
        "training": tuple(Logged(**one) for one in value["training"]),
        "ternary": tuple(LayerWeights(**one) for one in value.get("ternary", ())),  # earlier releases wrote none
        "kept": None if value["kept"] is None else tuple(value["kept"]),
    }
    return ModelResult(**{**value, **parts})


def find_model(results: Results, content: str, path: Path) -> ModelResult:
    """Return a model's own part of the results; refuse the results of others."""
    for model in results.models:
        if model.content == content:
            return model
    names = ", ".join(model.name for model in results.models)
    raise DowncycleError(f"{path}: holds results of {names}, and not of these weights; run `downcycle eval` with this model")

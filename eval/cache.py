"""Measurements kept by what was measured: the model's content and everything else that decides the number.

Knows keys and JSON; measures nothing.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from .content import cache_folder
from .results import ModelResult, Results, parse_results, results_json

LATEST = "latest.json"


def key_of(*parts: Any) -> str:
    """Return a name for a measurement, from all that decides it beside the model."""
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def recall(content: str, key: str) -> Any:
    """Return what was measured of a model under a key; None where nothing was."""
    with suppress(OSError, ValueError):
        return json.loads((_folder(content) / f"{key}.json").read_text())
    return None


def keep(content: str, key: str, value: Any) -> None:
    """Keep a measurement. Where the cache cannot be written, nothing is kept, and it is measured again."""
    _write(_folder(content) / f"{key}.json", json.dumps(value))


def keep_results(results: Results) -> None:
    """Keep a comparison for each of its models, so that the card finds it; what an earlier one of the same models holds more is kept."""
    for model in results.models:
        before = latest_results(model.content)
        same = before and {one.content for one in before.models} == {one.content for one in results.models}
        known = replace(results, models=tuple(_unite(before.models, one) for one in results.models)) if before and same else results
        _write(_folder(model.content) / LATEST, results_json(known))


def latest_results(content: str) -> Results | None:
    """Return the last comparison that a model was in."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return parse_results(json.loads((_folder(content) / LATEST).read_text()))
    return None


def _unite(before: Iterable[ModelResult], model: ModelResult) -> ModelResult:
    """Add to a model what an earlier comparison, in the same dtype, measured of it and this one did not."""
    old = next(one for one in before if one.content == model.content)
    if (old.load, old.device) != (model.load, model.device):
        return model
    texts = {(one.digest, one.length, one.stride) for one in model.perplexity}
    scores = {(one.task, one.metric, one.shots, one.limit) for one in model.scores}
    return replace(
        model,
        perplexity=(*model.perplexity, *(one for one in old.perplexity if (one.digest, one.length, one.stride) not in texts)),
        scores=(*model.scores, *(one for one in old.scores if (one.task, one.metric, one.shots, one.limit) not in scores)),
        speed=model.speed or old.speed,
    )


def _folder(content: str) -> Path:
    return cache_folder() / "eval" / content


def _write(path: Path, text: str) -> None:
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        staged = path.with_name(f".{path.name}.{os.getpid()}")
        staged.write_text(text)
        staged.replace(path)

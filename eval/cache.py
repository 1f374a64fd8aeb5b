"""Measurements kept by what was measured: the model's content and everything else that decides the number.

Knows keys and JSON; measures nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..surgery.staging import replace_file
from .content import cache_folder
from .results import FORMAT, ModelResult, Results, parse_results, results_json

COMPARED = "compared-"  # begins the names of comparisons


def key_of(*parts: Any) -> str:
    """Return a name for a measurement, from all that decides it beside the model."""
    return sha256(json.dumps([FORMAT, *parts], sort_keys=True).encode()).hexdigest()[:32]


def recall(content: str, key: str) -> Any:
    """Return what was measured of a model under a key; None where nothing was."""
    with suppress(OSError, ValueError):
        return json.loads((_folder(content) / f"{key}.json").read_text())
    return None


def keep(content: str, key: str, value: Any) -> bool:
    """Keep a measurement; return whether it was: where the cache cannot be written, it is measured again next time."""
    return _write(_folder(content) / f"{key}.json", json.dumps(value))


def keep_results(results: Results) -> None:
    """Keep a comparison for each of its models, so that the card finds it.

    One of the same models, loaded alike and as thorough, takes up what an earlier one held more; others stand apart.
    """
    alike = [(one.content, one.load, one.device) for one in results.models]
    name = f"{COMPARED}{key_of(sorted(alike), results.limit)}.json"
    for model in results.models:
        path = _folder(model.content) / name
        before = _read(path)
        known = replace(results, models=tuple(_unite(before.models, one) for one in results.models)) if before else results
        _write(path, results_json(known))


def best_results(content: str) -> Results | None:
    """Return the comparison that says most of a model: all examples rather than the first, weights as they are rather than quantised
    for it, more models rather than fewer, benchmarks rather than none, and of equal ones the last."""
    paths = sorted(_folder(content).glob(f"{COMPARED}*.json"), key=lambda path: path.stat().st_mtime)
    known = [found for path in paths if (found := _read(path))]
    return max(reversed(known), key=_worth, default=None)


def _worth(results: Results) -> tuple[bool, bool, int, int]:
    plain = all(one.load not in ("int8", "nf4") for one in results.models)
    return results.limit is None, plain, len(results.models), sum(len(one.scores) for one in results.models)


def _read(path: Path) -> Results | None:
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return parse_results(json.loads(path.read_text()))
    return None


def _unite(before: Iterable[ModelResult], model: ModelResult) -> ModelResult:
    """Add to a model what an earlier comparison measured of it and this one did not."""
    old = next(one for one in before if one.content == model.content)
    texts = {(one.digest, one.length, one.stride) for one in model.perplexity}
    scores = {(one.task, one.metric, one.shots, one.limit) for one in model.scores}
    return replace(
        model,
        perplexity=(*model.perplexity, *(one for one in old.perplexity if (one.digest, one.length, one.stride) not in texts)),
        scores=(*model.scores, *(one for one in old.scores if (one.task, one.metric, one.shots, one.limit) not in scores)),
    )


def _folder(content: str) -> Path:
    return cache_folder() / "eval" / content


def _write(path: Path, text: str) -> bool:
    with suppress(OSError):
        replace_file(path, text.encode())
        return True
    return False

"""lm-eval's answer read as scores. Runs nothing."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from ...surgery.errors import DowncycleError
from ..results import Score
from .tasks import Task

Answer = Mapping[str, Any]  # what lm_eval.simple_evaluate returns
GUESSED = ("acc", "acc_norm")


def read_scores(answer: Answer, task: Task, limit: int | None) -> list[Score]:
    """Return a benchmark's metrics: of a group its own, where it has any, else those of its parts.

    Raises:
        DowncycleError: none of them is a number.
    """
    children = {child for names in answer["group_subtasks"].values() for child in names}
    roots = [name for name in answer["group_subtasks"] if name not in children]
    scores = [score for root in roots for name in _reported(answer, root) for score in _scores(answer, name, task, limit)]
    if not scores:
        raise DowncycleError(f"--tasks {task.name}: lm-eval gave no number for {task.metric or 'any of its metrics'}")
    return scores


def _reported(answer: Answer, name: str) -> list[str]:
    """Return the names that have metrics, from the top: a group that does not sum up its parts has none."""
    if _metrics(answer, name):
        return [name]
    return [found for child in answer["group_subtasks"].get(name, ()) for found in _reported(answer, child)]


def _metrics(answer: Answer, name: str) -> dict[str, float]:
    """A task's finite metrics, as "METRIC,FILTER"."""
    row = answer["results"].get(name, {})
    numbers = {key: value for key, value in row.items() if "," in key and "_stderr," not in key and isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def _scores(answer: Answer, name: str, task: Task, limit: int | None) -> Iterator[Score]:
    parts = list(_leaves(answer, name))
    shots = sorted({answer["n-shot"][part] for part in parts})
    for key, value in _metrics(answer, name).items():
        if task.metric in (None, key):
            metric, _, chosen = key.partition(",")
            better = answer["higher_is_better"].get(name, {}).get(metric)
            yield Score(
                task=name,
                title=task.title if name == task.name else name,
                metric=metric if chosen == "none" else key,
                value=value,
                stderr=_stderr(answer["results"][name].get(f"{metric}_stderr,{chosen}")),
                shots=shots[0] if len(shots) == 1 else None,
                examples=sum(answer["n-samples"][part]["effective"] for part in parts),
                limit=limit,
                version=str(answer["versions"].get(name) or ""),
                higher_is_better=better is not False,
                chance=_chance(answer, parts) if metric in GUESSED else None,
                group=task.suite or task.name,
            )


def _leaves(answer: Answer, name: str) -> Iterator[str]:
    """The tasks of a group, or the task itself."""
    if name in answer["n-samples"]:
        yield name
    else:
        for child in answer["group_subtasks"].get(name, ()):
            yield from _leaves(answer, child)


def _stderr(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _chance(answer: Answer, parts: list[str]) -> float | None:
    """Return the accuracy of guessing: the mean of 1 / choices; None where a part is scored in another way."""
    shares = []
    for part in parts:
        config = answer["configs"][part]
        metrics = [metric.get("metric") for metric in config.get("metric_list") or ()]
        if config.get("output_type") != "multiple_choice" or "process_results" in config or "acc_mutual_info" in metrics:
            return None
        for sample in answer["samples"][part]:
            if isinstance(sample["target"], list):
                return None
            shares.append(1 / len(sample["arguments"]))
    return sum(shares) / len(shares)

"""Run a benchmark on a loaded model by lm-eval, as `lm_eval.simple_evaluate` does, and return its scores."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError
from ..content import cache_folder
from ..results import Score
from .harness import lm_eval_version, quiet, require_lm_eval
from .indexing import find_task
from .responses import open_responses
from .scores import read_scores
from .tasks import Task

if TYPE_CHECKING:
    from ..measure.loading import Loaded

CPU_BATCH = 8  # requests at once, sorted by length; on a GPU lm-eval finds the largest number that fits
Progress = Callable[[str, int, int], None]  # what is being done, how much is, of how much (0: unknown)


def run_task(
    loaded: Loaded,
    task: Task,
    *,
    limit: int | None = None,
    batch: int | None = None,
    content: str = "",
    progress: Progress = lambda what, done, total: None,
) -> list[Score]:
    """Run one benchmark.

    Args:
        limit: the first so many examples of each task.
        batch: requests at once; None: 8 on a CPU, as many as fit on a GPU.
        content: SHA-256 of the model. Under it each answer is kept, so that a run that was killed goes on; empty: none is kept.
    Raises:
        DowncycleError: lm-eval is not installed or failed, the data cannot be had, the model gives NaN.
    """
    require_lm_eval()
    progress(f"{task.title}: its questions", 0, 0)
    with quiet():
        answer = _ask(loaded, task, limit, batch, content, lambda done, total: progress(task.title, done, total))
    return read_scores(answer, task, limit)


def _ask(loaded: Loaded, task: Task, limit: int | None, batch: int | None, content: str, told: Callable[[int, int], None]) -> Any:
    try:
        from lm_eval import simple_evaluate

        from .language_model import LanguageModel

        index, asked = find_task(task)
        with open_responses(responses_path(loaded, content)) as responses:
            size = batch or ("auto" if loaded.device.type == "cuda" else CPU_BATCH)
            model = LanguageModel(loaded, size, responses, told)
            return simple_evaluate(model, tasks=[asked], limit=limit, task_manager=index)
    except DowncycleError:
        raise
    except Exception as error:
        raise DowncycleError(f"--tasks {task.name}: {_why(task, error)}") from error


def responses_path(loaded: Loaded, content: str) -> Path:
    """Return where a model's answers are kept; they hold for one way of loading it, one kind of device and one release of lm-eval."""
    if not content:
        return Path("/dev/null")
    return cache_folder() / "benchmarks" / f"{content}-{loaded.load}-{loaded.device.type}-{lm_eval_version()}.jsonl"


def _why(task: Task, error: Exception) -> str:
    """Say in one line why lm-eval failed, and what to do."""
    texts = [" ".join(str(one).split()) for one in _chain(error)]
    said = next((f"{type(error).__name__}: {text}" for text in texts if text), type(error).__name__)[:300]
    if "marked as unsafe" in texts[0]:
        return "it runs code that the model writes, which is not done here; in a sandbox, lm_eval --confirm_run_unsafe_code does it"
    if type(error).__name__ == "OutOfMemoryError":
        return f"memory ran out ({said[:120]}); try a smaller --batch"
    hub = [re.search(r"(?:Couldn't reach|Dataset) '?([^\s']+/[^\s']+)'?(?: on the Hub| is not cached)", text) for text in texts]
    if found := next(filter(None, hub), None):
        return (
            f"its data, {found[1]} on the Hub, are not on this machine and cannot be fetched ({texts[0][:100]}); "
            "go online once, or take --tasks quick, which needs none"
        )
    return f"lm-eval failed: {said}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__

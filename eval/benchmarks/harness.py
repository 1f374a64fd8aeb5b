"""lm-eval as it is installed: the tasks that it knows, and a way to run it in silence. What is measured it refuses to know."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import cache, partialmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError
from ..content import cache_folder
from .task_files import is_group, read_task
from .tasks import Task, lm_eval_version

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TALKERS = ("lm_eval", "datasets", "transformers", "huggingface_hub", "evaluate", "fsspec", "httpx")


def require_lm_eval() -> None:
    """Refuse where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise DowncycleError("benchmarks need lm-eval: pip install 'downcycle[eval]'")


def known_names() -> list[str]:
    """Every task, group and tag of the installed lm-eval. To index them takes it seconds, so they are kept."""
    require_lm_eval()
    kept = cache_folder() / "benchmarks" / f"names-{lm_eval_version()}.json"
    with suppress(OSError, ValueError):
        return list(json.loads(kept.read_text()))
    with quiet():
        names = list(all_tasks().all_tasks)
    with suppress(OSError):
        kept.parent.mkdir(parents=True, exist_ok=True)
        staged = kept.with_name(f".{kept.name}.{os.getpid()}")
        staged.write_text(json.dumps(names))
        staged.replace(kept)
    return names


@cache
def all_tasks() -> TaskManager:
    """Return lm-eval's index of the tasks that come with it."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def find_task(task: Task) -> tuple[TaskManager, str | dict[str, Any]]:
    """Return the index that a benchmark is found in, and how lm-eval is asked for it there."""
    index = all_tasks() if task.path is None else _index_of(task.name, task.path)
    changes = {"num_fewshot": task.shots, "fewshot_split": task.fewshot_split}
    changed = {key: value for key, value in changes.items() if value is not None}
    return index, {"task": task.name, **changed} if changed else task.name


def _index_of(name: str, path: Path) -> TaskManager:
    """Index one YAML; where it is a group, with what lies below its folder, and lm-eval's own tasks if it names any."""
    from lm_eval.tasks import TaskManager

    config = read_task(path)
    if not is_group(config):
        index = TaskManager(include_defaults=False)
        _register(index, name, {"type": "python_task" if "class" in config else "task", "yaml_path": str(path)})
        return index
    index = TaskManager(include_defaults=False, include_path=str(path.parent))
    _register(index, name, {"type": "group", "task": -1, "yaml_path": str(path)})
    members = [member["task"] if isinstance(member, dict) else member for member in config["task"] if member]
    if not set(map(str, members)) <= set(index.all_tasks):
        for other, entry in all_tasks().task_index.items():
            if other not in index.task_index:
                _register(index, other, entry)
    return index


def _register(index: TaskManager, name: str, entry: dict[str, Any]) -> None:
    index.task_index[name] = entry
    index.all_tasks.append(name)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep lm-eval and the libraries below it from writing to the terminal, and from running programs that describe the machine."""
    import tqdm
    from lm_eval import evaluator

    with ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(_replaced(tqdm.tqdm, "__init__", partialmethod(tqdm.tqdm.__init__, disable=True)))
        stack.enter_context(_replaced(evaluator, "add_env_info", lambda results: None))
        stack.enter_context(_replaced(evaluator, "get_git_commit_hash", lambda: None))
        for name in TALKERS:
            logger = logging.getLogger(name)
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = vars(owner)[name]  # as it is stored: an attribute of a class is made anew by each look
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)

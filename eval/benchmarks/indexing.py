"""Where lm-eval finds a benchmark: in its own index, or in one made of a YAML file. Runs nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .harness import all_tasks
from .task_files import is_group, read_task
from .tasks import Task

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager


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

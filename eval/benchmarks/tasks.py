"""Which benchmarks are run: suites, lm-eval's own tasks by name, and tasks in YAML files.

Plans without lm-eval, which is asked only for the names that it knows, once for each release. Runs nothing.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path

from ...surgery.errors import DowncycleError
from .harness import known_names, lm_eval_version
from .task_files import files_digest, task_name

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Task:
    """A benchmark to run. name: lm-eval's, of a task, a group or a tag.

    metric: the one that is reported, as lm-eval spells it, "METRIC,FILTER"; None: each that the task lists.
    shots: examples in the prompt; None: as many as the task itself says. fewshot_split: where they are from; None: as the task says.
    path: of the YAML that defines it; None: lm-eval does. suite: that it is run as a part of.
    """

    name: str
    title: str
    metric: str | None = None
    shots: int | None = None
    fewshot_split: str | None = None
    path: Path | None = None
    suite: str = ""


# The shots, splits and metrics of the Open LLM Leaderboard, version 1, as lm-eval's own benchmarks/openllm.yaml has them.
OPENLLM = (
    Task("arc_challenge", "ARC-challenge", "acc_norm,none", 25, "train"),
    Task("hellaswag", "HellaSwag", "acc_norm,none", 10, "train"),
    Task("mmlu", "MMLU", "acc,none", 5),
    Task("truthfulqa_mc2", "TruthfulQA", "acc,none", 0),
    Task("winogrande", "Winogrande", "acc,none", 5, "train"),
    Task("gsm8k", "GSM8K", "exact_match,strict-match", 5),
)
QUICK = (
    Task("downcycle_endings", "Endings", "acc_norm,none", path=HERE / "downcycle_endings.yaml"),
    Task("downcycle_last_word", "Last word", "acc,none", path=HERE / "downcycle_last_word.yaml"),
)
SUITES = {name: tuple(replace(task, suite=name) for task in tasks) for name, tasks in {"openllm": OPENLLM, "quick": QUICK}.items()}


def parse_tasks(text: str) -> list[Task]:
    """Read what --tasks says: suites, names of lm-eval and paths of YAML files, with commas between them; NAME:5 gives five shots.

    Raises:
        DowncycleError: one that is not known, with the nearest names; a file that defines no task.
    """
    parts = [part for part in map(str.strip, text.split(",")) if part]
    if not parts:
        raise DowncycleError(f"--tasks {text!r}: names none; give openllm, quick, a task of lm-eval or the path of a task's YAML file")
    return list(dict.fromkeys(task for part in parts for task in _find(part)))


def task_key(task: Task, limit: int | None = None) -> str:
    """Return what decides a benchmark's result beside the model, as a digest: lm-eval's release, the task, the files that define it."""
    files = files_digest(task.path) if task.path else ""
    facts = (lm_eval_version(), task.name, task.metric, task.shots, task.fewshot_split, files, limit)
    return sha256(repr(facts).encode()).hexdigest()[:32]


def _find(part: str) -> tuple[Task, ...]:
    if part in SUITES:
        return SUITES[part]
    name, shots = part, None
    if match := re.fullmatch(r"(.+):([^:/]*)", part):
        if not re.fullmatch("[0-9]{1,3}", match[2]):
            raise DowncycleError(f"--tasks {part}: {match[2]!r} is no number of shots; write it like {match[1]}:5")
        name, shots = match[1], int(match[2])
    if name.endswith((".yaml", ".yml")):
        path = Path(name).expanduser().absolute()
        return (Task(found := task_name(path), found, shots=shots, path=path),)
    own = next((task for task in QUICK if task.name == name), None)
    if own:
        return (replace(own, shots=shots),)
    _check_name(name)
    return (Task(name, name, shots=shots),)


def _check_name(name: str) -> None:
    """Refuse what lm-eval does not know."""
    known = known_names()
    if name in known:
        return
    near = difflib.get_close_matches(name, dict.fromkeys([*SUITES, *known]), n=4)
    advice = f"the nearest are {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
    raise DowncycleError(f"--tasks {name}: lm-eval {lm_eval_version()} knows no such task; {advice}")

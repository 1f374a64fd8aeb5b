"""lm-eval as it is installed: the tasks that it knows, and a way to run it in silence. What is measured it refuses to know."""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout, suppress
from functools import cache, partialmethod
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError
from ...surgery.staging import replace_file
from ..content import cache_folder

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

TALKERS = ("lm_eval", "datasets", "transformers", "huggingface_hub", "evaluate", "fsspec", "httpx")


def lm_eval_version() -> str:
    """The installed release of lm-eval; empty where there is none."""
    with suppress(PackageNotFoundError):
        return version("lm_eval")
    return ""


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
        replace_file(kept, json.dumps(names).encode())
    return names


@cache
def all_tasks() -> TaskManager:
    """Return lm-eval's index of the tasks that come with it."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


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

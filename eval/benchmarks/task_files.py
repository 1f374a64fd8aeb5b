"""A benchmark's YAML read without running anything of it, and the local files that it names.

What a Python module of it opens by itself is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from glob import glob, has_magic
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from ...surgery.errors import DowncycleError

FUNCTION = "!function "
FOLDERS = ("dataset_path", "data_dir")  # what can name a folder of data
LONGEST = 300  # characters: what is longer names no file


class _Loader(yaml.SafeLoader):
    """Reads plain values; a function to be called stays the text that names it."""


_Loader.add_constructor("!function", lambda loader, node: FUNCTION + str(node.value))


def read_task(path: Path) -> dict[str, Any]:
    """Read a benchmark's YAML; of what it includes, nothing.

    Raises:
        DowncycleError: not there, or no YAML mapping.
    """
    try:
        value = yaml.load(path.read_bytes(), Loader=_Loader)  # noqa: S506 - made from the safe one
    except OSError as error:
        raise DowncycleError(f"--tasks {path}: {error.strerror}; give the path of a task's YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DowncycleError(f"--tasks {path}: no YAML ({' '.join(str(error).split())[:160]})") from error
    if not isinstance(value, dict):
        raise DowncycleError(f"--tasks {path}: holds no keys and values; an lm-eval task begins with `task: NAME`")
    return value


def task_name(path: Path) -> str:
    """Return the name that a YAML gives its task or group, looking into what it includes."""
    config = read_task(path)
    name = config.get("group") if is_group(config) else config.get("task")
    if name is None:
        name = next((task_name(other) for other in _included(path, config)), None)
    if not name or not isinstance(name, str):
        raise DowncycleError(f"--tasks {path}: names no task; an lm-eval task begins with `task: NAME`, a group with `group: NAME`")
    return name


def is_group(config: dict[str, Any]) -> bool:
    """Whether a YAML lists tasks, and is none itself."""
    return isinstance(config.get("task"), list)


def files_digest(path: Path) -> str:
    """Return the SHA-256 of a benchmark's YAML and of all local files that it names, wherever the folder lies."""
    files = {file.resolve() for file in task_files(path)}
    return sha256(repr(sorted((file.name, sha256(file.read_bytes()).hexdigest()) for file in files)).encode()).hexdigest()


def task_files(path: Path) -> Iterator[Path]:
    """Yield a benchmark's YAML and the local files that it names: included YAMLs, modules with what lies beside them, data; of a group,
    every YAML below its folder, as lm-eval finds its members there.
    """
    todo, seen = [path], set[Path]()
    while todo:
        if (one := todo.pop().resolve()) in seen:
            continue
        seen.add(one)
        yield one
        config = read_task(one)
        todo += _included(one, config)
        todo += sorted(one.parent.rglob("*.yaml")) if is_group(config) else []
        yield from _named(one, config)


def _included(path: Path, config: dict[str, Any]) -> list[Path]:
    given = config.get("include", [])
    found = [_beside(path, name) for name in (given if isinstance(given, list) else [given])]
    return [file for file in found if file]


def _named(path: Path, config: dict[str, Any]) -> Iterator[Path]:
    """Yield modules, data files and folders of data."""
    for key, text in _texts(config):
        if text.startswith(FUNCTION):
            yield from path.parent.glob("*.py")
        elif 0 < len(text) < LONGEST and "\n" not in text and "\0" not in text:
            found = _beside(path, text)
            if found and found.is_file():
                yield found
            elif found and key in FOLDERS:
                yield from (file for file in sorted(found.rglob("*")) if file.is_file())
            elif not found and has_magic(text):
                yield from (Path(name) for name in sorted(glob(text, recursive=True)) if Path(name).is_file())


def _beside(path: Path, name: str) -> Path | None:
    """Return the file or folder of a name, from the current folder as lm-eval takes it, or from the YAML's."""
    return next((place for place in (Path(name), path.parent / name) if place.exists()), None)


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield every string in a YAML with the key that it stands under."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            yield from _texts(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _texts(inner, key)

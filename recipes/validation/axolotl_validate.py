"""Axolotl's own validation of configs, for a GPU that need not be there; runs as a process of its own.

`python -m downcycle.recipes.validation.axolotl_validate JOBS ANSWERS` reads a JSON list of {config, capabilities} and writes a JSON list of
lists of faults. Own process, because Axolotl prints on stdout and its plugins stay registered. Loads no model and no dataset.
"""

from __future__ import annotations

import copy
import json
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

CRASH = "Axolotl crashes on this config ({}); most often a key without a value or of the wrong kind"


def faults_of(config: dict[str, Any], capabilities: dict[str, Any]) -> list[str]:
    """Everything that Axolotl's config models refuse about one config, all together; empty where it is valid."""
    import torch
    from axolotl.integrations.config import merge_input_args
    from axolotl.utils.config import validate_config
    from axolotl.utils.dict import DictDefault

    faults = _register(config)
    model = merge_input_args()[0]
    unknown = [key for key, value in config.items() if value is not None and key not in _keys_of(model)]
    faults += [f"{key}: neither Axolotl nor a plugin of this config has such a key" for key in unknown]
    environment = {"torch_version": str(torch.__version__).split("+", maxsplit=1)[0]}
    try:
        validate_config(DictDefault(copy.deepcopy(config)), capabilities=capabilities, env_capabilities=environment)
    except Exception as error:  # whatever it is, the user needs a line about it
        found = list(_every_fault(model, DictDefault(config).to_dict() | {"capabilities": capabilities, "env_capabilities": environment}))
        faults += found or list(_in_words(error))
    return list(dict.fromkeys(faults))


def _register(config: dict[str, Any]) -> list[str]:
    """Load and register the plugins of a config; name those that cannot be loaded, and take them out of it."""
    from axolotl.integrations.base import load_plugin
    from axolotl.utils.config import prepare_plugins

    names = config.get("plugins")
    if not isinstance(names, list) or not names:
        return []
    faults, loadable = [], []
    for name in names:
        try:
            load_plugin(name)
            loadable.append(name)
        except Exception as error:  # a plugin is code of anyone
            faults.append(f"plugins: {name} cannot be loaded ({type(error).__name__}: {_line(error)}); install it or take it out")
    config["plugins"] = loadable
    prepare_plugins(config)
    return faults


def _keys_of(model: Any) -> set[str]:
    return {
        name for field, info in model.model_fields.items() for name in (field, info.alias, info.validation_alias) if isinstance(name, str)
    }


def _every_fault(model: Any, data: dict[str, Any]) -> Iterator[str]:
    """Run each check of a pydantic model by itself, where pydantic would stop at the first that fails."""
    from pydantic import model_validator

    checks = model.__pydantic_decorators__.model_validators
    modes = {name: check.info.mode for name, check in checks.items()}
    for name in [name for name in reversed(modes) if modes[name] == "before"]:
        yield from _attempt(partial(getattr(model, name), data))
    silent = {name: model_validator(mode=mode)(_pass_class if mode == "before" else _pass) for name, mode in modes.items()}
    bare = type("Fields", (model,), silent | {"__module__": __name__})
    made: list[Any] = []
    yield from _make(bare, data, made)
    for name in [name for name in modes if modes[name] == "after"] if made else ():
        yield from _attempt(partial(getattr(model, name), made[0]))


def _make(model: Any, data: dict[str, Any], made: list[Any]) -> Iterator[str]:
    """Name the faults of all fields, and make the config without them, so that the checks of whole configs can run on the rest."""
    gone: set[str] = set()
    while not made:
        try:
            made.append(model(**data))
        except Exception as error:  # the checks of some fields raise warnings, which pydantic does not gather
            yield from (fault for fault in _in_words(error) if fault.split(":")[0] not in gone)
            named = _named(error) & set(data)
            if not named:
                return
            gone |= named
            data = {key: value for key, value in data.items() if key not in named}


def _named(error: Exception) -> set[str]:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        return {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    return set(re.findall(r"`(\w+)`", str(error)))


def _pass(self: Any) -> Any:
    return self


_pass_class: Any = classmethod(lambda cls, data: data)


def _attempt(check: Callable[[], Any]) -> Iterator[str]:
    try:
        check()
    except Exception as error:  # Axolotl's checks raise warnings, import errors and plain crashes too
        yield from _in_words(error)


def _in_words(error: Exception) -> Iterator[str]:
    from pydantic import ValidationError

    if isinstance(error, ValidationError):
        said: dict[str, list[str]] = {}
        for fault in error.errors():
            said.setdefault(_path(fault["loc"]), []).append(_line(fault["msg"]).removeprefix("Value error, "))
        for path, texts in said.items():
            yield f"{path}: " * bool(path) + "; or ".join(dict.fromkeys(texts))
    elif isinstance(error, ValueError | NotImplementedError | Warning):
        yield _line(error)
    elif isinstance(error, ImportError):
        yield f"a package is missing here: {_line(error)}"
    else:
        yield CRASH.format(f"{type(error).__name__}: {_line(error)}")


def _path(place: tuple[int | str, ...]) -> str:
    """Write a pydantic location as a path of keys: without the names of types that unions put into it."""
    parts = [part for part in place if isinstance(part, int) or (part.isidentifier() and part == part.lower())]
    while len(parts) > 1 and parts[-1] in ("str", "int", "float", "bool"):
        parts.pop()
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).lstrip(".")


def _line(text: Any) -> str:
    return " ".join(str(text).split())[:500]


if __name__ == "__main__":
    jobs, answers = map(Path, sys.argv[1:])
    answers.write_text(json.dumps([faults_of(**job) for job in json.loads(jobs.read_text(encoding="utf-8"))]), encoding="utf-8")

"""What packed a model's weights; and a quantiser's config names modules, and so layers by number: renumber them.

Knows no quantiser: what names a layer is renumbered, what surely names none or all is left alone, and the rest is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from .errors import DowncycleError
from .stack import OTHER_TOWERS

ANY_NUMBER = re.compile(r"(?:\\d|\[0-9\])(?:[+*]|\{[0-9,]+\})?")  # as regular expressions say it
PATTERN = re.compile(r"^[+-]:|^re:|[|\[\](){}^$?*\\]")

Moved = dict[int, list[int]]


def packed_by(config: Mapping[str, Any]) -> str:
    """Name the quantiser that packed a model's weights, by its config or a section of it; empty where none did."""
    for section in _sections(config):
        if quantised := section.get("quantization_config"):
            return str(quantised.get("quant_method") or "a quantiser") if isinstance(quantised, dict) else "a quantiser"
    return ""


def renumber_modules(value: Any, stem: str, moved: Moved) -> Any:
    """Renumber the layers in the module names of a quantiser's config; names of dropped layers go.

    Args:
        stem: last word before the layer's number in tensor names, like "layers".
        moved: the new numbers of each kept layer.
    Raises:
        DowncycleError: a pattern of which nobody can say which layers it means after a cut.
    """
    if isinstance(value, dict):
        return {new: renumber_modules(item, stem, moved) for key, item in value.items() for new in _names(key, stem, moved)}
    if isinstance(value, list):
        names = [new for item in value for new in (_names(item, stem, moved) if isinstance(item, str) else [item])]
        return [renumber_modules(item, stem, moved) if isinstance(item, dict | list) else item for item in names]
    return value


def renumber_config(config: dict[str, Any], stem: str, moved: Moved) -> None:
    """Renumber, in place, the quantiser's part of a model's config and of its sections."""
    for section in _sections(config):
        if isinstance(section.get("quantization_config"), dict):
            section["quantization_config"] = renumber_modules(section["quantization_config"], stem, moved)


def _sections(config: Mapping[str, Any]) -> Iterator[Any]:
    yield config
    yield from (value for value in config.values() if isinstance(value, dict))


def _names(name: str, stem: str, moved: Moved) -> list[str]:
    """Return what one module name (or pattern) becomes: one name per new number, or none."""
    if OTHER_TOWERS.search(name):
        return [name]
    word = re.escape(stem)
    match = re.search(rf"(?<![A-Za-z0-9_]){word}(\\?\.)([0-9]{{1,9}})(?=$|\.|\\\.|\*|\$)", name)
    _refuse_unclear(name, ANY_NUMBER.sub("", name[: match.start(2)] + name[match.end(2) :] if match else name), word)
    if not match:
        return [name]
    before, number, after = name[: match.start(2)], match[2], name[match.end(2) :]
    if after.startswith("*"):  # "layers.1*" also means layers 10 to 19
        news = [new for old in moved if str(old).startswith(number) for new in moved[old]]
        rest = after[1:]
        return [f"{before}{new}{between}{rest}" for new in news for between in (f"{match[1]}*", *([""] if rest else []))]
    return [f"{before}{new}{after}" for new in moved.get(int(number), [])]


def _refuse_unclear(name: str, rest: str, word: str) -> None:
    """Refuse a name whose `rest`, without the number that was understood, may name layers too."""
    other = re.sub(rf"\b(?!{word}\b)[A-Za-z_]\w*(?:\\?\.[0-9]+\b)?", "", rest)  # experts.3 and w1 number other things
    if re.search(rf"{word}\\?\.[0-9(\[]", rest) or (PATTERN.search(name) and re.search("[0-9]", other)):
        raise DowncycleError(f"quantization_config names layers by {name!r}, which cannot be renumbered; list the modules one by one in it")

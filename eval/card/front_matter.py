"""The metadata at the top of a model card: read, united with what a person changed, written without touching what stays.

Knows YAML and lists; what a key means it refuses to know, but for `model-index`, whose results are told apart by task and data set.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from typing import Any

from ...surgery.errors import DowncycleError

INDEX = "model-index"
_BLOCK = re.compile(r"\A\s*?---[ \t]*\n(|.*?\n)---[ \t]*(?:\n|\Z)", re.DOTALL)


@dataclass(frozen=True)
class FrontMatter:
    """A card in two: the metadata's YAML with its value, and the text below it."""

    yaml: str
    data: Mapping[str, Any]
    body: str


def read_front_matter(card: str) -> FrontMatter:
    """Divide a card (line ends as \\n) into metadata and text.

    Raises:
        DowncycleError: metadata that are begun and not ended, are no YAML, or no mapping of names.
    """
    import yaml

    if not re.match(r"\s*?---[ \t]*(\n|\Z)", card):
        return FrontMatter("", {}, card)
    found = _BLOCK.match(card)
    if not found:
        raise DowncycleError("its metadata begin with `---` and do not end; put `---` on a line below them, or take the first one away")
    try:
        data = yaml.safe_load(found[1])
    except (yaml.YAMLError, ValueError) as error:
        raise DowncycleError(f"its metadata are no YAML ({' '.join(str(error).split())[:160]}); mend them") from error
    if data is None:
        data = {}
    if not isinstance(data, dict) or not all(isinstance(key, str) for key in data):
        raise DowncycleError("its metadata are no mapping, as `license: mit` is; mend them")
    return FrontMatter(found[1].removesuffix("\n"), data, card[found.end() :])


def unite(before: Mapping[str, Any], now: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Unite three states of metadata, so that what a person did to them survives.

    Args:
        before: what was written the last time, as `remembered` keeps it. now: what stands in the card. ours: what would be written.
    Returns:
        A key that stands as it was written becomes what would be written now, and stays where that is nothing. A key that a person
        changed, added or took out stays so. Lists lose what was written before and no longer would be, gain what is new, and keep the
        rest.
    """
    united: dict[str, Any] = {}
    for key in dict.fromkeys([*now, *ours]):
        if key not in ours:
            united[key] = now[key]
        elif key not in now:
            if key not in before:
                united[key] = ours[key]
        elif key == INDEX:
            united[key] = _unite_index(before.get(key), now[key], ours[key])
        elif isinstance(ours[key], list) or isinstance(now[key], list):
            united[key] = _unite_lists(_as_list(before.get(key)), _as_list(now[key]), _as_list(ours[key]), isinstance(now[key], list))
        else:
            united[key] = ours[key] if key in before and before[key] == now[key] else now[key]
    return united


def remembered(ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return what must be kept of written metadata so that a later run can tell what a person changed; of results, a digest each."""
    return {key: [_digest(one) for one in value[0]["results"]] if key == INDEX else value for key, value in ours.items()}


def write_front_matter(before: FrontMatter, data: Mapping[str, Any]) -> str:
    """Spell metadata as YAML. Keys that have not changed keep their lines, their comments and their order."""
    import yaml

    if before.yaml and dict(before.data) == dict(data):
        return before.yaml
    pieces = re.split(r"^(?=[^\s#\-}\]][^\n]*?:)", before.yaml.rstrip("\n") + "\n", flags=re.MULTILINE) if before.yaml else []
    lines, done = [], set()
    for piece in pieces:
        found = re.match(r"([\"']?)([^\s\"'][^\"'\n]*?)\1\s*:(?=\s)", piece)
        key = found[2] if found else None
        if key is None or key not in before.data:
            lines.append(piece)
        elif key in data:
            lines.append(piece if before.data[key] == data[key] else _spell(key, data[key]) + _comments_below(piece))
            done.add(key)
        else:
            lines.append(_comments_below(piece))
    lines += [_spell(key, value) for key, value in data.items() if key not in done]
    text = "".join(lines).rstrip("\n")
    try:
        whole = yaml.safe_load(text) == dict(data) and len(yaml.compose(text).value) == len(data)  # YAML takes a key twice without a word
    except (yaml.YAMLError, ValueError):
        whole = False
    return text if whole else "".join(_spell(key, value) for key, value in data.items()).rstrip("\n")


def _spell(key: str, value: Any) -> str:
    import yaml

    return yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False, width=10**6)


def _comments_below(piece: str) -> str:
    """The comments and blank lines at the end of a key's lines: they belong to the next key."""
    lines = piece.splitlines(keepends=True)
    below = list(takewhile(lambda line: not line.strip() or line.lstrip(" \t").startswith("#"), reversed(lines)))
    return "".join(reversed(below))


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _unite_lists(before: list[Any], now: list[Any], ours: list[Any], listed: bool) -> Any:
    """Unite lists; a single value that stands in place of a list remains one where nothing is added to it."""
    kept = [one for one in now if one not in before or one in ours]
    united = kept + [one for one in ours if one not in before and one not in kept]
    return united[0] if len(united) == 1 and not listed else united


def _unite_index(before: Any, now: Any, ours: Any) -> Any:
    """Unite a model's results: those that a person added, changed or took out stay so."""
    if not now:
        return ours
    if not isinstance(now, list) or len(now) != 1 or not isinstance(now[0].get("results"), list):
        return now
    written = before if isinstance(before, list) else []
    new = ours[0]["results"]
    theirs = [one for one in now[0]["results"] if _digest(one) not in written]
    taken = {_subject(one) for one in theirs}
    there = {_digest(one) for one in now[0]["results"]}
    gone = [digest for digest in written if digest not in there]
    added = [one for one in new if _subject(one) not in taken and _digest(one) not in gone]
    stale = [one for one in now[0]["results"] if _digest(one) in written and _subject(one) not in {_subject(two) for two in new}]
    return [{**now[0], "results": [*stale, *added, *theirs]}]


def _subject(result: Any) -> str:
    """Which data set a result is of, and how it was measured."""
    data = result.get("dataset") if isinstance(result, dict) else None
    keys = ("type", "name", "config", "split", "args")
    return json.dumps([data.get(key) for key in keys] if isinstance(data, dict) else result, sort_keys=True, default=str)


def _digest(result: Any) -> str:
    return sha256(json.dumps(result, sort_keys=True, default=str).encode()).hexdigest()[:16]

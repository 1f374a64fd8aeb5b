"""Find what a folder's files tell of this machine: homes of its users in texts, and where its model was loaded from.

Opens small texts only; refuses nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from ...surgery.filenames import ADAPTER_CONFIG, CONFIG, LINEAGE
from ..card.redact import is_path

TEXTS = (".md", ".txt", ".json", ".jinja", ".yaml", ".yml", ".toml", ".cfg", ".sh", ".py", ".ipynb", ".csv")
LONGEST = 1 << 20  # bytes of a text that is read; vocabularies are longer
APART = (LINEAGE, ADAPTER_CONFIG)  # whose places are noted for what they are
LOADED_FROM = "_name_or_path"
HOME = re.compile(r"(?<![\w.])(?:/(?:home|Users|root)/|[A-Za-z]:[\\/]{1,4}Users[\\/]{1,4})[\w.-]+[^\s'\"`,;)<>\]}]*")


def places(contents: Mapping[str, Path | bytes]) -> list[str]:
    """Say which of the files that go name places of this machine, with the first place of each."""
    return [f"{path} names a place of this machine, {place[:200]}" for path, place in _named(contents)]


def _named(contents: Mapping[str, Path | bytes]) -> Iterator[tuple[str, str]]:
    for path, content in contents.items():
        if path in APART or not path.endswith(TEXTS):
            continue
        data = content if isinstance(content, bytes) else content.read_bytes() if content.stat().st_size <= LONGEST else b""
        text = data.decode(errors="replace")
        if found := (path == CONFIG and _loaded_from(text)) or _home(text):
            yield path, found


def _home(text: str) -> str:
    found, own = HOME.search(text), str(Path.home())
    return found[0] if found else own if len(own) > 5 and f"{own}/" in text else ""


def _loaded_from(text: str) -> str:
    try:
        config = json.loads(text)
    except ValueError:
        return ""
    named = config.get(LOADED_FROM) if isinstance(config, dict) else None
    return named if isinstance(named, str) and is_path(named) else ""

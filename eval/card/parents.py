"""What the makers of a model's parents say of them: the metadata and citation of their cards, the text of their licences.

Opens a parent where it lies on this machine or was opened already; asks the Hub only where it is told to, and takes no for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import DEMO, DEMO_FOLDER, Checkpoint, Span, find_source, load_json
from ...surgery.errors import DowncycleError
from ...surgery.filenames import CONFIG, LINEAGE
from ...surgery.sources import Source
from ..origin import Origin
from .front_matter import read_front_matter
from .licences import licence_in_card, licence_in_text, licence_of_id
from .redact import name_of
from .training_record import LOCAL

README = "README.md"
LONGEST = 1 << 20  # bytes of a card or licence that are read
HUB_ID = r"\w[\w.-]*/\w[\w.-]*"
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$")  # a folder of the Hub's cache


@dataclass(frozen=True)
class Parent:
    """What a model was made from. name: fit for publication; hub_id: where it is on the Hub, as far as known.

    card: metadata of its README.md. citations: BibTeX entries in it. licence: as licences.py calls it.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    card: Mapping[str, Any] = field(default_factory=dict)
    citations: tuple[str, ...] = ()
    licence: str | None = None


def read_parent(place: str, revision: str | None, source: Source | None = None, *, ask: bool = False, near: Path = Path()) -> Parent:
    """Describe one parent.

    Args:
        place: a folder or Hub id, as downcycle.json names it; revision: its commit, which only one on the Hub has.
        source: its files, where they are open already. ask: whether the Hub may be asked. near: where else a relative path may lead.
    """
    if Path(place).expanduser() == DEMO_FOLDER:
        place = DEMO
    if source is None:
        source = _open(place, revision, ask, near)
    card, citations = _card(source)
    hub_id, commit = _hub_id(place, revision, source)
    return Parent(
        name=hub_id or name_of(place),
        hub_id=hub_id,
        revision=commit,
        card=card,
        citations=citations,
        licence=licence_in_card(card) or _licence_file(source) or (licence_of_id(hub_id) if hub_id else None),
    )


def on_hub(named: str, ask: bool) -> Parent | None:
    """Describe a parent by its Hub id, where what was named can only be one: two parts, the first no folder of a project."""
    if not re.fullmatch(HUB_ID, named) or named.partition("/")[0].lower() in LOCAL or Path(named.partition("/")[0]).exists():
        return None
    source = None
    with suppress(DowncycleError, OSError):
        source = find_source(named) if ask else None
    card, citations = _card(source)
    return Parent(named, named, None, card, citations, licence_in_card(card) or _licence_file(source) or licence_of_id(named))


def open_sources(checkpoint: Checkpoint) -> Iterator[Source]:
    """Yield the sources that a checkpoint's bytes come from, each once."""
    seen: list[Source] = []
    for tensor in checkpoint.tensors.values():
        for span in [tensor.data] if isinstance(tensor.data, Span) else tensor.inputs:
            if span.source not in seen:
                seen.append(span.source)
                yield span.source


def read_parents(origin: Origin, sources: list[Source], *, ask: bool, near: Path) -> tuple[Parent, ...]:
    """Describe what a model was made from, the nearest first and the first parent last; all that are named differently."""
    found: list[Parent] = []
    for step in reversed(origin.steps):
        source = next((one for one in sources if one.name == step.parent and one.revision == step.revision), None)
        found.append(read_parent(step.parent, step.revision, source, ask=ask, near=near))
    return tuple(found)


def _open(place: str, revision: str | None, ask: bool, near: Path) -> Source | None:
    """Find a parent's files: a folder here, or a repo where the Hub may be asked; None where there is nothing to read."""
    with suppress(DowncycleError, OSError):
        if place == DEMO:
            return find_source(DEMO)
        if revision is None:
            folders = [path for path in (Path(place).expanduser(), near / place) if path.is_dir()]
            return find_source(folders[0]) if folders else None
        if ask:
            return find_source(place, revision)
    return None


def _text(source: Source | None, path: str) -> str:
    if source is not None:
        with suppress(DowncycleError, OSError):
            if 0 < (size := source.files.get(path, 0)) <= LONGEST:
                return source.read(path, 0, size).decode(errors="replace")
    return ""


def _card(source: Source | None) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    text = _text(source, README)
    with suppress(DowncycleError):
        return read_front_matter(text).data, tuple(bibtex(text))
    return {}, ()


def _licence_file(source: Source | None) -> str | None:
    names = [path for path in (source.files if source else {}) if re.fullmatch(r"(LICEN[SC]E|COPYING)[^/]*", path, re.IGNORECASE)]
    return next((found for path in names if (found := licence_in_text(_text(source, path)))), None)


def _hub_id(place: str, revision: str | None, source: Source | None) -> tuple[str | None, str | None]:
    """Return a parent's id and commit on the Hub, as downcycle.json, the Hub's cache or its own config tell them."""
    if revision is not None:
        return place, revision
    if found := SNAPSHOT.search(str(Path(place).expanduser())):
        return f"{found[1]}/{found[2]}", found[3]
    if source is not None and place != DEMO and LINEAGE not in source.files:  # a cut's config still names what its parent's does
        with suppress(DowncycleError):
            named = load_json(source, CONFIG).get("_name_or_path")
            if isinstance(named, str) and re.fullmatch(HUB_ID, named) and not Path(named).exists():
                return named, None
    return None, None


def bibtex(text: str) -> Iterator[str]:
    """Yield the BibTeX entries of a text, braces balanced."""
    for found in re.finditer(r"^[ \t]*@(?:\w+)\s*\{", text, re.MULTILINE):
        depth = 0
        for place, sign in enumerate(text[found.start() :], found.start()):
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if sign == "}" and depth <= 0:
                yield text[found.start() : place + 1].strip()
                break

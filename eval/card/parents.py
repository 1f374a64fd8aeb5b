"""What the makers of a model's parents say of them: the metadata and citation of their cards, the text of their licences.

Opens a parent where it lies on this machine or was opened already; asks the Hub only where it is told to, and takes no for an answer.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from ...surgery.checkpoint import DEMO, DEMO_FOLDER, Checkpoint, Span, find_source, load_json
from ...surgery.errors import DowncycleError
from ...surgery.filenames import CONFIG, LINEAGE, README, is_licence_text
from ...surgery.sources import Source
from ..origin import Origin
from .boilerplate import is_trainers, portable
from .front_matter import read_front_matter
from .licences import licence_in_card, licence_in_text, licence_of_id
from .redact import name_of
from .training_record import HUB_ID

LONGEST = 1 << 20  # bytes of a card or licence that are read
SNAPSHOT = re.compile(r"models--([\w.-]+?)--([\w.-]+)/snapshots/([0-9a-f]{40})/?$")  # a folder of the Hub's cache


@dataclass(frozen=True)
class Parent:
    """What a model was made from. name: fit for publication; hub_id: where it is on the Hub, where that is sure.

    doubtful: what it was called, where that may be a folder or an id of the Hub.

    card: metadata of its README.md. citations: BibTeX entries in it. licence: as licences.py calls it.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    doubtful: str = ""
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


def read_named(named: str, bases: Collection[str], *, ask: bool, near: Path) -> Parent:
    """Describe a parent that a recipe or an adapter names, which does not say whether that is a folder or on the Hub.

    Args:
        bases: what the model's own card says that it was made from. ask: whether the Hub may be asked if it has such a repo.
    """
    source = _open(named, None, ask, near)
    if source is None and ask and re.fullmatch(HUB_ID, named):
        with suppress(DowncycleError, OSError):
            source = find_source(named)
    parent = read_parent(named, source.revision if source else None, source, near=near)
    if parent.hub_id or source or not re.fullmatch(HUB_ID, named):
        return parent
    return replace(parent, name=named, hub_id=named) if named in bases else replace(parent, doubtful=named)


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
        front = read_front_matter(text)
        return portable(front.data, front.body) if is_trainers(front.body) else front.data, tuple(bibtex(text))
    return {}, ()


def _licence_file(source: Source | None) -> str | None:
    names = filter(is_licence_text, source.files if source else ())
    return next((found for path in names if (found := licence_in_text(_text(source, path)))), None)


def _hub_id(place: str, revision: str | None, source: Source | None) -> tuple[str | None, str | None]:
    """Return a parent's id and commit on the Hub, as downcycle.json or the Hub's cache tell them, or the id of a well-known model."""
    if revision is not None:
        return place, revision
    if found := SNAPSHOT.search(str(Path(place).expanduser())):
        return f"{found[1]}/{found[2]}", found[3]
    named: list[Any] = [place]
    if source is not None:
        with suppress(DowncycleError):
            named = [] if LINEAGE in source.files else [place, load_json(source, CONFIG).get("_name_or_path")]
    sure = (one for one in named if isinstance(one, str) and re.fullmatch(HUB_ID, one) and licence_of_id(one))
    return next(sure, None), None


def bibtex(text: str) -> Iterator[str]:
    """Yield the BibTeX entries of a text, braces balanced; one that does not end before the next begins is none."""
    starts = [found.start() for found in re.finditer(r"^[ \t]*@\w+\s*\{", text, re.MULTILINE)]
    for start, end in pairwise([*starts, len(text)]):
        depth = 0
        for found in re.finditer("[{}]", text[start:end]):
            depth += 1 if found[0] == "{" else -1
            if depth <= 0:
                yield text[start : start + found.end()].strip()
                break

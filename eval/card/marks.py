"""The generated sections of a model card: HTML comments that carry a digest of what stands between them.

A section that was changed by hand is told by its digest, one that was taken out by the record at the end of the card. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

_SECTION = re.compile(r"<!-- downcycle:(\w+) ([0-9a-f]{16}) -->\n(.*?)\n?<!-- /downcycle:\1 -->", re.DOTALL)
_RECORD = re.compile(r"\n*<!-- downcycle-record (.*?) -->\n?", re.DOTALL)


@dataclass(frozen=True)
class Record:
    """What the last run wrote: its sections by name, and its metadata, as front_matter.py remembers them."""

    sections: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Spliced:
    """A card's text with its sections renewed. kept: those that a person changed, and gone: those that one took out; neither is renewed."""

    text: str
    kept: tuple[str, ...]
    gone: tuple[str, ...]


def wrap(name: str, text: str) -> str:
    """Put a section between its marks; it holds no comment of its own, which could be taken for one."""
    body = text.strip("\n").replace("<!--", "&lt;!--")
    return f"<!-- downcycle:{name} {_digest(body)} -->\n{body}\n<!-- /downcycle:{name} -->"


def is_marked(body: str) -> bool:
    """Whether a card holds a generated section or a record of one."""
    return bool(_SECTION.search(body) or _RECORD.search(body))


def take_record(body: str) -> tuple[str, Record]:
    """Return a card's text without its record, and the record; an empty one where it is missing or damaged."""
    found = _RECORD.search(body)
    if not found:
        return body, Record()
    rest = _RECORD.sub("\n", body)
    try:
        value = json.loads(found[1])
        return rest, Record(tuple(map(str, value["sections"])), dict(value["metadata"]))
    except (ValueError, KeyError, TypeError):
        return rest, Record()


def put_record(body: str, record: Record) -> str:
    """Return a card's text with its record below."""
    value = {"sections": list(record.sections), "metadata": record.metadata}
    spelt = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"{body.rstrip()}\n\n<!-- downcycle-record {spelt} -->\n"


def section_in(body: str, name: str) -> str:
    """Return what stands in a section, as it was written or as a person changed it; empty where there is none."""
    return next((found[3] for found in _SECTION.finditer(body) if found[1] == name), "")


def splice(body: str, sections: Mapping[str, str], order: Sequence[str], known: Sequence[str]) -> Spliced:
    """Renew the sections of a card where they stand, and put those of a new kind into their places.

    Args:
        body: the card's text, without its record. sections: new texts by name; one that stands in the card and not here stays.
        order: the names as they follow each other in a new card. known: those that an earlier run wrote.
    """
    kept: list[str] = []
    there: list[str] = []

    def renew(found: re.Match[str]) -> str:
        name = found[1]
        if name in there:
            return found[0]  # a copy that a person made
        there.append(name)
        if _digest(found[3]) != found[2]:
            kept.append(name)
            return found[0]
        return wrap(name, sections[name]) if name in sections else found[0]

    text = _SECTION.sub(renew, body)
    gone = [name for name in order if name in sections and name in known and name not in there]
    for name in (name for name in order if name in sections and name not in there and name not in gone):
        text = _insert(text, wrap(name, sections[name]), name, order)
    return Spliced(text, tuple(kept), tuple(gone))


def _insert(text: str, section: str, name: str, order: Sequence[str]) -> str:
    """Put a section behind the one that it follows, or before the one that follows it."""
    places = {found[1]: found.span() for found in reversed(list(_SECTION.finditer(text)))}
    before = [one for one in order[: order.index(name)] if one in places]
    if before:
        at = places[before[-1]][1]
        return f"{text[:at]}\n\n{section}{text[at:]}"
    behind = [one for one in order[order.index(name) :] if one in places]
    at = places[behind[0]][0] if behind else 0
    rest = text[at:].lstrip("\n")
    return f"{text[:at]}{section}\n\n{rest}" if rest else f"{text[:at]}{section}\n"


def _digest(text: str) -> str:
    """Digest a text; white space at the ends of lines does not count, as editors take it away."""
    return sha256("\n".join(line.rstrip() for line in text.strip().splitlines()).encode(errors="backslashreplace")).hexdigest()[:16]

"""The generated sections of a model card: HTML comments that carry a digest of what stands between them.

A section that was changed by hand is told by its digest, one that was taken out by the record at the end of the card, and one that lost
its marks by its heading. Knows no model.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

_MARK = re.compile(r"<!-- (?:downcycle:(\w+) ([0-9a-f]{16}) -->\n|/downcycle:(\w+) -->)")
_RECORD = re.compile(r"^<!-- downcycle-record (\{.*\}) -->$", re.MULTILINE)


@dataclass(frozen=True)
class Record:
    """What the last run wrote: its sections by name, and its metadata, as front_matter.py remembers them."""

    sections: tuple[str, ...] = ()
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Section:
    """A section that stands in a card: its name, the digest that its mark carries, its text, and where it begins and ends."""

    name: str
    digest: str
    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Spliced:
    """A card's text with its sections renewed, but for those that are a person's.

    kept: those that one changed. own: those whose heading stands in one's own text. gone: those that one took out.
    """

    text: str
    kept: tuple[str, ...]
    own: tuple[str, ...]
    gone: tuple[str, ...]


def wrap(name: str, text: str) -> str:
    """Put a section between its marks; it holds no comment of its own, which could be taken for one."""
    body = text.strip("\n").replace("<!--", "&lt;!--")
    return f"<!-- downcycle:{name} {_digest(body)} -->\n{body}\n<!-- /downcycle:{name} -->"


def is_marked(body: str) -> bool:
    """Whether a card holds a generated section or a record of one."""
    return bool(_sections(body) or _RECORD.search(body))


def take_record(body: str) -> tuple[str, Record]:
    """Return a card's text without its record, and the record: the last line that is one; a damaged one is text, and stays."""
    found = None
    for found in _RECORD.finditer(body):  # noqa: B007
        pass
    try:
        value = json.loads(_mended(found[1])) if found else {}
        record = Record(tuple(map(str, value["sections"])), dict(value["metadata"]))
    except (ValueError, KeyError, TypeError):
        return body, Record()
    assert found
    return f"{body[: found.start()].rstrip(chr(10))}\n{body[found.end() :].removeprefix(chr(10))}", record


def _mended(spelt: str) -> str:
    """Return a record without the commas of a name that a person deleted from its sections, which stand last."""
    before, key, names = spelt.rpartition('"sections": [')
    return before + key + re.sub(r"^[\s,]+|,\s*(?=[,\]])", "", names)


def put_record(body: str, record: Record) -> str:
    """Return a card's text with its record below."""
    value = {"sections": list(record.sections), "metadata": record.metadata}
    spelt = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str).replace("<", "\\u003c").replace(">", "\\u003e")
    return f"{body.rstrip()}\n\n<!-- downcycle-record {spelt} -->\n"


def splice(body: str, sections: Mapping[str, str], order: Sequence[str], known: Sequence[str]) -> Spliced:
    """Renew the sections of a card where they stand, and put those of a new kind into their places.

    Args:
        body: the card's text, without its record. sections: new texts by name; one that stands in the card and not here stays.
        order: the names as they follow each other in a new card. known: those that an earlier run wrote.
    """
    kept: list[str] = []
    there: list[str] = []
    pieces, done = [], 0
    for one in _sections(body):
        if one.name not in there:  # else it is a copy that a person made
            there.append(one.name)
            changed = _digest(one.text) != one.digest
            kept += [one.name] if changed else []
            if not changed and one.name in sections:
                pieces += [body[done : one.start], wrap(one.name, sections[one.name])]
                done = one.end
    text = "".join([*pieces, body[done:]])
    lines = _own_lines(body)
    absent = [name for name in order if name in sections and name not in there]
    own = [name for name in absent if sections[name].partition("\n")[0] in lines]
    gone = [name for name in absent if name in known and name not in own]
    for name in absent:
        if name not in own and name not in gone:
            text = _insert(text, wrap(name, sections[name]), name, order)
    return Spliced(text, tuple(kept), tuple(own), tuple(gone))


def _own_lines(body: str) -> set[str]:
    """Return the lines that stand in no generated section and in no block of code."""
    found: set[str] = set()
    done, fence = 0, ""
    pieces = []
    for one in _sections(body):
        pieces.append(body[done : one.start])
        done = one.end
    for line in "".join([*pieces, body[done:]]).splitlines():
        if mark := re.match(r" {0,3}(```+|~~~+)", line):
            fence = "" if fence and mark[1].startswith(fence) else fence or mark[1]
        elif not fence:
            found.add(line.rstrip())
    return found


def _sections(body: str) -> list[_Section]:
    """Find the sections of a card: from a mark that begins one to the next that ends it; half a pair of marks is text."""
    marks = list(_MARK.finditer(body))
    ends: dict[str, list[re.Match[str]]] = {}
    for mark in reversed(marks):
        if mark[3]:
            ends.setdefault(mark[3], []).append(mark)  # the first of them last
    found: list[_Section] = []
    for mark in marks:
        left = ends.get(mark[1], [])
        while left and left[-1].start() < mark.end():
            left.pop()
        if mark[1] and left and (not found or mark.start() >= found[-1].end):
            text = body[mark.end() : left[-1].start()].removesuffix("\n")
            found.append(_Section(mark[1], mark[2], text, mark.start(), left[-1].end()))
    return found


def _insert(text: str, section: str, name: str, order: Sequence[str]) -> str:
    """Put a section behind the one that it follows, or before the one that follows it."""
    places = {one.name: (one.start, one.end) for one in reversed(_sections(text))}
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

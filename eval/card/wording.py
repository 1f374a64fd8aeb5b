"""How a card writes: tables, links, names and lists in Markdown. Knows no model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ...terminal import printable
from .redact import scrub


def plain(text: str) -> str:
    """Write a name so that it is one line, and no Markdown table or HTML."""
    return scrub(printable(text)).replace("<", "&lt;").replace("|", "\\|").replace("`", "'")


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Write a table, its first column to the left and the others to the right."""
    lines = [head, ["-", *["-:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def model_link(hub_id: str | None, name: str) -> str:
    """Write a model's name, as a link where it is on the Hub."""
    return f"[{plain(hub_id)}](https://huggingface.co/{hub_id})" if hub_id else f"`{plain(name)}`"


def data_link(name: str) -> str:
    """Write a link to a data set of the Hub."""
    return f"[{plain(name)}](https://huggingface.co/datasets/{name})"


def paragraphs(parts: Iterable[str]) -> str:
    """Join parts of a section, those that are empty left out."""
    return "\n\n".join(part for part in parts if part)


def bullets(lines: Iterable[str]) -> str:
    """Write a list."""
    return "\n".join(f"- {line}" for line in lines)

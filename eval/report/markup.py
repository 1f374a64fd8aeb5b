"""HTML that the pages share: tables, lists of terms, remarks, and the page around them. Every text that comes from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files
from string import Template

from ...terminal import printable

NONE = "–"


def fill_page(title: str, lead: str, sections: Sequence[str]) -> str:
    """Return a whole page. lead, sections: HTML."""
    fields = {"title": escape(title), "summary": f'<div class="lead">{lead}</div>', "sections": "\n".join(sections)}
    return Template(files(__package__).joinpath("page.html").read_text(encoding="utf-8")).substitute(fields)


def section(anchor: str, heading: str, parts: Sequence[str]) -> str:
    """Return a part of the page with its heading."""
    return f'<section id="{anchor}">\n<h2>{heading}</h2>\n' + "\n".join(filter(None, parts)) + "\n</section>"


def html_table(
    columns: Sequence[str],
    rows: Sequence[tuple[str, Sequence[str]]],
    corner: str = "",
    *,
    words: Sequence[str] = (),
    marked: Sequence[int] = (),
) -> str:
    """An HTML table of cells that are HTML. words: rows whose cells may be broken into lines; marked: numbers of rows that stand out."""
    heads = "".join(f'<th scope="col">{column}</th>' for column in (corner, *columns))
    lines = []
    for place, (title, cells) in enumerate(rows):
        kind = ' class="words"' if title in words else ""
        line = f'<th scope="row">{title}</th>' + "".join(f"<td{kind}>{cell}</td>" for cell in cells)
        lines.append(f'<tr class="average">{line}</tr>' if place in marked else f"<tr>{line}</tr>")
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def term_list(terms: Sequence[tuple[str, str]]) -> str:
    """A list of terms and what is to be said of each; those of which nothing is are left out."""
    return "<dl>\n" + "\n".join(f"<dt>{plain(term)}</dt><dd>{plain(text)}</dd>" for term, text in terms if text) + "\n</dl>"


def remark(text: str) -> str:
    """A paragraph in small print."""
    return f'<p class="note">{escape(text)}</p>\n'


def plain(text: str) -> str:
    """Text on one line, as HTML."""
    return escape(printable(text))


def small(text: str) -> str:
    """A line in small print, below what it stands behind; nothing for nothing."""
    return f"<small>{escape(text)}</small>" if text else ""

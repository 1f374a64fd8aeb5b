"""The comparison as one page that needs nothing but itself, with its figures as PNG files and its numbers as results.json beside it.

Measures nothing. The page holds no script and asks no server for anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...surgery.errors import DowncycleError
from ..results import RESULTS, Results, write_results
from .compare import check_finite
from .drawing import NARROW, WIDE, need_matplotlib, save_png, to_svg
from .figures import FIGURES
from .markup import fill_page, section
from .sections import benchmarks_table, loss_tables, measured_how, perplexity_tables, speed_table, summary_table
from .summary import summarise, title_of
from .ternary_weights import ternary_tables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

REPORT = "report.html"
PICTURES = {name: f"{name}.png" for name in FIGURES}

# Heading, figure, and what stands below it; a section without either is left out.
SECTIONS: list[tuple[str, str, str, Callable[[Results], str]]] = [
    ("summary", "Summary", "", summary_table),
    ("layers", "Layers", "layers", lambda results: ""),
    ("benchmarks", "Benchmarks", "benchmarks", benchmarks_table),
    ("perplexity", "Perplexity", "perplexity", perplexity_tables),
    ("healing", "Healing", "loss", loss_tables),
    ("speed", "Size and speed", "speed", speed_table),
    ("ternary", "Ternary weights", "ternary", ternary_tables),
    ("method", "How it was measured", "", measured_how),
]


def write_report(results: Results, folder: Path) -> list[Path]:
    """Write report.html, results.json and the figures as PNG into a folder, new or not; return their paths, the page first.

    All are made before the first is put in place; other files of the folder are left alone. A figure of an earlier report that this one
    has none of is taken away.

    Raises:
        DowncycleError: matplotlib is not installed, a number is not finite, the folder is a file or cannot be written.
    """
    check_finite(results)
    return put_files(folder, lambda made: _make(results, made), RESULTS, PICTURES.values())


def put_files(folder: Path, make: Callable[[Path], list[str]], vouching: str, pictures: Iterable[str]) -> list[Path]:
    """Put what `make` writes into an empty folder, whose names it returns, in place; return the paths.

    Args:
        vouching: where a file of this name lay in the folder before, those of `pictures` that were not made now are taken away.
    """
    folder = check_folder(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".report-", dir=folder) as made:
            names = make(Path(made))
            earlier = (folder / vouching).is_file()
            for name in names:
                (Path(made) / name).replace(folder / name)
        for name in pictures:
            if earlier and name not in names:
                (folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise DowncycleError(f"--report {folder}: {error.strerror or error}; choose a folder that can be written") from error
    return [folder / name for name in names]


def check_folder(folder: Path) -> Path:
    """Return the folder as it is written to; refuse one where no report can be, so that nothing is measured in vain.

    Raises:
        DowncycleError: matplotlib is not installed, it or what it lies in is a file, or nothing can be written there.
    """
    need_matplotlib()
    folder = Path(folder).expanduser()
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists() or path.is_symlink())
    if not place.is_dir():
        raise DowncycleError(f"--report {folder}: {place} is no folder; choose another name")
    try:
        with TemporaryDirectory(dir=place):  # asking for permissions is not enough: root has all of them
            return folder
    except OSError as error:
        raise DowncycleError(f"--report {folder}: nothing can be written into {place} ({error.strerror}); choose another folder") from error


def page(results: Results) -> str:
    """Return the page as HTML."""
    lines = summarise(results)
    tag = "p" if len(lines) < 4 else "li"
    said = "".join(f"<{tag}>{escape(line)}</{tag}>\n" for line in lines)
    lead = said if tag == "p" else f"<ul>{said}</ul>"
    return fill_page(title_of(results), lead, list(_sections(results)))


def _make(results: Results, folder: Path) -> list[str]:
    """Write every file into an empty folder; return their names, results.json last, so that it vouches for the others."""
    (folder / REPORT).write_text(page(results), encoding="utf-8")
    names = [REPORT]
    for name, draw in FIGURES.items():
        if figure := draw(results, WIDE):
            save_png(figure, folder / PICTURES[name])
            names.append(PICTURES[name])
    write_results(check_finite(results), folder / RESULTS)
    return [*names, RESULTS]


def _sections(results: Results) -> Iterable[str]:
    for anchor, heading, figure, write in SECTIONS:
        parts = [_figure(results, figure) if figure else "", write(results)]
        if any(parts):
            yield section(anchor, heading, parts)


def _figure(results: Results, name: str) -> str:
    return figure_twice(name, partial(FIGURES[name], results))


def figure_twice(name: str, draw: Callable[[float], Figure | None]) -> str:
    """A figure twice: as wide as a page, and as a phone; the style sheet shows one. draw: makes it of a width; None: there is none."""
    drawn = {kind: draw(width) for kind, width in (("wide", WIDE), ("narrow", NARROW))}
    shown = [f'<div class="{kind}">{to_svg(figure)}</div>' for kind, figure in drawn.items() if figure]
    return f'<figure id="figure-{name}">{"".join(shown)}</figure>' if shown else ""

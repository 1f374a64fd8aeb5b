"""What the figures share: colours, sheets, bars, legends, and how a figure becomes a PNG or an SVG. Knows nothing of results."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...surgery.errors import DowncycleError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, NARROW = 9.0, 3.9  # inches: a page, a phone
MARGIN = 0.15  # inches: of a PNG, which may stand on any page
# Of Okabe and Ito's colours, and between them, those that differ from white and from a dark page by a contrast of 3 or more.
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#c06c9b", "#a88200", "#3391cf", "#808080")
HATCHES = ("", "////", "....", "xxxx")  # tell the eighth model from the first
INK = "#1c2128"  # text and axes; an SVG takes the page's colour instead
SMALL, NORMAL = 8.5, 10.0  # points
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "downcycle",
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.unicode_minus": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": NORMAL,
    "hatch.linewidth": 0.6,
    **dict.fromkeys(["text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"], INK),
}


def need_matplotlib() -> None:
    """Refuse to go on where no figure can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise DowncycleError("figures need matplotlib: pip install 'downcycle[eval]'")


@contextmanager
def plain_style() -> Iterator[None]:
    """Draw as matplotlib's own defaults and this module say, whatever the user's settings are, which are left as they were."""
    need_matplotlib()
    import matplotlib.style

    with matplotlib.style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")  # a name may be in any script
        yield


def colour_of(index: int) -> str:
    """Return the colour of a model, by its place among the results."""
    return PALETTE[index % len(PALETTE)]


def hatch_of(index: int) -> str:
    """Return the pattern of a model's bars, which tells those apart that share a colour."""
    return HATCHES[index // len(PALETTE) % len(HATCHES)]


def new_sheet(width: float, height: float, label: str) -> Figure:
    """Return an empty figure, in inches; its label says what it shows to those who do not see it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), label=label)
    FigureCanvasAgg(figure)
    return figure


def add_axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Add axes at a place in inches, from the upper left corner."""
    across, down = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))


def write_on(figure: Figure, left: float, top: float, text: str, size: float = NORMAL, **style: Any) -> None:
    """Write text whose upper left corner is at a place in inches."""
    across, down = figure.get_size_inches()
    figure.text(left / across, 1 - top / down, text, size=size, va="top", **style)


def shorten(text: str, length: int) -> str:
    """Leave out the middle of a text that is longer."""
    return text if len(text) <= length else f"{text[: (length - 1) // 2]}…{text[len(text) - length // 2 :]}"


def legend_height(names: Sequence[str], width: float) -> float:
    """Return what `add_legend` takes of a sheet, in inches."""
    return 0.22 * -(-len(names) // _legend_columns(names, width)) + 0.16


def add_legend(figure: Figure, names: Sequence[str], indices: Sequence[int]) -> None:
    """Write the models' names at the top of a sheet, row by row, each behind its colour."""
    from matplotlib.patches import Rectangle

    across, down = figure.get_size_inches()
    columns = _legend_columns(names, across)
    for place, (name, index) in enumerate(zip(names, indices, strict=True)):
        left, top = across * (place % columns) / columns, 0.22 * (place // columns) + 0.03
        box = (left / across, 1 - (top + 0.14) / down)
        patch = Rectangle(
            box, 0.16 / across, 0.13 / down, facecolor=colour_of(index), hatch=hatch_of(index), edgecolor=INK, linewidth=0, figure=figure
        )
        figure.add_artist(patch)
        write_on(figure, left + 0.24, top + 0.005, shorten(name, _legend_length(across, columns)), SMALL + 0.5)


def _legend_columns(names: Sequence[str], width: float) -> int:
    longest = max(map(len, names))
    return max([n for n in range(1, len(names) + 1) if longest <= _legend_length(width, n)], default=1)


def _legend_length(width: float, columns: int) -> int:
    """How many signs fit behind a colour."""
    return int((width / columns - 0.4) / 0.085)


def axis_top(highest: float) -> float:
    """Return a round number with round quarters that is no smaller than this positive one."""
    power = 10.0 ** math.floor(math.log10(highest))
    return next(power * factor for factor in (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10) if power * factor >= highest * (1 - 1e-9))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as a PNG with a margin, 160 pixels to the inch, on white; the same figure gives the same bytes."""
    with plain_style():
        from matplotlib.transforms import Bbox

        sheet = Bbox.from_bounds(0, 0, *figure.get_size_inches()).padded(MARGIN)
        figure.savefig(path, format="png", dpi=160, facecolor="white", bbox_inches=sheet, metadata={"Software": None})


def to_svg(figure: Figure) -> str:
    """Return a figure as an SVG element that stands in a page and takes on its text colour and font, light or dark.

    Deterministic; refers to nothing outside itself; its ids begin with a digest of what it shows, so that several can share a page.
    """
    with plain_style():
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(["Date", "Creator", "Format", "Type"]))
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 :]
    for pattern, by in _CLEANING:
        body = re.sub(pattern, by, body, flags=re.DOTALL)
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', body))
    label = escape(str(figure.get_label()))
    mark = f"f{hashlib.sha256((label + body).encode()).hexdigest()[:10]}"
    body = re.sub(r' id="([^"]*)"', lambda found: f' id="{mark}-{found[1]}"' if found[1] in used else "", body)
    body = re.sub(r'(href="#|url\(#)', rf"\g<1>{mark}-", body)
    across, down = figure.get_size_inches() * 72
    head = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {across:g} {down:g}" width="{across / 0.75:g}" height="{down / 0.75:g}"'
    look = 'fill="currentColor" stroke-linejoin="round" font-family="inherit"'
    return f'<svg {head} {look} role="img" aria-labelledby="{mark}-title"><title id="{mark}-title">{label}</title>{body.strip()}\n'


_CLEANING = [
    (r"<metadata>.*?</metadata>", ""),
    (r"<style type=.text/css.>.*?</style>", ""),
    (r"<defs>\s*</defs>", ""),
    (r"xlink:href=", "href="),
    (r"font-family: [^;\"]*;? ?", ""),
    (r' transform="rotate\(-0 [^"]*\)"', ""),
    (re.escape(INK), "currentColor"),
    (r"<!--.*?-->", ""),
    (r"\s*\n\s*", "\n"),
]

"""What the figures share: that each becomes an SVG and a PNG as it should, whatever its names are and the user has set."""

import re
import struct
import xml.etree.ElementTree as ElementTree

import pytest

pytest.importorskip("matplotlib")
from downcycle.eval.report.drawing import INK, NARROW, PALETTE, WIDE, axis_top, hatch_of, save_png, shorten, to_svg  # noqa: E402
from downcycle.eval.report.figures import FIGURES, benchmark_bars, layer_map, size_and_speed  # noqa: E402
from downcycle.eval.results import Results  # noqa: E402

SVG = "{http://www.w3.org/2000/svg}"


def luminance(colour):
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_colours_are_seen_on_white_and_on_a_dark_page():
    for colour in PALETTE:
        assert 1.05 / (luminance(colour) + 0.05) >= 3, colour
        assert (luminance(colour) + 0.05) / (luminance("#12161b") + 0.05) >= 3, colour
    assert len(set(PALETTE)) == len(PALETTE) == 7
    assert hatch_of(0) == hatch_of(6) == "" != hatch_of(7)


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("sample", ["llama", "many"])
def test_an_svg_is_whole_and_refers_to_nothing_outside(made, name, width, sample):
    results = getattr(made, sample)()
    figure = FIGURES[name](results, width)
    text = to_svg(figure)
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.find(f"{SVG}title").text == figure.get_label() != ""
    assert root.get("aria-labelledby") == root.find(f"{SVG}title").get("id")
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', text))
    assert used <= set(ids)
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert all(link.startswith("#") for link in links)
    assert text.count("http") == 1 and "font-family: " not in text  # the namespace; the page's own font
    assert "currentColor" in text and INK not in text and "#000000" not in text
    assert not re.search(r"\d{4}-\d{2}-\d{2}T|<metadata|<style|<\?xml|<!DOCTYPE|[=: ](nan|inf)\b", text)
    assert len(list(root.iter(f"{SVG}text"))) > 3
    assert to_svg(FIGURES[name](results, width)) == text


def test_the_svgs_of_one_page_share_no_id(made):
    ids = [set(re.findall(r' id="([^"]+)"', to_svg(draw(made.llama(), width)))) for draw in FIGURES.values() for width in (WIDE, NARROW)]
    assert sum(map(len, ids)) == len(set().union(*ids))


def test_names_are_text_in_a_figure(made, recwarn):
    name = 'x<script>alert("1")</script> $x^2$ _日本 & \x00\x1b'
    results = Results(
        (made.model(name, scores=(made.score("mmlu", 0.5),)), made.model("_b", "cut", (0,), 2, scores=(made.score("mmlu", 0.4),)))
    )
    for draw in (benchmark_bars, layer_map, size_and_speed):
        root = ElementTree.fromstring(to_svg(draw(results, WIDE)))
        shown = " ".join("".join(text.itertext()) for text in root.iter(f"{SVG}text"))
        assert "$x^2$ _日本 & \\x00\\x1b" in shown and "_b" in shown
        assert not list(root.iter(f"{SVG}script"))
    assert [str(one.message) for one in recwarn if "Glyph" in str(one.message)] == []


@pytest.mark.parametrize("name", FIGURES)
def test_a_png_is_one_and_always_the_same(made, name, tmp_path):
    for path in (tmp_path / "a.png", tmp_path / "b.png"):
        save_png(FIGURES[name](made.llama(), WIDE), path)
    data = (tmp_path / "a.png").read_bytes()
    assert data == (tmp_path / "b.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    across, down = struct.unpack(">II", data[16:24])
    assert across == 1440 + 2 * 24 and 150 < down < 2000


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("sample", ["llama", "many"])
def test_a_png_has_a_white_margin(made, name, sample, tmp_path):
    from matplotlib.image import imread

    save_png(FIGURES[name](getattr(made, sample)(), WIDE), tmp_path / "a.png")
    shown = imread(tmp_path / "a.png")[:, :, :3].min(axis=2) < 1
    rows, columns = shown.any(axis=1).nonzero()[0], shown.any(axis=0).nonzero()[0]
    assert min(rows[0], columns[0], len(shown) - 1 - rows[-1], shown.shape[1] - 1 - columns[-1]) >= 16


def test_the_settings_of_the_user_are_neither_used_nor_changed(made):
    import matplotlib

    plain = to_svg(benchmark_bars(made.llama()))
    before = dict(matplotlib.rcParams)
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "red", "text.usetex": True, "svg.fonttype": "path"}):
        changed = dict(matplotlib.rcParams)
        assert to_svg(benchmark_bars(made.llama())) == plain
        assert dict(matplotlib.rcParams) == changed
    assert dict(matplotlib.rcParams) == before


def test_no_window_is_ever_opened(made):
    import subprocess
    import sys

    code = "import sys; from downcycle.eval.report import figures; from downcycle.eval.results import Results; "
    code += "assert figures.layer_map(Results(())) is None; print([name for name in sys.modules if 'pyplot' in name])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(("value", "top"), [(0.3, 0.32), (1, 1), (1.01, 1.2), (7.93, 8), (42, 60), (99, 100), (101, 120), (2288, 2400)])
def test_axes_end_at_round_numbers(value, top):
    assert axis_top(value) == pytest.approx(top)


def test_long_names_lose_their_middle():
    assert shorten("abcdefghij", 10) == "abcdefghij"
    assert shorten("abcdefghijk", 10) == "abcd…ghijk"

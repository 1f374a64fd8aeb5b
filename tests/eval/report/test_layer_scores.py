"""What the figure of scores shows, read back from its artists, and that no words of it lie on others."""

import dataclasses
import functools
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest

from synthetic_scores import DEPTHS, UNCUT, make_scores

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import PathPatch  # noqa: E402

from downcycle.eval.report.drawing import INK, NARROW, PALETTE, WIDE, save_png, to_svg  # noqa: E402
from downcycle.eval.report.importance_panel import tick_words  # noqa: E402
from downcycle.eval.report.layer_columns import columns_of  # noqa: E402
from downcycle.eval.report.layer_scores import draw_scores  # noqa: E402
from downcycle.eval.report.loss_panel import LOOKS, is_log, log_ticks  # noqa: E402
from downcycle.eval.report.score_facts import losses_of, ways_of  # noqa: E402
from downcycle.surgery.importance.scores import Choice, Importance, Loss  # noqa: E402

SIZES = [(layers, width) for layers in DEPTHS for width in (WIDE, NARROW)]
LONG = "a rule or a metric with a name that is far too long to stand beside anything"
ODD = {
    "one layer": make_scores(2, 1, protect=()),
    "all kept": make_scores(12, 12),
    "no choices": make_scores(12, choices=()),
    "no triangle": make_scores(12, angular=()),
    "no metrics": make_scores(12, importance=()),
    "nothing": make_scores(12, importance=(), angular=(), choices=()),
    "long": make_scores(
        126,
        model=f"someone/{LONG}",
        importance=(Importance(LONG, LONG, tuple(float(n) for n in range(126))),),
        choices=tuple(dataclasses.replace(one, rule=f"{one.rule} {LONG}") for one in make_scores(126).choices),
        calibration={"text": f"{LONG}.parquet", "samples": 1_000_000, "length": 131_072},
    ),
    "alike": make_scores(12, importance=(Importance("m", "u", (2.0,) * 12),), choices=(Choice("r", tuple(range(9)), Loss(UNCUT, 0.0)),)),
    "unscored": make_scores(12, importance=(Importance("m", "u", (None,) * 12),)),
    "better than uncut": make_scores(
        12,
        choices=(Choice("r", tuple(range(9)), Loss(UNCUT + 5, 0.1), {"scale": Loss(UNCUT - 0.5, 0.01), "refit": Loss(UNCUT + 0.01, 0.3)}),),
    ),
    "many": make_scores(
        80,
        choices=tuple(
            Choice(f"rule {n}", tuple(range(n, 60 + n)), Loss(3.0 + n, 0.1), {f"way {m}": Loss(2.5 + m / 10, 0.1) for m in range(5)})
            for n in range(10)
        ),
    ),
}


@functools.cache
def scores_of(name):
    return ODD[name] if name in ODD else make_scores(name)


@functools.cache
def drawn(name, width=WIDE):
    return draw_scores(scores_of(name), width)


def drawn_texts(figure):
    found = [*figure.texts]
    for axes in [*figure.axes, *(child for one in figure.axes for child in one.child_axes)]:
        found += [*axes.texts, axes.title, axes.xaxis.label, axes.yaxis.label]
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            found += [tick.label1 for tick in axis.get_major_ticks() if low - 1e-9 <= tick.get_loc() <= high + 1e-9]
    return [text for text in found if text.get_text() and text.get_visible()]


def charts(figure, scores):
    """The axes of the metrics' charts."""
    return figure.axes[: len(scores.importance)]


def map_axes(figure, scores):
    return figure.axes[len(scores.importance)]


def loss_axes(figure):
    return figure.axes[-1]


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_every_score_is_a_dot_and_every_missing_one_a_cross(layers, width):
    scores, figure = scores_of(layers), drawn(layers, width)
    for axes, one in zip(charts(figure, scores), scores.importance, strict=True):
        _, dots, crosses = axes.lines
        assert dict(zip(*dots.get_data(), strict=True)) == {i: score for i, score in enumerate(one.scores) if score is not None}
        assert list(crosses.get_xdata()) == [i for i, score in enumerate(one.scores) if score is None]
        low, high = axes.get_ylim()
        assert all(low < score < high for score in one.scores if score is not None)
        assert 1 <= len(axes.get_yticks()) <= 6 and all(low <= tick <= high for tick in axes.get_yticks())


def test_scores_that_span_much_are_on_a_log_axis_which_is_said():
    spread, signed, flat = (tuple(10.0**n for n in range(6)), (-0.01, 0.0, 0.01, 0.02, 0.01, 40.0), (1.0, 2.0, 3.0, 4.0, 5.0, 6.0))
    metrics = tuple(Importance(name, "unit", one) for name, one in (("a", spread), ("b", signed), ("c", flat)))
    figure = draw_scores(make_scores(6, 4, importance=metrics))
    assert [axes.get_yscale() for axes in figure.axes[:3]] == ["log", "symlog", "linear"]
    said = [text.get_text() for text in figure.texts if "unit" in text.get_text() or "axis" in text.get_text()]
    assert said[:3] == ["unit, log axis", "unit, log axis, linear", "unit"] and "near 0" in [text.get_text() for text in figure.texts]


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_the_map_fills_what_is_kept(layers, width):
    scores = scores_of(layers)
    axes = map_axes(drawn(layers, width), scores)
    patches = [patch for patch in axes.patches if isinstance(patch, PathPatch)]
    assert len(patches) == 2 * len(scores.choices)
    for choice, kept, dropped in zip(scores.choices, patches[::2], patches[1::2], strict=True):
        assert to_hex(kept.get_facecolor()) == PALETTE[0] and kept.get_fill() and not dropped.get_fill()
        for layer in range(layers):
            middle = (layer, kept.get_path().vertices[:, 1].mean())
            assert kept.get_path().contains_point(middle) == (layer in choice.kept)
            assert dropped.get_path().contains_point(middle) == (layer not in choice.kept)


@pytest.mark.parametrize(("layers", "width"), SIZES)
def test_layers_have_the_same_column_everywhere_and_readable_numbers(layers, width):
    scores, figure = scores_of(layers), drawn(layers, width)
    across = {round(edge, 6) for axes in (*charts(figure, scores), map_axes(figure, scores)) for edge in axes.get_position().intervalx}
    assert len(across) == 2
    assert all(axes.get_xlim() == (-0.5, layers - 0.5) for axes in (*charts(figure, scores), map_axes(figure, scores)))
    axes, columns = map_axes(figure, scores), columns_of(layers, width)
    inside = [text for text in axes.texts if text.get_text().isdigit()]
    if inside:
        assert [text.get_text() for text in inside] == [str(n) for n in range(layers)] * len(scores.choices)
        assert all(text.get_position()[0] == int(text.get_text()) and text.get_size() >= 6.5 for text in inside)
    else:
        numbers = [int(label.get_text()) for label in axes.get_xticklabels()]
        assert numbers == list(axes.get_xticks()) and numbers[0] == 0 and len(numbers) >= 7
        assert (numbers[1] - numbers[0]) * columns.cell >= 0.24


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_loss_of_each_cut_stands_beside_its_row(width):
    scores, figure = scores_of(32), drawn(32, width)
    texts = {text.get_text().removesuffix(" nats"): text for text in figure.texts}
    for choice in scores.choices:
        said = texts[f"{choice.cut.loss:.3f}  {choice.cut.loss - UNCUT:+.3f}"]
        names = [
            text for text in figure.texts if text.get_text() == choice.rule and abs(text.get_position()[1] - said.get_position()[1]) < 2e-3
        ]
        assert [name.get_weight() for name in names] == [said.get_weight()] == ["bold" if choice.rule == "bi" else "normal"]


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_triangle_holds_every_distance_and_its_dot_the_least_of_the_asked_length(layers):
    scores = scores_of(layers)
    (axes,) = [axes for axes in drawn(layers).axes if axes.images]
    image = axes.images[0].get_array()
    for n in range(1, layers + 1):
        assert list(image[n - 1].compressed()) == list(scores.angular[n - 1])
        assert image.mask[n - 1].sum() == n - 1 and not image.mask[n - 1][: layers - n + 1].any()
    (dot,) = axes.lines
    drop = layers - DEPTHS[layers]
    row = scores.angular[drop - 1]
    assert (dot.get_xdata()[0], dot.get_ydata()[0]) == (row.index(min(row)), drop)
    left, right, bottom, top = axes.images[0].get_extent()
    assert (left, right, bottom, top) == (-0.5, layers - 0.5, layers + 0.5, 0.5)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_losses_are_dots_at_what_they_add(width):
    scores = scores_of(32)
    axes = loss_axes(drawn(32, width))
    assert axes.get_xscale() == "log"
    dots = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    wanted = [(way, loss.loss - UNCUT, loss.added_stderr) for choice in scores.choices for way, loss in losses_of(choice).items()]
    assert len(dots) == len(wanted)
    for dot, (way, added, _) in zip(dots, wanted, strict=True):
        assert dot.get_xdata()[0] == pytest.approx(added)
        assert (dot.get_marker(), dot.get_color()) == LOOKS[ways_of(scores).index(way)]
    whiskers = [list(line.get_xdata()) for line in axes.lines if line.get_linewidth() == 1.6]
    edge = axes.get_xlim()[0]
    assert whiskers == [pytest.approx([max(edge, added - stderr), added + stderr]) for _, added, stderr in wanted]
    assert len({marker for marker, _ in LOOKS}) == len({colour for _, colour in LOOKS}) == len(LOOKS)


def test_losses_of_one_size_are_on_a_plain_axis_with_the_whole_model_on_it():
    choices = tuple(Choice(f"r{n}", (0, 1, 2), Loss(UNCUT + 0.5 + n / 10, 0.05)) for n in range(3))
    scores = make_scores(4, choices=choices)
    axes = loss_axes(draw_scores(scores))
    assert not is_log(scores) and axes.get_xscale() == "linear"
    assert [list(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "--"] == [[0, 0]]
    low, high = axes.get_xlim()
    assert low < 0 and high > 0.7
    draw_scores(scores).draw_without_rendering()
    assert "uncut" in [label.get_text() for label in axes.get_xticklabels()]


def test_what_is_better_than_the_whole_model_is_an_arrow_at_the_edge_of_a_log_axis():
    axes = loss_axes(drawn("better than uncut"))
    dots = [line for line in axes.lines if line.get_marker() not in ("None", "", None)]
    assert [dot.get_marker() for dot in dots] == ["o", "<", "s"]
    assert dots[1].get_xdata()[0] == axes.get_xlim()[0]
    assert all(math.isfinite(value) for line in axes.lines for value in line.get_xdata())


@pytest.mark.parametrize(("low", "high"), [(0.01, 20), (2.0, 5.0), (0.3, 4.0), (1e-4, 1.0), (1.01, 1.4)])
def test_log_ticks_are_few_round_numbers_within(low, high):
    ticks = log_ticks(low, high)
    assert ticks == sorted(set(ticks)) and len(ticks) <= 5 and all(low <= tick <= high for tick in ticks)
    assert high / low < 1.5 or len(ticks) >= 2
    assert all(float(f"{tick:.1e}") == pytest.approx(tick) for tick in ticks)


@pytest.mark.parametrize(
    ("value", "words"), [(0.0, "0"), (1e-5, "1e-05"), (0.08, "0.08"), (150, "150"), (1.95e6, "1.95 M"), (-2e4, "-20 k"), (8.1015, "8.101")]
)
def test_ticks_are_short(value, words):
    assert tick_words(value) == words


@pytest.mark.parametrize(("name", "width"), [(name, width) for name in [*DEPTHS, *ODD] for width in (WIDE, NARROW)], ids=str)
def test_no_words_lie_on_others_or_leave_the_sheet(name, width, recwarn):
    figure = drawn(name, width)
    figure.canvas.draw()
    assert [str(warning.message) for warning in recwarn] == []
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in drawn_texts(figure)]
    across, down = figure.get_size_inches() * figure.dpi
    for said, box in boxes:
        assert box.x0 >= -1 and box.x1 <= across + 1 and box.y0 >= -1 and box.y1 <= down + 1, said
    for place, (said, box) in enumerate(boxes):
        for other, second in boxes[:place]:
            wide = min(box.x1, second.x1) - max(box.x0, second.x0)
            high = min(box.y1, second.y1) - max(box.y0, second.y0)
            assert wide <= 0.5 or high <= 2.5, (said, other)  # boxes are a little higher than the signs in them


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize("name", [4, 126, "nothing", "long", "many"])
def test_the_svg_is_whole_and_refers_to_nothing_outside(name, width):
    text = to_svg(drawn(name, width))
    root = ElementTree.fromstring(text)
    links = [value for element in root.iter() for key, value in element.attrib.items() if key.endswith("href")]
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in links)
    assert text.count("http") == 1 and INK not in text and not re.search(r"[=: ](nan|inf)\b", text)
    assert len(text) < 250_000


def test_the_same_scores_give_the_same_picture(tmp_path):
    figures = [drawn(12), draw_scores(make_scores(12))]
    for name, figure in zip("ab", figures, strict=True):
        save_png(figure, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert to_svg(figures[0]) == to_svg(figures[1])

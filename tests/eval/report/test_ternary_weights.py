"""The table and the figure of ternary weights show the numbers of the results, and nothing where there are none."""

import dataclasses
import json
import re

import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402

from downcycle.eval.report.drawing import NARROW, PALETTE, WIDE, to_svg  # noqa: E402
from downcycle.eval.report.page import page, write_report  # noqa: E402
from downcycle.eval.report.ternary_weights import ternary_figure, ternary_tables  # noqa: E402
from downcycle.eval.results import LayerWeights, Results, all_layers, parse_results, results_json  # noqa: E402

LAYERS = tuple(LayerWeights(layer, 300 + layer, 350 - layer, 350, 254, 2000, 0.5 + layer / 100, 3.0) for layer in range(8))


@pytest.fixture
def results(made):
    """A parent and a packed child, whose layer 5 was left as it was."""
    parent, packed = made.model("a/parent", layers=8), made.model("b/packed", "ternary", layers=8)
    return Results((parent, dataclasses.replace(packed, ternary=(*LAYERS[:5], *LAYERS[6:]))), "a machine", {}, "2026-11-22")


def with_layers(results, *layers):
    return dataclasses.replace(results, models=(results.models[0], dataclasses.replace(results.models[1], ternary=layers)))


def rows(html):
    return [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row) for row in re.findall(r"<tr.*?</tr>", html)]


def test_a_row_for_each_layer_and_one_for_all(results):
    head, *lines, whole = rows(ternary_tables(results))
    assert head == ["Layer", "−1", "0", "1", "Error", "Before", "After"]
    assert [line[0] for line in lines] == ["0", "1", "2", "3", "4", "6", "7"]
    assert lines[4] == ["4", "30.4%", "34.6%", "35.0%", "54.0%", "2 kB", "254 B"]
    total = all_layers(results.models[1].ternary)
    assert whole == ["All", f"{total.minus / 7000:.1%}", f"{total.zero / 7000:.1%}", "35.0%", f"{total.error:.1%}", "14 kB", "1.78 kB"]
    assert "packed" in ternary_tables(results) and "parent" not in ternary_tables(results)


def test_what_is_outside_of_layers_and_what_is_not_known(results):
    unknown = with_layers(results, dataclasses.replace(LAYERS[0], before=None, error=None, norm=None), LayerWeights(None, 1, 2, 1, 5))
    _, first, others, whole = rows(ternary_tables(unknown))
    assert (first[4:6], others[0], others[4:6], whole[4:6]) == (["–", "–"], "others", ["–", "–"], ["–", "–"])
    assert "is not on this machine" in ternary_tables(unknown)


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_stacked_bars_and_the_error_below(results, width):
    figure = ternary_figure(results, width)
    shares, errors = figure.axes
    layers = results.models[1].ternary
    for part, colour, container in zip(("minus", "zero", "plus"), (1, 6, 0), shares.containers, strict=True):
        assert [bar.get_height() for bar in container] == pytest.approx([getattr(one, part) / 1000 for one in layers])
        assert [bar.get_x() + bar.get_width() / 2 for bar in container] == pytest.approx([one.layer for one in layers])
        assert {to_hex(bar.get_facecolor()) for bar in container} == {PALETTE[colour]}
    assert [bar.get_y() + bar.get_height() for bar in shares.containers[2]] == pytest.approx([1.0] * 7)
    line, dots = errors.lines
    assert list(line.get_ydata()) == list(dots.get_ydata()) == [one.error for one in layers]
    assert list(dots.get_xdata()) == [one.layer for one in layers]
    assert errors.get_ylim()[1] > max(one.error for one in layers)
    assert shares.get_xlim() == errors.get_xlim() == (-0.5, 7.5)
    whole = all_layers(layers)
    assert f"Ternary weights of packed: −1: {whole.minus / 7000:.1%}" in to_svg(figure) and f"error {whole.error:.1%}" in to_svg(figure)
    assert to_svg(figure) == to_svg(ternary_figure(results, width))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_without_the_source_only_the_shares(results, width):
    unknown = with_layers(results, *(dataclasses.replace(one, before=None, error=None, norm=None) for one in LAYERS))
    (shares,) = ternary_figure(unknown, width).axes
    assert len(shares.containers) == 3


@pytest.mark.parametrize("depth", [1, 126])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_words_stay_on_the_sheet(results, depth, width):
    layers = with_layers(results, *(dataclasses.replace(LAYERS[0], layer=layer, error=0.0) for layer in range(depth)))
    figure = ternary_figure(layers, width)
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for part in (figure, *figure.axes) for text in part.texts if text.get_text()]
    boxes += [label.get_window_extent() for axes in figure.axes for label in (*axes.get_xticklabels(), *axes.get_yticklabels())]
    assert all(box.x0 >= figure.bbox.x0 - 1 and box.x1 <= figure.bbox.x1 + 1 for box in boxes)
    assert all(box.y0 >= figure.bbox.y0 - 1 and box.y1 <= figure.bbox.y1 + 1 for box in boxes)


def test_models_that_are_not_packed_have_no_part_of_it(made, tmp_path):
    results = Results(made.llama().models[:2], "a machine")
    assert ternary_tables(results) == "" and ternary_figure(results) is None
    assert 'id="ternary"' not in page(results)
    assert not any(path.name == "ternary.png" for path in write_report(results, tmp_path / "report"))


def test_the_page_and_its_files(results, tmp_path):
    written = {path.name for path in write_report(results, tmp_path / "report")}
    assert "ternary.png" in written
    text = (tmp_path / "report" / "report.html").read_text()
    assert "<h2>Ternary weights</h2>" in text and text.count('id="figure-ternary"') == 1
    assert "<small>" not in ternary_tables(results)


def test_results_are_read_back_and_those_of_earlier_releases_too(results):
    assert parse_results(json.loads(results_json(results))) == results
    older = json.loads(results_json(results))
    for model in older["models"]:
        del model["ternary"]
    assert all(model.ternary == () for model in parse_results(older).models)


def test_names_are_inert(results):
    bad = dataclasses.replace(results.models[1], name="<script>x</script>")
    assert "<script>" not in ternary_tables(dataclasses.replace(results, models=(results.models[0], bad)))

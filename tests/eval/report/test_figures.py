"""What the figures show, read back from their artists."""

import dataclasses
import math

import pytest

pytest.importorskip("matplotlib")
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.patches import Rectangle  # noqa: E402

from downcycle.eval.report.drawing import NARROW, PALETTE, WIDE, to_svg  # noqa: E402
from downcycle.eval.report.figures import FIGURES, benchmark_bars, layer_map, loss_curve, perplexity_bars, size_and_speed  # noqa: E402
from downcycle.eval.report.loss_curve import loss_rows, thin  # noqa: E402
from downcycle.eval.results import Logged, Results, Score  # noqa: E402


def texts(figure):
    return [text.get_text() for part in (figure, *figure.axes) for text in part.texts]


def bars(axes):
    """(colour, where it begins, where it ends) of each bar, from the top."""
    found = [bar for container in axes.containers for bar in container]
    return [(to_hex(bar.get_facecolor()), bar.get_x(), bar.get_x() + bar.get_width()) for bar in sorted(found, key=lambda bar: bar.get_y())]


def lines(axes):
    """Where each whisker and each of its caps begins and ends; no other line is drawn where guessing scores nothing."""
    return [list(line.get_xdata()) for line in axes.lines]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_bars_are_as_long_as_the_scores_and_of_the_models_colours(made, width):
    results = made.llama()
    (axes,) = benchmark_bars(results, width).axes
    scores = [[score.value for score in model.scores] for model in results.models]
    wanted = [100 * one[i] for i in range(6) for one in scores] + [100 * sum(one) / 6 for one in scores]
    assert [end for _, _, end in bars(axes)] == pytest.approx(wanted)
    assert {begin for _, begin, _ in bars(axes)} == {0}
    assert [colour for colour, _, _ in bars(axes)] == list(PALETTE[:3]) * 7
    assert axes.get_xlim()[0] == 0


def test_whiskers_are_one_standard_error_each_way(made):
    score = made.score("mmlu", 0.6, stderr=0.05)
    (axes,) = benchmark_bars(Results((made.model("a", scores=(score,)),))).axes
    whisker, *caps = lines(axes)[:3]
    assert whisker == pytest.approx([55, 65]) and caps == [pytest.approx([55, 55]), pytest.approx([65, 65])]


@pytest.mark.parametrize("width", [WIDE, NARROW])
@pytest.mark.parametrize(("value", "ends", "cap"), [(0.95, (65, 100), 65), (0.05, (0, 35), 35)])
def test_a_whisker_stays_on_its_axis_and_before_the_words(made, width, value, ends, cap):
    figure = benchmark_bars(Results((made.model("a", scores=(made.score("gsm8k", value, stderr=0.3),)),)), width)
    (axes,) = figure.axes
    assert lines(axes) == [pytest.approx(ends), pytest.approx([cap, cap])]  # where it is cut off, no cap
    figure.draw_without_rendering()
    (words,) = [text.get_window_extent() for text in axes.texts if text.get_text() == f"{100 * value:.1f}"]
    assert words.x0 > axes.transData.transform((ends[1], 0))[0] and words.x1 < figure.bbox.x1


def test_a_whisker_below_nothing_is_whole(made):
    score = Score("m", "M", "ll", -1.0, 0.25, None, 9, None, "1", True, None, "m")
    (axes,) = benchmark_bars(Results((made.model("a", scores=(score,)),))).axes
    assert lines(axes) == [[-1.25, -0.75], [-1.25, -1.25], [-0.75, -0.75]]
    assert axes.get_xlim()[0] <= -1.25


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_part_of_a_benchmark_is_named_so(made, width):
    scores = made.score("mmlu", 0.5, limit=3), made.score("gsm8k", 0.4, limit=3)
    said = ", ".join(texts(benchmark_bars(Results((made.model("a", scores=scores),)), width)))
    for wanted in ("MMLU, 5 shots, first 3", "GSM8K, 5 shots, first 3", "Average, openllm, first 3"):
        assert wanted in said
    assert "first" not in ", ".join(texts(benchmark_bars(made.llama(), width)))


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_a_long_title_takes_two_lines_that_touch_nothing(made, width):
    text = "built-in held-out text, first 3 documents"
    models = made.model("a", perplexity=(made.perplexity(2.0, text=text), made.perplexity(2.1, text="other " + text)))
    figure = perplexity_bars(Results((models,)), width)
    (axes,) = figure.axes
    said = [one for one in axes.texts if not one.get_text()[0].isdigit()]
    comma = "" if width == WIDE else ","
    assert " ".join(one.get_text() for one in said).startswith(f"{text}{comma} window 2,048")
    figure.draw_without_rendering()
    boxes = [one.get_window_extent() for one in said]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.x1 for box in boxes)
    places = sorted(boxes, key=lambda box: -box.y0)
    assert all(above.y0 >= below.y1 - 1 for above, below in zip(places, places[1:], strict=False))
    drawn = [patch.get_window_extent() for container in axes.containers for patch in container]
    assert len(drawn) == 2 and not [bar for bar in drawn if bar.count_overlaps(boxes)]


def test_the_words_of_a_small_map_stand_at_its_end(made):
    figure = layer_map(Results((made.model("demo", layers=12), made.model("child", "cut", tuple(range(9)), 12))))
    (axes,) = figure.axes
    figure.draw_without_rendering()
    end = max(patch.get_window_extent().x1 for patch in axes.patches)
    captions = [text.get_window_extent().x1 for text in axes.texts if "layers" in text.get_text()]
    assert captions == [pytest.approx(end, abs=3)] * 2
    tiny = layer_map(Results((made.model("a-name", layers=2), made.model("another-name", "cut", (0,), 2))))
    below = {text.get_text(): text.get_position() for text in tiny.axes[0].texts}
    assert below["1 of 2 layers kept"][0] == below["another-name"][0] and below["1 of 2 layers kept"][1] > below["another-name"][1]


def test_chance_is_marked_and_no_line_crosses_words(made):
    models = made.model("a", scores=(made.score("winogrande", 0.9),)), made.model("b", scores=(made.score("winogrande", 0.4),))
    (axes,) = benchmark_bars(Results(models)).axes
    marks = [line for line in axes.lines if list(line.get_xdata()) == [50, 50]]
    assert len(marks) == 2  # above the group and across the first bar; the words of the second stand there
    assert "dashed: chance" in axes.get_xlabel()
    (plain,) = benchmark_bars(Results((made.model("a", scores=(made.score("gsm8k", 0.4),)),))).axes
    assert "chance" not in plain.get_xlabel()


def test_what_is_left_is_written_behind_the_bar(made):
    said = texts(benchmark_bars(made.llama()))
    assert {"66.7", "51.2 · 76.8%", "58.8 · 88.2%", "63.4", "50.3 · 79.3%"} <= set(said)


def test_other_metrics_have_axes_of_their_own(made):
    def scores(low, log):
        return (
            made.score("mmlu", 0.5),
            Score("l", "L", "perplexity", low, 0.1, 0, 9, None, "1", False, None, "l"),
            Score("m", "M", "ll", log, None, None, 9, None, "1", True, None, "m"),
        )

    results = Results((made.model("a", scores=scores(3.0, -1.0)), made.model("b", scores=scores(12.0, -3.0))))
    percent, low, log = benchmark_bars(results).axes
    assert (low.get_xlabel(), log.get_xlabel()) == ("lower is better", "higher is better")
    assert [end for _, _, end in bars(low)] == [3, 12]
    assert "12.00 · 25.0%" in texts(benchmark_bars(results))
    assert sorted(end + begin for _, begin, end in bars(log)) == [-3, -1]
    assert log.get_xlim()[0] <= -3


def test_a_score_of_zero_is_drawn(made):
    results = Results((made.model("a", scores=(made.score("gsm8k", 0.0),)), made.model("b", scores=(made.score("gsm8k", 0.0),))))
    (axes,) = benchmark_bars(results).axes
    assert [end for _, _, end in bars(axes)] == [0, 0]
    assert {"0.0"} <= set(texts(benchmark_bars(results)))


def test_perplexities_of_one_size_stand_on_a_plain_axis(made):
    models = made.model("a", perplexity=(made.perplexity(2.0),)), made.model("b", perplexity=(made.perplexity(2.2),))
    (axes,) = perplexity_bars(Results(models)).axes
    assert axes.get_xscale() == "linear" and axes.get_xlim()[0] == 0
    assert [end for _, _, end in bars(axes)] == pytest.approx([math.exp(2.0), math.exp(2.2)])


@pytest.mark.parametrize("loss", [7.735, 25.0, 300.0])
@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_perplexities_far_apart_stand_on_a_log_axis_from_one(made, loss, width):
    models = made.model("a", perplexity=(made.perplexity(1.8),)), made.model("b", perplexity=(made.perplexity(loss),))
    figure = perplexity_bars(Results(models), width)
    (axes,) = figure.axes
    assert axes.get_xscale() == "log" and "log axis" in axes.get_xlabel()
    assert {begin for _, begin, _ in bars(axes)} == {1}
    assert [math.log(end) for _, _, end in bars(axes)] == pytest.approx([1.8, loss])
    assert axes.get_xlim()[0] == 1 and axes.get_xlim()[1] > math.exp(loss)
    assert 1 <= len(axes.get_xticks()) <= 7
    to_svg(figure)


def test_bits_per_byte_stand_for_models_of_other_tokenizers(made):
    one, two = made.perplexity(1.9), made.perplexity(2.1, tokens=200000)
    (axes,) = perplexity_bars(Results((made.model("a", perplexity=(one,)), made.model("b", perplexity=(two,))))).axes
    assert [end for _, _, end in bars(axes)] == [one.bits_per_byte, two.bits_per_byte]
    assert "bits per byte" in axes.get_xlabel() and "tokenizers differ" in axes.get_xlabel()


def cells(figure):
    """(layer, colour or none) of each cell, in the order drawn, and the words on top of it."""
    (axes,) = figure.axes
    boxes = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    return ["none" if box.get_facecolor()[3] == 0 else to_hex(box.get_facecolor()) for box in boxes]


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_the_map_fills_the_layers_that_were_kept(made, width):
    figure = layer_map(made.llama(), width)
    cut = [PALETTE[1]] * 24 + ["none"] * 8
    assert cells(figure) == [PALETTE[0]] * 32 + cut + [PALETTE[2]] * 24 + ["none"] * 8
    numbers = [text for text in texts(figure) if text.isdigit()]
    assert numbers == [str(layer) for layer in range(32)] * 3
    assert texts(figure).count("24 of 32 layers kept") == 2


@pytest.mark.parametrize("width", [WIDE, NARROW])
def test_numbers_fit_their_layers_at_126(made, width):
    figure = layer_map(made.many(), width)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    boxes = [patch.get_window_extent() for patch in axes.patches]
    numbers = [text.get_window_extent() for text in axes.texts if text.get_text().isdigit()]
    assert len(boxes) == len(numbers) == 7 * 126
    for box, number in zip(boxes, numbers, strict=True):
        assert box.x0 < number.x0 and number.x1 < box.x1 and box.y0 < number.y0 and number.y1 < box.y1
    edge = figure.bbox
    assert all(box.x0 >= 0 and box.x1 <= edge.x1 and box.y0 >= 0 for box in boxes)


def test_a_layer_kept_twice_says_so(made):
    solar = made.model("solar", "cut", (*range(24), *range(8, 32)), 32)
    said = texts(layer_map(Results((made.llama().models[0], solar))))
    assert said.count("×2") == 16
    assert "32 of 32 layers kept, 48 in all" in said


def test_models_of_other_depths_have_rows_of_their_own_length(made):
    results = Results((made.model("a", "cut", (0, 2), 4), made.model("b", "cut", (0,), 2), made.model("c", "model", layers=9)))
    assert cells(layer_map(results)) == [PALETTE[0], "none", PALETTE[0], "none", PALETTE[1], "none"]


def test_losses_are_drawn_where_they_were_logged(made):
    log = (Logged(10, 0.5, 3.0), Logged(20, 1.0, 2.8), Logged(20, 1.0, None, 2.9), Logged(40, 2.0, 2.5))
    figure = loss_curve(Results((made.model("a"), made.model("b", training=log))))
    (axes,) = figure.axes
    training, held_out = axes.lines[:2]
    assert list(zip(*training.get_data(), strict=True)) == [(10, 3.0), (20, 2.8), (40, 2.5)]
    assert list(zip(*held_out.get_data(), strict=True)) == [(20, 2.9)]
    assert {to_hex(line.get_color()) for line in (training, held_out)} == {PALETTE[1]}
    assert "Nats per token. Line: training text; points: held-out text." in " ".join(texts(figure))
    plain = loss_curve(Results((made.model("b", training=log[:2]),)))
    assert "Nats per token. Line: training text." in " ".join(texts(plain))
    marks = {text.get_text(): text.get_position()[0] for text in axes.texts}
    assert marks == {"epoch 1": 20, "epoch 2": 40}


def test_first_losses_that_would_flatten_the_rest_are_said(made):
    figure = loss_curve(made.llama())
    (axes,) = figure.axes
    assert axes.get_ylim()[1] < 4
    assert any("up to 7.18 at step 1." in text for text in texts(figure))
    low = loss_curve(Results((made.model("a", training=(Logged(1, 0.1, 3.0), Logged(2, 0.2, 2.9))),)))
    assert not any("Above the picture" in text for text in texts(low))


def test_losses_that_are_no_number_are_left_out(made):
    log = (Logged(1, 0.1, math.nan), Logged(2, 0.2, 2.0), Logged(3, 0.3, math.inf, 2.5))
    (axes,) = loss_curve(Results((made.model("a", training=log),))).axes
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[2.0], [2.5]]
    assert [(row.step, row.loss, row.eval_loss) for row in loss_rows(log)] == [(3, 2.0, 2.5)]


def test_epochs_of_other_lengths_are_not_marked(made):
    logs = [(Logged(10, 1.0, 2.0), Logged(steps, 2.0, 1.9)) for steps in (20, 40)]
    (axes,) = loss_curve(Results(tuple(made.model(str(i), training=log) for i, log in enumerate(logs)))).axes
    assert not axes.texts


def test_a_long_log_is_drawn_as_means():
    points = [(step, float(step % 2)) for step in range(1, 46937)]
    line = thin(points)
    assert len(line) == 500
    assert all(0.49 < loss < 0.51 for _, loss in line)
    assert sum(loss for _, loss in line) / 500 == pytest.approx(0.5, abs=1e-3)
    assert thin(points[:3]) == points[:3]


def test_rows_of_a_log(made):
    rows = loss_rows(made.healing())
    assert [(row.step, row.eval_loss) for row in rows] == list(made.HEALING.items())
    assert [row.loss for row in rows[:1]] == [None]
    before = max((entry for entry in made.healing() if entry.loss is not None and entry.step <= 5867), key=lambda entry: entry.step)
    assert rows[1].loss == before.loss
    plain = [Logged(step, step / 1000, 1.0) for step in range(1, 1001)]
    short = loss_rows(plain)
    assert (len(short), short[0].step, short[-1].step) == (24, 1, 1000)


def test_sizes_and_rates_stand_side_by_side(made):
    figure = size_and_speed(made.llama())
    assert len(figure.axes) == 5
    assert [[round(end) for _, _, end in bars(axes)] for axes in figure.axes[:2]] == [
        [8030261248, 6285365248, 6285365248],
        [16060522496, 12570730496, 12570730496],
    ]
    assert {"8.03 B", "6.29 B · 78.3%", "16.1 GB", "5,120", "52.82 · 128.2%"} <= set(texts(figure))
    slow = dataclasses.replace(made.llama(), models=tuple(dataclasses.replace(one, speed=None) for one in made.llama().models))
    assert len(size_and_speed(slow).axes) == 2


def test_there_is_no_figure_of_nothing(made):
    alone = Results((made.model("a"),))
    assert [name for name, draw in FIGURES.items() if draw(alone, WIDE)] == []
    pair = Results((made.model("a"), made.model("b", "model")))
    assert [name for name, draw in FIGURES.items() if draw(pair, WIDE)] == ["speed"]


def test_ten_models_differ_in_colour_or_pattern(made):
    models = [made.model(str(n), scores=(made.score("mmlu", 0.5),)) for n in range(10)]
    (axes,) = benchmark_bars(Results(tuple(models))).axes
    looks = {(bar.get_facecolor(), bar.get_hatch()) for container in axes.containers for bar in container}
    assert len(looks) == 10

"""What follows from scores of layers: the least losses, the block that was asked for, scales, commands."""

import dataclasses
import math
import shlex

import pytest

from downcycle import DowncycleError
from downcycle.eval.report.score_facts import (
    asked_block,
    best_choice,
    best_cut,
    best_way,
    check_finite_scores,
    cut_command,
    heights,
    kept_words,
    least_important,
    scale_of,
    setting_words,
    ways_of,
    won_back,
)
from downcycle.surgery.choose import parse_layers
from downcycle.surgery.importance.scores import Choice, Importance, Loss

from synthetic_scores import DEPTHS, UNCUT, make_scores


def importance(*scores):
    return Importance("m", "u", scores)


def choice(cut, kept=(0,), rule="r", **parts):
    return Choice(rule, kept, Loss(cut, 0.1), **parts)


def test_the_least_loss_wins_in_whichever_way_it_is_reached():
    plain = choice(2.5, rule="plain")
    mended = choice(3.0, rule="mended", compensated={"scale": Loss(2.9, 0.1), "refit": Loss(2.4, 0.1)})
    scores = make_scores(4, choices=(plain, mended))
    assert best_choice(scores) is mended and best_way(mended) == "refit"
    assert best_cut(scores) is plain and best_way(plain) == "cut"
    none = make_scores(4, choices=())
    assert best_choice(none) is None and best_cut(none) is None and ways_of(none) == ["cut"]


def test_a_method_that_gains_nothing_is_not_the_best_way():
    assert best_way(choice(2.5, compensated={"scale": Loss(2.5, 0.1)}, kept_plain={"scale": "no gain"})) == "cut"


def test_every_way_is_named_once_tried_or_refused():
    one = choice(2.5, compensated={"refit": Loss(2, 0.1), "other": Loss(2, 0.1)})
    other = choice(2.5, refused={"scale": "no"}, kept_plain={"refit": "no"})
    assert ways_of(make_scores(4, choices=(one, other))) == ["cut", "scale", "refit", "other"]


def test_the_share_that_is_won_back():
    one = choice(3.0, compensated={"refit": Loss(2.25, 0.1)})
    assert won_back(one, "refit", Loss(2.0, 0.1)) == 0.75
    assert won_back(one, "cut", Loss(2.0, 0.1)) is None
    assert won_back(one, "refit", Loss(3.0, 0.1)) is None


def test_the_asked_block_is_the_one_that_angular_drops():
    triangle = ((0.5, 0.1, 0.4, 0.3), (0.5, 0.4, 0.1), (0.6, 0.3), (0.9,))
    chosen = (choice(2.5, (2, 3), "bi"), choice(2.5, (0, 3), "angular"))
    scores = make_scores(4, 2, angular=triangle, choices=chosen, protect=())
    assert asked_block(scores) == (1, 2, 0.4)
    assert asked_block(dataclasses.replace(scores, choices=chosen[:1])) == (2, 2, 0.1)
    assert asked_block(dataclasses.replace(scores, choices=(), protect=(3,))) == (1, 2, 0.4)
    assert asked_block(dataclasses.replace(scores, choices=(), protect=(1, 2))) == (2, 2, 0.1)  # none is free
    assert asked_block(dataclasses.replace(scores, keep=4)) is None
    assert asked_block(dataclasses.replace(scores, angular=())) is None
    scattered = choice(2.5, (1, 3), "angular")
    assert asked_block(dataclasses.replace(scores, choices=(scattered,))) == (2, 2, 0.1)
    even = ((0.2, 0.2, 0.2, 0.3),)
    assert asked_block(dataclasses.replace(scores, keep=3, angular=even, choices=())) == (2, 1, 0.2)  # of equal ones the last


@pytest.mark.parametrize("layers", DEPTHS)
def test_the_asked_block_of_real_shapes_is_the_least_of_its_row(layers):
    block = asked_block(make_scores(layers))
    assert block.length == layers - DEPTHS[layers]
    assert block.distance == min(make_scores(layers).angular[block.length - 1])


def test_which_layers_matter_least():
    one = importance(3.0, None, 1.0, 2.0, 1.0)
    assert least_important(one, 3) == [4, 2, 3]  # of equal ones the last first
    assert least_important(one, 9) == [4, 2, 3, 0]


@pytest.mark.parametrize(
    ("scores", "wanted"),
    [
        ((1.0, 2.0, 30.0), ("linear", 0.0)),
        ((1.0, 2.0, 31.0), ("log", 0.0)),
        ((1.0, None, 31.0), ("log", 0.0)),
        ((-1.0, 0.5, 31.0, 0.9, 0.0), ("symlog", 1.0)),
        ((-1.0, 2.0, 3.0), ("linear", 0.0)),
        ((0.0, 0.0), ("linear", 0.0)),
        ((None, None), ("linear", 0.0)),
        ((-5.0, -1.0), ("linear", 0.0)),
    ],
)
def test_scores_that_span_much_are_on_a_log_scale(scores, wanted):
    assert scale_of(importance(*scores)) == wanted


def test_heights_go_from_the_least_to_the_most():
    assert heights(importance(1.0, None, 10.0, 100.0)) == pytest.approx([0.0, None, 0.5, 1.0])
    assert heights(importance(2.0, 3.0, 4.0)) == [0.0, 0.5, 1.0]
    assert heights(importance(2.0, 2.0)) == [0.0, 0.0]
    assert heights(importance(None)) == [None]
    curve = heights(importance(-1.0, -0.1, 0.0, 0.1, 100.0))
    assert curve == sorted(curve) and curve[0] == 0 and curve[-1] == 1


def test_commands_can_be_typed():
    scores = make_scores(32, model="my models/it's", revision=None, load="stored")
    chosen = {one.rule: one for one in scores.choices}
    said = shlex.join(cut_command(scores, chosen["bi"], "refit"))
    assert said.startswith("downcycle --src 'my models/it'\"'\"'s' --keep 24 --select bi --calibrate fineweb-calibration.parquet ")
    assert "--length 2048 --seed 42 --protect 0,31 --compensate" in said and "--samples" not in said  # 64 as ever
    assert shlex.split(said)[-2:] == ["--compensate", "refit"]
    assert cut_command(scores, chosen["first"])[3:] == ["--keep", "24", "--select", "first"]  # needs no text
    assert cut_command(scores, chosen["first"], "scale")[-4:] == ["--seed", "42", "--compensate", "scale"]
    assert "--protect" not in cut_command(scores, chosen["first"], "scale")
    assert "--compensate" not in cut_command(scores, chosen["ppl"])
    text = {"text": "built-in text to heal on", "samples": 8, "length": 512, "seed": 0}
    plain = make_scores(4, calibration=text, protect=None, load="stored")
    assert shlex.join(cut_command(plain, plain.choices[0])).endswith(" --keep 3 --select bi --calibrate demo --samples 8")
    assert cut_command(dataclasses.replace(plain, protect=()), plain.choices[0])[-2:] == ["--protect", "none"]
    assert cut_command(dataclasses.replace(plain, load="nf4"), plain.choices[0])[-2:] == ["--load", "nf4"]
    assert cut_command(make_scores(32), chosen["ppl"])[3:5] == ["--revision", make_scores(32).revision]


def test_kept_layers_read_back():
    kept = (0, 1, 2, 5, 7, 8)
    assert kept_words(choice(2.0, kept)) == "0-2, 5, 7-8"
    assert parse_layers(kept_words(choice(2.0, kept)), 9) == list(kept)


def test_the_setting_in_words():
    assert setting_words(make_scores(4)) == "fineweb-calibration.parquet, 64 samples of 2,048 tokens; weights in bf16, on cuda"
    assert setting_words(make_scores(4, calibration={"text": "a.txt"}, load="stored")) == "a.txt; weights as stored, on cuda"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda bad: {"uncut": Loss(bad, 0.1)}, r"\.uncut\.loss"),
        (lambda bad: {"importance": (importance(1.0, bad),)}, r"\.importance\[0\]\.scores\[1\]"),
        (lambda bad: {"angular": ((0.1, bad),)}, r"\.angular\[0\]\[1\]"),
        (lambda bad: {"choices": (choice(2.0, compensated={"refit": Loss(1.0, bad)}),)}, r"\.choices\[0\]\.compensated\.refit\.stderr"),
    ],
)
def test_a_number_that_is_none_is_named(change, where, bad):
    with pytest.raises(DowncycleError, match=rf"^meta-llama/Meta-Llama-3-8B: scores{where} is {bad}, no finite number; measure again$"):
        check_finite_scores(make_scores(4, **change(bad)))


def test_finite_scores_pass():
    assert check_finite_scores(scores := make_scores(12)) is scores and scores.uncut.loss == UNCUT

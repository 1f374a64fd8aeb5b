"""The rules drop what has the lowest score, keep what is protected, and refuse what cannot be."""

import itertools
import random

import pytest

from downcycle import DowncycleError
from downcycle.surgery.importance.rules import RULES, choose_by, parse_protected, protected_layers

SCORED = [name for name, rule in RULES.items() if rule.choose is not None]


def _triangle(layers, seed=0):
    rng = random.Random(seed)
    return [[rng.random() for _ in range(layers - size)] for size in range(layers)]


def _measured(rule, layers, seed=0):
    return _triangle(layers, seed) if rule == "angular" else _triangle(layers, seed)[0]


def test_the_rules():
    assert list(RULES) == ["bi", "angular", "ppl", "taylor", "magnitude"]
    assert SCORED == ["bi", "angular", "taylor", "magnitude"]


@pytest.mark.parametrize("rule", SCORED)
def test_every_rule_keeps_so_many_layers_in_order_and_all_protected(rule):
    for layers in (1, 2, 5, 12, 32):
        for keep in range(1, layers + 1):
            kept = choose_by(rule, layers, keep, _measured(rule, layers, keep))
            assert len(kept) == keep
            assert kept == sorted(set(kept))
            assert set(protected_layers(rule, layers, keep)) <= set(kept) <= set(range(layers))


@pytest.mark.parametrize("seed", range(20))
def test_no_other_choice_drops_less_score(seed):
    scores, keep = _measured("bi", 9, seed), 1 + seed % 9
    for protect in ((), (0, 8)[:keep], (4,)):
        kept = choose_by("bi", 9, keep, scores, protect)
        best = max((set(some) for some in itertools.combinations(range(9), keep) if set(protect) <= set(some)),
                   key=lambda some: sum(scores[layer] for layer in some))  # fmt: skip
        assert set(kept) == best


@pytest.mark.parametrize("seed", range(20))
def test_no_other_block_is_nearer(seed):
    triangle, size = _triangle(9, seed), 1 + seed % 8
    for protect in ((), None, (0,), (8,)):
        kept = choose_by("angular", 9, 9 - size, triangle, protect)
        dropped = sorted(set(range(9)) - set(kept))
        assert dropped == list(range(dropped[0], dropped[0] + size))
        stay = {8} if protect is None else set(protect)
        free = [start for start in range(9 - size + 1) if not stay & set(range(start, start + size))]
        assert triangle[size - 1][dropped[0]] == min(triangle[size - 1][start] for start in free)


def test_published_taylor_choice():
    # The order of the scores that are published for Llama 2 7B, lowest first; Taylor+ drops the first of it that is not protected.
    order = [0, 28, 27, 25, 29, 26, 24, 23, 21, 22, 30, 20, 19, 18, 17, 14, 16, 13, 12, 15, 31, 11, 10, 1, 9, 8, 7, 6, 5, 2, 4, 3]
    scores = [float(order.index(layer)) for layer in range(32)]
    dropped = set(range(32)) - set(choose_by("taylor", 32, 25, scores))
    assert dropped == {28, 27, 25, 29, 26, 24, 23}
    assert 0 not in choose_by("taylor", 32, 25, scores, ())


def test_the_last_layer_stays_by_angle_unless_protect_says_otherwise():
    triangle = [[0.5] * (6 - size) for size in range(6)]
    triangle[1][4], triangle[1][2] = 0.1, 0.2  # layers 4-5 are the nearest of all, then 2-3
    assert choose_by("angular", 6, 4, triangle) == [0, 1, 4, 5]
    assert choose_by("angular", 6, 4, triangle, ()) == [0, 1, 2, 3]
    assert choose_by("angular", 6, 1, triangle) == [5]


def test_of_equals_the_later_goes():
    assert choose_by("bi", 6, 4, [1.0] * 6) == [0, 1, 2, 3]
    assert choose_by("bi", 6, 4, [1.0] * 6, (4, 5)) == [0, 1, 4, 5]
    assert choose_by("bi", 6, 5, [0.5, 0.2, 0.5, 0.2, 0.5, 0.5]) == [0, 1, 2, 4, 5]
    assert choose_by("angular", 6, 4, [[0.5] * (6 - size) for size in range(6)]) == [0, 1, 2, 5]


@pytest.mark.parametrize(
    ("rule", "layers", "keep", "expected"),
    [
        ("bi", 32, 24, ()),
        ("angular", 32, 24, (31,)),
        ("ppl", 32, 24, (0, 31)),
        ("taylor", 32, 24, (0, 1, 2, 3, 30, 31)),
        ("magnitude", 18, 14, (0, 1, 2, 3, 16, 17)),
        ("taylor", 12, 9, (0, 1, 2, 3, 10, 11)),
        ("taylor", 12, 6, (0, 1, 2, 3, 10, 11)),
        ("taylor", 12, 5, (0, 1, 2, 10, 11)),
        ("taylor", 12, 4, (0, 1, 10, 11)),
        ("taylor", 12, 3, (0, 1, 11)),
        ("taylor", 12, 2, (0, 11)),
        ("taylor", 12, 1, (0,)),
        ("taylor", 4, 4, (0, 1, 2, 3)),
        ("ppl", 12, 1, (0,)),
        ("angular", 1, 1, (0,)),
    ],
)
def test_what_stays_by_default(rule, layers, keep, expected):
    assert protected_layers(rule, layers, keep) == expected


def test_protect_replaces_the_defaults():
    assert protected_layers("taylor", 12, 9, ()) == ()
    assert protected_layers("taylor", 12, 9, [7, 2, 7]) == (2, 7)
    assert choose_by("taylor", 12, 2, [*range(12)], [0, 1]) == [0, 1]


@pytest.mark.parametrize(
    ("text", "layers"), [("0-3,30,31", (0, 1, 2, 3, 30, 31)), ("31, 0", (0, 31)), ("5,5", (5,)), ("none", ()), (" none ", ())]
)
def test_protect_is_read(text, layers):
    assert parse_protected(text, 32) == layers


@pytest.mark.parametrize("text", ["", "all", "3-1", "32", "0-32", "-1", "None,1", "0;1"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(DowncycleError, match="--protect") as refusal:
        parse_protected(text, 32)
    assert "--layers" not in str(refusal.value)


def test_a_protected_layer_that_does_not_exist():
    message = r"--protect 40: layer 40 does not exist; the model has 32 layers \(0-31\). Try --protect 0,31"
    with pytest.raises(DowncycleError, match=message):
        parse_protected("40", 32)
    with pytest.raises(DowncycleError, match=message):
        protected_layers("bi", 32, 24, [40])
    with pytest.raises(DowncycleError, match="--protect -1"):
        protected_layers("bi", 32, 24, [-1])


def test_more_protected_than_kept():
    with pytest.raises(DowncycleError, match=r"--protect 0-3,30-31: 6 layers must stay, but --keep 5 keeps fewer; protect fewer"):
        choose_by("bi", 32, 5, [0.5] * 32, [0, 1, 2, 3, 30, 31])
    assert choose_by("bi", 32, 6, [0.5] * 32, [0, 1, 2, 3, 30, 31]) == [0, 1, 2, 3, 30, 31]


def test_no_block_without_a_protected_layer():
    with pytest.raises(DowncycleError, match=r"--select angular: no 4 layers in a row are free of the protected 3,7; --protect fewer"):
        choose_by("angular", 11, 7, _triangle(11), [3, 7])
    assert choose_by("angular", 11, 8, _triangle(11), [3, 7])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("keep", [0, -1, 13])
def test_too_few_or_too_many(rule, keep):
    with pytest.raises(DowncycleError, match=rf"--keep {keep}: the model has 12 layers; keep between 1 and 12"):
        protected_layers(rule, 12, keep)
    if rule in SCORED:
        with pytest.raises(DowncycleError, match=rf"--keep {keep}: "):
            choose_by(rule, 12, keep, _measured(rule, 12))


@pytest.mark.parametrize("score", [None, float("nan"), float("inf")])
def test_a_layer_without_a_score(score):
    scores = [0.1, 0.2, score, 0.4]
    with pytest.raises(DowncycleError, match=r"--select bi: layer 2 has no score .*; choose by another rule, or --protect the layer"):
        choose_by("bi", 4, 3, scores)
    assert choose_by("bi", 4, 3, scores, [2]) == [1, 2, 3]


def test_unknown_rules_and_wrong_shapes():
    with pytest.raises(DowncycleError, match="--select best: no such rule; there are first, tail, ends, even, bi, angular, ppl, taylor"):
        choose_by("best", 4, 3, [1.0] * 4)
    with pytest.raises(DowncycleError, match="--select first: no such rule"):
        protected_layers("first", 4, 3)
    with pytest.raises(ValueError, match="ppl is a search"):
        choose_by("ppl", 4, 3, [1.0] * 4)
    with pytest.raises(ValueError, match="scores of 5 layers, for a model of 4"):
        choose_by("bi", 4, 3, [1.0] * 5)

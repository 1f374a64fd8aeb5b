"""The rules keep what they say, and lists of layers are read as people write them."""

import random

import pytest

from downcycle import DowncycleError, choose, parse_layers
from downcycle.surgery.choose import RULES, ends, even, first, format_layers, tail

EVERY_SIZE = [(layers, keep) for layers in range(1, 41) for keep in range(1, layers + 1)]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_keeps_so_many_layers_in_order(rule):
    for layers, keep in EVERY_SIZE:
        kept = choose(layers, keep, rule)
        assert len(kept) == keep
        assert kept == sorted(set(kept))
        assert set(kept) <= set(range(layers))
        assert rule != "first" or kept == list(range(keep))
        assert keep < layers or kept == list(range(layers))


def test_published_choices():
    assert choose(32, 24) == list(range(24))  # Llama-3-6B, from Meta-Llama-3-8B
    assert first(24, 12) == list(range(12))  # Inheritune, GPT-2 medium
    assert tail(32, 24) == [*range(23), 31]  # "The Unreasonable Ineffectiveness of the Deeper Layers": the last layer stays
    assert even(12, 6) == [0, 2, 4, 7, 9, 11]  # DistilBERT's initialisation, transformers' make_student(12, 6)
    assert even(12, 4) == [0, 4, 7, 11]


def test_tail_drops_one_block_before_the_last_layer():
    for layers, keep in EVERY_SIZE:
        kept = tail(layers, keep)
        assert kept[-1] == layers - 1
        assert kept[:-1] == list(range(keep - 1))


def test_ends_drops_one_block_from_the_middle():
    for layers, keep in EVERY_SIZE:
        dropped = sorted(set(range(layers)) - set(ends(layers, keep)))
        before, after = (dropped[0], layers - 1 - dropped[-1]) if dropped else ((keep + 1) // 2, keep // 2)
        assert not dropped or dropped == list(range(dropped[0], dropped[-1] + 1))
        assert before - after in (0, 1)


def test_even_spreads_the_kept_layers():
    for layers, keep in EVERY_SIZE:
        kept = even(layers, keep)
        steps = {later - earlier for earlier, later in zip(kept, kept[1:], strict=False)}
        assert kept[0] == 0
        assert keep == 1 or kept[-1] == layers - 1
        assert not steps or max(steps) - min(steps) <= 1
        assert steps == {(layers - 1) / (keep - 1)} if keep > 1 and (layers - 1) % (keep - 1) == 0 else True


@pytest.mark.parametrize(("layers", "keep"), [(32, 0), (32, 33), (32, -1), (1, 2)])
@pytest.mark.parametrize("rule", RULES)
def test_too_few_or_too_many(rule, layers, keep):
    with pytest.raises(DowncycleError, match=rf"--keep {keep}: .*{layers} layer.*between 1 and {layers}"):
        choose(layers, keep, rule)


def test_an_unknown_rule_is_answered_with_the_known_ones():
    with pytest.raises(DowncycleError, match="--select best: no such rule; there are first, tail, ends, even"):
        choose(32, 24, "best")


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("0", [0]),
        ("31", [31]),
        ("0-3", [0, 1, 2, 3]),
        ("5-5", [5]),
        ("0-2,29-31", [0, 1, 2, 29, 30, 31]),
        (" 0 - 2 , 7 ", [0, 1, 2, 7]),
        ("3,2,1", [3, 2, 1]),
        ("007", [7]),
        ("0-23,8-31", [*range(24), *range(8, 32)]),  # SOLAR
    ],
)
def test_lists_are_read(text, layers):
    assert parse_layers(text, 32) == layers


BAD = [
    "",
    ",",
    " ",
    "0,,1",
    "0,",
    ",0",
    "-",
    "-1",
    "0-",
    "0--1",
    "3-1",
    "0-32",
    "32",
    "0-99999999999",
    "9" * 5000,
    "1.0",
    "1e1",
    "0x1",
    "all",
]


@pytest.mark.parametrize("text", [*BAD, "٣", "²", "０", "0–3", "0\x00", "0:3", "0;1", "+1", "1_0", "[0]"])
def test_what_is_no_list_is_refused(text):
    with pytest.raises(DowncycleError, match="--layers") as refusal:
        parse_layers(text, 32)
    assert "write" in str(refusal.value) or "Try" in str(refusal.value)


def test_a_layer_out_of_range_is_answered_with_the_range():
    with pytest.raises(
        DowncycleError, match=r"--layers 0-40: layer 40 does not exist; the model has 32 layers \(0-31\). Try --layers 0-31"
    ):
        parse_layers("0-40", 32)


def test_what_is_written_is_read_again():
    rng = random.Random(3)
    for _ in range(1000):
        layers = [rng.randrange(40) for _ in range(rng.randint(1, 40))]
        layers = sorted(set(layers)) if rng.random() < 0.5 else layers
        assert parse_layers(format_layers(layers), 40) == layers
    assert format_layers([*range(20), *range(28, 32)]) == "0-19,28-31"
    assert format_layers([3, 2, 2, 3]) == "3,2,2-3"
    assert format_layers([]) == ""

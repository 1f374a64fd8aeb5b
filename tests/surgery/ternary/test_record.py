"""What config.json says of a ternary training is read as the training wrote it, or refused."""

import pytest

from downcycle import DowncycleError
from downcycle.surgery.ternary.record import Record, read_record
from downcycle.surgery.ternary.rule import Rule

WRITTEN = {
    **{"schedule": "linear", "warmup_steps": 1000, "k": None, "include": ["^lm_head$"], "exclude": ["down_proj$"]},
    **{"norm": False, "strength": 1.0, "steps": 5000},
}


def test_what_a_training_writes():
    record = read_record({"model_type": "llama", "downcycle_ternary": WRITTEN}, "m")
    assert record == Record(Rule(("^lm_head$",), ("down_proj$",)), 1.0, False, "linear", 5000) and record.whole


def test_a_model_that_was_never_trained_so():
    assert read_record({"model_type": "llama"}, "m") is None and read_record({"downcycle_ternary": None}, "m") is None


@pytest.mark.parametrize(("strength", "whole"), [(1, True), (1.0, True), (0.9995, True), (0.98, False), (0, False)])
def test_how_far(strength, whole):
    record = read_record({"downcycle_ternary": WRITTEN | {"strength": strength}}, "m")
    assert (record.strength, record.whole) == (strength, whole)


def test_with_norms():
    assert read_record({"downcycle_ternary": WRITTEN | {"norm": True}}, "m").norm


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ([], "no section"),
        ("linear", "no section"),
        ({}, "strength is None and no number"),
        (WRITTEN | {"strength": "1"}, "strength is 1 and no number"),
        (WRITTEN | {"strength": True}, "strength is True and no number"),
        (WRITTEN | {"strength": 1.01}, "strength is 1.01 and no number from 0 to 1"),
        (WRITTEN | {"strength": float("nan")}, "strength is nan"),
        (WRITTEN | {"include": "lm_head"}, "no lists of patterns"),
        (WRITTEN | {"exclude": [1]}, "no lists of patterns"),
        (WRITTEN | {"exclude": ["("]}, "is no regular expression"),
    ],
)
def test_what_no_training_writes_is_refused(section, said):
    with pytest.raises(DowncycleError) as refusal:
        read_record({"downcycle_ternary": section}, "models/m")
    assert said in str(refusal.value) and "\n" not in str(refusal.value)

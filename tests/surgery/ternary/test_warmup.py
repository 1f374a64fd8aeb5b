"""Warm-ups are the published formulas, go from 0 to 1 and never back, and are functions of the step alone."""

from math import exp, inf, nan

import pytest

from downcycle import DowncycleError
from downcycle.surgery.ternary.warmup import SCHEDULES, Warmup


@pytest.mark.parametrize(
    ("schedule", "k", "step", "wanted"),
    [
        ("linear", None, 0, 0.0),
        ("linear", None, 250, 0.25),
        ("linear", None, 1000, 1.0),
        ("linear", None, 4999, 1.0),
        ("linear", 10, 5, 0.5),
        ("linear", 0, 0, 1.0),
        ("linear", 0, 4999, 1.0),
        ("ramp", None, 1250, 0.25),
        ("ramp", None, 5000, 1.0),
        ("ramp", 2, 1250, 0.5),
        ("ramp", 2, 4000, 1.0),
        ("exponential", 4, 1250, 1 - 0.75**4),
        ("exponential", 10, 2500, 1 - 0.5**10),
        ("sigmoid", 100, 2500, 0.5),
        ("sigmoid", 15, 0, 1 / (1 + exp(7.5))),
        ("sigmoid", 15, 5000, 1 / (1 + exp(-7.5))),
    ],
)
def test_the_published_formulas(schedule, k, step, wanted):
    assert Warmup(schedule, k).strength(step, 5000) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [0, 1, 7, 5000])
def test_they_rise_from_0_to_1_and_stay_there(schedule, total):
    found = [Warmup(schedule).strength(step, total) for step in range(0, max(total, 1001) * 2, max(1, total // 50))]
    assert all(0 <= one <= 1 for one in found) and found == sorted(found)
    assert found[0] < 1e-9 and found[-1] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize(
    ("schedule", "k", "says"),
    [
        ("linaer", None, "schedule 'linaer': no such warm-up; choose linear, ramp, exponential, sigmoid"),
        ("linear", -1, "k -1: must be 0 or a number above it; linear usually has 1000"),
        ("sigmoid", 0, "k 0: must be a number above 0; sigmoid usually has 100"),
        ("sigmoid", -1.5, "k -1.5: must be a number above 0; sigmoid usually has 100"),
        ("ramp", nan, "k nan: must be a number above 0"),
        ("ramp", inf, "k inf: must be a number above 0"),
    ],
)
def test_what_is_no_warmup_is_refused(schedule, k, says):
    with pytest.raises(DowncycleError, match=f"^{says}"):
        Warmup(schedule, k)

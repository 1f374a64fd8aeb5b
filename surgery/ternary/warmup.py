"""How lambda grows from 0 to 1 while a model learns ternary weights: pure functions of the step. Knows no trainer.

The schedules are those published with Llama3-8B-1.58 (huggingface.co/blog/1_58_llm_extreme_quantization); `linear` over 1,000 steps was the
final choice there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, isfinite

from ..errors import DowncycleError


def linear(step: int, total: int, k: float) -> float:
    """min(step / k, 1): all the way in k steps, however long the training is; 1 from the first step on where k is 0."""
    return min(step / k, 1.0) if k else 1.0


def ramp(step: int, total: int, k: float) -> float:
    """min(k step / total, 1): published with k = 1 and k = 2."""
    return min(k * step / total, 1.0)


def exponential(step: int, total: int, k: float) -> float:
    """1 - (1 - step / total)^k: fast at first; published with k from 4 to 10."""
    return 1 - (1 - min(step / total, 1.0)) ** k


def sigmoid(step: int, total: int, k: float) -> float:
    """1 / (1 + e^(-k (step / total - 1/2))): slow, fast, slow; published with k from 15 to 100. Begins and ends e^(-k/2) off 0 and 1."""
    return 1 / (1 + exp(-k * (min(step / total, 1.0) - 0.5)))


SCHEDULES: dict[str, Callable[[int, int, float], float]] = {
    "linear": linear,
    "ramp": ramp,
    "exponential": exponential,
    "sigmoid": sigmoid,
}
USUAL = {"linear": 1000.0, "ramp": 1.0, "exponential": 4.0, "sigmoid": 100.0}  # k, where none is given


@dataclass(frozen=True)
class Warmup:
    """A schedule and its k: steps for `linear`, which may be 0, a factor or an exponent for the others.

    Raises:
        DowncycleError: no such schedule, or a k that is none of its numbers.
    """

    schedule: str = "linear"
    k: float | None = None

    def __post_init__(self) -> None:
        """Refuse what no schedule can use."""
        if self.schedule not in SCHEDULES:
            raise DowncycleError(f"schedule {self.schedule!r}: no such warm-up; choose {', '.join(SCHEDULES)}")
        none = self.schedule == "linear"  # no steps of warm-up: a training that goes on where lambda is 1
        if self.k is not None and not (isfinite(self.k) and (self.k > 0 or (none and self.k == 0))):
            what = "0 or a number above it" if none else "a number above 0"
            raise DowncycleError(f"k {self.k}: must be {what}; {self.schedule} usually has {USUAL[self.schedule]:g}")

    def strength(self, step: int, total: int) -> float:
        """Return lambda after so many of all optimizer steps, from 0 to 1."""
        return SCHEDULES[self.schedule](step, max(total, 1), USUAL[self.schedule] if self.k is None else self.k)

"""What config.json says of a model that learnt ternary weights: which maps did, and how far. Reads a config; loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import DowncycleError
from ..quantizer import packed_by
from .rule import Rule

FULLY = 0.99  # lambda of a warm-up that is over: ramps and sigmoids end that near to 1
NORM = ".rms_norm.weight"  # how the norm before a map is named, behind the map's name
EPSILON = 1e-6  # of that norm, as transformers has where a config says nothing
RECORD = "downcycle_ternary"  # the section of config.json, which the training writes with every checkpoint


@dataclass(frozen=True)
class Record:
    """How a model learnt ternary weights.

    rule: which maps did. norm: whether each has a norm of its own before it. strength: lambda of the last optimizer step, from 0 to 1.
    schedule, steps: how lambda grew, and how many steps were made.
    """

    rule: Rule
    strength: float = 1.0
    norm: bool = False
    schedule: str = ""
    steps: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it was trained with nothing but ternary weights in the end."""
        return self.strength >= FULLY


def is_latent(config: Mapping[str, Any], name: str) -> bool:
    """Whether a model's weights are the floats beneath ternary ones that were trained: it is to be packed, and does not run as it is."""
    return read_record(config, name) is not None and not packed_by(config)


def read_record(config: Mapping[str, Any], name: str) -> Record | None:
    """Return what a config says of its ternary training; None where it says nothing.

    Raises:
        DowncycleError: it says something that no training writes.
    """
    section = config.get(RECORD)
    if section is None:
        return None
    wrong = f"{name}/config.json: {RECORD} is not what a training writes"
    if not isinstance(section, dict):
        raise DowncycleError(f"{wrong} (no section); take it out, or fetch the file again")
    patterns = [section.get(key) or [] for key in ("include", "exclude")]
    strength, steps = section.get("strength"), section.get("steps")
    if not all(isinstance(found, list) and all(isinstance(one, str) for one in found) for found in patterns):
        raise DowncycleError(f"{wrong} (include and exclude are no lists of patterns); fetch the file again")
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0 <= strength <= 1:
        raise DowncycleError(f"{wrong} (strength is {str(strength)[:40]} and no number from 0 to 1); fetch the file again")
    schedule = section.get("schedule")
    return Record(
        Rule(tuple(patterns[0]), tuple(patterns[1])),
        float(strength),
        section.get("norm") is True,
        schedule if isinstance(schedule, str) else "",
        steps if isinstance(steps, int) and not isinstance(steps, bool) else None,
    )

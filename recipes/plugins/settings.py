"""What a recipe may say under downcycle_ternary, and what a ternary training says of itself in config.json. Knows no trainer."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ...surgery.errors import DowncycleError
from ...surgery.ternary.rule import Rule
from ...surgery.ternary.warmup import USUAL, Warmup
from ..validation.own_plugins import SECTION


class Distillation(BaseModel):
    """loss = (1 - weight) cross entropy + weight T^2 KL(teacher || student). Unknown keys are refused.

    temperature: T, by which both models' logits are divided. teacher: a folder or a Hub id; base_model as it was, where none is given.
    """

    model_config = ConfigDict(extra="forbid")
    weight: float = Field(default=0.5, ge=0, le=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    teacher: str | None = None


class TernarySettings(BaseModel):
    """How a model becomes ternary. Unknown keys are refused.

    warmup_steps: of the schedule `linear`; 0 has lambda at 1 from the first step on. k: of the other schedules. include, exclude:
    patterns of modules (`surgery.ternary.rule`). norm: an RMSNorm before each ternary map, of weight 1 at first: a model that never had
    one computes something else from then on, whatever lambda is.
    """

    model_config = ConfigDict(extra="forbid")
    schedule: str = "linear"
    warmup_steps: int | None = Field(default=None, ge=0)
    k: float | None = None
    include: list[str] = Field(default_factory=list)
    exclude: list[str] = Field(default_factory=list)
    norm: bool = False
    distill: Distillation | None = None

    @model_validator(mode="after")
    def _check(self) -> TernarySettings:
        if self.schedule == "linear" and self.k is not None:
            raise ValueError("k is for the other schedules; linear has warmup_steps")
        if self.schedule != "linear" and self.warmup_steps is not None:
            raise ValueError(f"warmup_steps is for the schedule linear; {self.schedule} has k")
        try:
            self.warmup()
            self.rule()
        except DowncycleError as error:
            raise ValueError(str(error)) from error
        return self

    def warmup(self) -> Warmup:
        """Return the warm-up of lambda."""
        return Warmup(self.schedule, self.k if self.warmup_steps is None else float(self.warmup_steps))

    def rule(self) -> Rule:
        """Return which maps become ternary."""
        return Rule(self.include, self.exclude)

    def section(self, strength: float, steps: int) -> dict[str, Any]:
        """Return what config.json says of a training. strength: lambda of the last optimizer step. steps: how many were made."""
        linear = self.schedule == "linear"
        return {
            "schedule": self.schedule,
            "warmup_steps": (int(USUAL["linear"]) if self.warmup_steps is None else self.warmup_steps) if linear else None,
            "k": None if linear else USUAL[self.schedule] if self.k is None else self.k,
            "include": self.include,
            "exclude": self.exclude,
            "norm": self.norm,
            "strength": strength,
            "steps": steps,
        }


class TernaryArgs(BaseModel):
    """The keys that the plugin adds to Axolotl's."""

    downcycle_ternary: TernarySettings = Field(default_factory=TernarySettings)


def settings(cfg: Any) -> TernarySettings:
    """Return what a recipe says, checked and complete."""
    return TernarySettings(**dict(cfg.get(SECTION) or {}))

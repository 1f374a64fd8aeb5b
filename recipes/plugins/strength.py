"""Move lambda as a training goes, log it, and note it in the model's config. Knows Axolotl's trainer; loads no model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainerCallback

from ...surgery.errors import DowncycleError
from ...surgery.ternary.bitlinear import BitLinear, set_strength
from .settings import SECTION, TernarySettings


class MoveStrength(TrainerCallback):
    """Set lambda before each optimizer step by how many were made, so that a resumed training goes on where it was.

    An evaluation runs at the lambda of the step before it.
    """

    def __init__(self, trainer: Any, chosen: TernarySettings):
        self.trainer, self.chosen, self.warmup = trainer, chosen, chosen.warmup()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set lambda for an evaluation before the first step; refuse weights of 16 bits, on which small updates are lost."""
        set_strength(kwargs["model"], self.warmup.strength(state.global_step, state.max_steps))
        for name, module in kwargs["model"].named_modules():
            if isinstance(module, BitLinear) and module.weight.dtype != torch.float32:
                raise DowncycleError(f"{name}: its weights are {module.weight.dtype}; training moves float32 only: use `axolotl train`")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set lambda for the step that begins."""
        set_strength(kwargs["model"], self.warmup.strength(state.global_step, state.max_steps))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note lambda of the step that ended, for the next line of the log and in the config that the next save writes."""
        strength = self.warmup.strength(state.global_step - 1, state.max_steps)
        self.trainer.store_metrics({"lambda": (strength, "max")})  # it never falls, so this is that of the last step
        setattr(self.trainer.accelerator.unwrap_model(self.trainer.model).config, SECTION, self.chosen.section(strength, state.global_step))

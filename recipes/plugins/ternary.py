"""The plugin by which Axolotl trains ternary weights: it converts the model once it is built, and moves lambda as training goes.

    plugins: [downcycle.recipes.plugins.TernaryPlugin]
    downcycle_ternary: {schedule: linear, warmup_steps: 1000}

What it saves is an ordinary checkpoint of floating-point weights, which training can go on from and `ternarize` packs; config.json says
how it was trained. These weights are float32 whatever the recipe's precision is: of a bfloat16 weight an update by a millionth would be
lost. With `bf16` the products are of 16 bits, by autocast.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from ...surgery.errors import DowncycleError
from ..validation.ternary import base_faults, ternary_section, training_faults
from .conversion import make_ternary
from .settings import TernaryArgs, settings
from .strength import MoveStrength


class TernaryPlugin(BasePlugin):
    """Ternary training in Axolotl."""

    def get_input_args(self) -> str:
        """Return where the model of the keys is."""
        return f"{TernaryArgs.__module__}.{TernaryArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Load none; have the weights loaded in float32, which must be said before the model's loader is made."""
        _refuse(training_faults(cfg))
        cfg.torch_dtype = torch.float32

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what cannot go together, and models that cannot be trained so."""
        from axolotl.loaders.utils import load_model_config

        _refuse(training_faults(cfg))
        _refuse(base_faults(ternary_section(cfg), load_model_config(cfg).to_dict(), cfg.base_model))

    def post_model_build(self, cfg: Any, model: Any) -> None:
        """Convert the model's linear maps."""
        if cfg.torch_dtype == torch.float32:
            model.float()  # weights that were not loaded but made anew have the dtype that the config states
        make_ternary(model, settings(cfg), cfg.base_model, cfg.revision_of_model)

    def get_trainer_cls(self, cfg: Any) -> type | None:
        """Return the trainer with a teacher, where one is asked for."""
        if settings(cfg).distill is None:
            return None
        from .distill import DistillTrainer

        return DistillTrainer

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list[TrainerCallback]:
        """Return what moves lambda."""
        return [MoveStrength(trainer, settings(cfg))]

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        """Load the teacher."""
        if chosen := settings(cfg).distill:
            from .distill import load_teacher

            trainer.distill, trainer.teacher = chosen, load_teacher(cfg, chosen, trainer)


def _refuse(faults: Iterator[str]) -> None:
    if found := list(faults):
        raise DowncycleError("; ".join(found))

"""The plugin by which Axolotl trains ternary weights: it converts the model once it is built, and moves lambda as training goes.

    plugins: [downcycle.recipes.plugins.TernaryPlugin]
    downcycle_ternary: {schedule: linear, warmup_steps: 1000}

What it saves is an ordinary checkpoint of floating-point weights, which training can go on from and `ternarize` packs; config.json says
how it was trained. These weights are float32 whatever the recipe's precision is: of a bfloat16 weight an update by a millionth would be
lost. With `bf16` the products are of 16 bits, by autocast.
"""

from __future__ import annotations

from typing import Any

import torch
from axolotl.integrations.base import BasePlugin
from transformers import TrainerCallback

from ...surgery.errors import DowncycleError
from ...surgery.families import CONV1D
from ...surgery.quantizer import packed_by
from ...surgery.ternary.record import read_record
from .conversion import make_ternary
from .settings import SECTION, TernaryArgs, settings
from .strength import MoveStrength

# What else a recipe may ask for, and why it cannot: keys that must be off.
AGAINST = {
    **dict.fromkeys(("adapter", "load_in_4bit", "load_in_8bit"), "ternary training moves every weight"),
    **dict.fromkeys(("qat", "fp8", "use_onebitllms"), "it puts linear maps of its own in the place of the ternary ones"),
    "rl": "ternary training learns from text",
    "deepspeed": "it keeps weights and lambda in 16 bits, where small changes are lost",
}
AGAINST_DISTILL = {
    **dict.fromkeys(("liger_fused_linear_cross_entropy", "cut_cross_entropy"), "it gives no logits to compare with the teacher's"),
    "kd_trainer": "it is another way to learn from a teacher",
}
PARALLEL = {"tensor_parallel_size": "a scale is that of a whole matrix"}
PARALLEL_DISTILL = {"context_parallel_size": "the teacher reads whole texts"}


class TernaryPlugin(BasePlugin):
    """Ternary training in Axolotl."""

    def get_input_args(self) -> str:
        """Return where the model of the keys is."""
        return f"{TernaryArgs.__module__}.{TernaryArgs.__name__}"

    def load_datasets(self, cfg: Any, preprocess: bool = False) -> None:
        """Load none; have the weights loaded in float32, which must be said before the model's loader is made."""
        _check(cfg)
        cfg.torch_dtype = torch.float32

    def pre_model_load(self, cfg: Any) -> None:
        """Refuse what cannot go together, and models that cannot be trained so."""
        from axolotl.loaders.utils import load_model_config

        _check(cfg)
        _check_model(cfg, load_model_config(cfg))

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


def _check(cfg: Any) -> None:
    """Refuse a recipe that contradicts itself."""
    distill, other = settings(cfg).distill, f", or {SECTION}.distill"
    for key, why in (AGAINST | AGAINST_DISTILL if distill else AGAINST).items():
        if cfg.get(key):
            raise DowncycleError(f"{key}: {cfg[key]}: {why}, so leave {key} out{other if key in AGAINST_DISTILL else ''}")
    for key, why in (PARALLEL | PARALLEL_DISTILL if distill else PARALLEL).items():
        if (cfg.get(key) or 1) > 1:
            raise DowncycleError(f"{key}: {cfg[key]}: {why}, so leave {key} out and share the work by fsdp_config")
    if (cfg.fsdp or cfg.fsdp_config) and str(cfg.fsdp_version) != "2":
        raise DowncycleError(
            f"fsdp_version: {cfg.fsdp_version}: it keeps lambda in 16 bits, where small changes are lost; give fsdp_version: 2"
        )
    if cfg.bf16 == "full":
        raise DowncycleError("bf16: full: ternary training keeps float32 weights, on which small updates are not lost; give bf16: auto")


def _check_model(cfg: Any, config: Any) -> None:
    """Refuse a model that is packed, that transformers cannot run packed, or that was trained in a way that the recipe leaves."""
    chosen, before = settings(cfg), read_record(config.to_dict(), cfg.base_model)
    if quantiser := packed_by(config.to_dict()):
        raise DowncycleError(f"{cfg.base_model}: its weights are packed by {quantiser} already; give the model as it was before")
    if config.model_type in CONV1D:
        raise DowncycleError(f"{cfg.base_model}: {config.model_type} has no linear maps that transformers runs with ternary weights")
    if before and before.norm and not chosen.norm:
        raise DowncycleError(f"{cfg.base_model}: was trained with a norm before each ternary map; say norm: true under {SECTION}")
    if before and chosen.distill and not chosen.distill.teacher:
        raise DowncycleError(f"{cfg.base_model}: was trained ternary already and is no teacher; name one under {SECTION}.distill.teacher")

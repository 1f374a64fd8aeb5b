"""The sections of a card that say how a model was trained: text, settings, losses, the whole recipe, the releases used.

Writes Markdown from facts. Their lists are spelt as trainers spell them, so that a later run reads them again where it replaced those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ..results import Logged
from .facts import Facts
from .training_record import Text, Training
from .wording import bullets, data_link, paragraphs, plain, table

LOSS_PICTURE = "figures/loss.png"
ROWS = 40  # of the table of losses
SETTINGS = (
    *("learning_rate", "lr_scheduler", "warmup_steps", "warmup_ratio", "optimizer", "adam_beta1", "adam_beta2", "weight_decay"),
    *("max_grad_norm", "micro_batch_size", "gradient_accumulation_steps", "num_devices", "total_train_batch_size"),
    *("sequence_len", "sample_packing", "num_epochs", "max_steps", "adapter", "load_in_4bit", "load_in_8bit", "lora_r", "lora_alpha"),
    *("lora_dropout", "peft_use_rslora", "peft_use_dora", "lora_target_linear", "lora_target_modules", "unfrozen_parameters"),
    *("bf16", "fp16", "tf32", "seed"),
)


def training(facts: Facts) -> str:
    """Say on what and with which settings a model was trained, and how its loss went."""
    known = facts.training
    if known is None:
        return ""
    rows = [(f"`{key}`", _value(value)) for key, value in _settings(known).items()]
    picture = f"![Loss over the steps of the training]({LOSS_PICTURE})" if LOSS_PICTURE in facts.files and known.log else ""
    parts = [
        "## Training",
        f"Trained on:\n\n{bullets(map(_text, known.texts))}" if known.texts else "",
        "### Hyper-parameters\n\n" + table(["", ""], rows) if rows else "",
        _run(known),
        "### Losses\n\n" + _losses(known.log) if known.log else "",
        picture,
    ]
    return paragraphs(parts) if any(parts[1:]) else ""


def recipe(facts: Facts) -> str:
    """Give the whole recipe, folded away."""
    known = facts.training
    if known is None or not known.recipe:
        return ""
    release = f"axolotl version: `{plain(known.versions['Axolotl'])}`\n" if "Axolotl" in known.versions else ""
    ticks = max((len(run) for run in re.findall(r"`{3,}", known.recipe)), default=2) + 1
    fence = "`" * ticks
    folded = f"<details><summary>The whole Axolotl config</summary>\n\n{release}{fence}yaml\n{known.recipe.rstrip()}\n{fence}\n\n</details>"
    return paragraphs(["## Recipe", "Trained with [Axolotl](https://github.com/axolotl-ai-cloud/axolotl).", folded])


def versions(facts: Facts) -> str:
    """List the releases that it was trained with."""
    named = {name: release for name, release in facts.training.versions.items() if name != "Axolotl"} if facts.training else {}
    return paragraphs(["## Framework versions", bullets(f"{name} {release}" for name, release in named.items())]) if named else ""


def eval_losses(known: Training) -> list[float]:
    """Return the losses on held-out text, in order."""
    return [one.eval_loss for one in known.log if one.eval_loss is not None]


def texts_in_words(known: Training) -> str:
    """Name what a model was trained on, in a line."""
    return ", ".join(_name(text) + (f" ({text.tokens:,} tokens)" if text.tokens else "") for text in known.texts)


def _name(text: Text) -> str:
    return data_link(text.name) if text.source and "/" in text.name else f"`{plain(text.name)}`"


def _text(text: Text) -> str:
    part = f", part `{plain(text.part)}`" if text.part else ""
    taken = f", taken from {data_link(text.source)}" if text.source and text.source != text.name else ""
    counted = [f"{count:,} {what}" for count, what in ((text.tokens, "tokens"), (text.documents, "documents")) if count]
    language = f", language `{plain(text.language)}`" if text.language else ""
    return f"{_name(text)}{part}{taken}{': ' if counted else ''}{' in '.join(counted)}{language}"


def _settings(known: Training) -> dict[str, Any]:
    """Return the settings that decide a training, as far as they are stated; what is switched off is left out."""
    stated: Mapping[str, Any] = {**known.config, **known.counts}
    return {key: stated[key] for key in SETTINGS if stated.get(key) not in (None, False, "", [])}


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(plain(str(one)) for one in value)
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else plain(str(value))


def _run(known: Training) -> str:
    """Say how long it was trained."""
    if not known.log:
        return ""
    last = known.log[-1]
    seen = f", {known.tokens:,} tokens" if known.tokens else ""
    return f"It ran {last.step:,} optimiser steps, {last.epoch:.2f} epochs{seen}."


def _losses(log: Sequence[Logged]) -> str:
    """Write losses by epoch and step: the steps at which held-out text was measured, or else some of all."""
    rows: dict[int, Logged] = {}
    training_loss = None
    for one in log:
        training_loss = one.loss if one.loss is not None else training_loss
        before = rows.get(one.step)
        loss = one.loss if one.loss is not None else before.loss if before else training_loss
        held_out = one.eval_loss if one.eval_loss is not None else before.eval_loss if before else None
        rows[one.step] = Logged(one.step, one.epoch, loss, held_out)
    measured = [one for one in rows.values() if one.eval_loss is not None]
    shown = _thin(measured or list(rows.values()))
    head = ["Training loss", "Epoch", "Step", *(["Validation loss"] if measured else [])]
    cells = [[_loss(one.loss), f"{one.epoch:.4f}", f"{one.step:,}", *([_loss(one.eval_loss)] if measured else [])] for one in shown]
    note = "" if len(shown) == len(measured or rows) else f"\n\n{len(shown)} of {len(measured or rows)} entries of the trainer's log."
    return table(head, cells) + note + "\n\nLosses in nats per token."


def _thin(rows: list[Logged]) -> list[Logged]:
    """Take at most ROWS rows, evenly, the first and the last among them."""
    if len(rows) <= ROWS:
        return rows
    return [rows[round(place * (len(rows) - 1) / (ROWS - 1))] for place in range(ROWS)]


def _loss(loss: float | None) -> str:
    return "" if loss is None else f"{loss:.4f}"

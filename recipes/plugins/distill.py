"""Learn from the logits of the model as it was before it became ternary (Hinton et al., arXiv 1503.02531), beside the text itself.

    loss = (1 - w) CE + w T^2 KL(softmax(t / T) || softmax(s / T)),   s, t: logits of student and teacher

KL is the mean over the tokens that CE is the mean of: those whose label, one place on, is not -100.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from axolotl.core.trainers.base import AxolotlTrainer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax, pad

from ...surgery.errors import DowncycleError
from .settings import SECTION, Distillation

PIECE = 1 << 22  # numbers that are float32 at a time
IGNORED = -100
NOT_THEIRS = ("labels", "num_items_in_batch")  # what the teacher is not told


class _Divergence(torch.autograd.Function):
    """T^2 KL(teacher || student), summed over the rows that count, a piece of rows at a time."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, counts: Tensor, temperature: float) -> Tensor:
        """[rows, vocab] twice, and [rows] booleans -> a float32 number. Keeps what it was given, and no float32 copy of it."""
        ctx.save_for_backward(student, teacher, counts)
        ctx.temperature = temperature
        total = torch.zeros((), device=student.device)
        for piece in _pieces(student):
            ours, theirs = (log_softmax(one[piece].float() / temperature, -1) for one in (student, teacher))
            total += (theirs.exp() * (theirs - ours)).sum(-1)[counts[piece]].sum()
        return total * temperature**2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        """T (softmax(s / T) - softmax(t / T)), of the student's dtype."""
        student, teacher, counts = ctx.saved_tensors
        found = torch.empty_like(student)
        for piece in _pieces(student):
            ours, theirs = ((one[piece].float() / ctx.temperature).softmax(-1) for one in (student, teacher))
            found[piece] = (ours - theirs) * (gradient * ctx.temperature) * counts[piece, None]
        return found, None, None, None


def divergence(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float) -> Tensor:
    """Return the mean of T^2 KL(teacher || student) over the tokens that count, in nats, as a float32 number.

    Args:
        student, teacher: logits [batch, tokens, vocab]; gradients reach the student only.
        labels: [batch, tokens]; the logits of a token are about the next one's.
    """
    counts = (pad(labels, (0, 1), value=IGNORED)[:, 1:] != IGNORED).flatten().to(student.device)
    total = _Divergence.apply(student.flatten(0, 1), teacher.detach().flatten(0, 1), counts, temperature)
    return total / counts.sum().clamp(min=1)


class DistillTrainer(AxolotlTrainer):
    """Axolotl's trainer with a teacher beside the model. Both parts of the loss are logged; an evaluation has cross entropy alone."""

    teacher: nn.Module
    distill: Distillation

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # both parts are means of a micro-batch, and so add up

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        """Return the loss of a micro-batch, with the student's outputs where they are asked for."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        entropy, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if outputs.logits is None:
            raise DowncycleError(f"{SECTION}.distill: the model gives no logits while it trains; turn its fused cross entropy off")
        with torch.no_grad():
            target = self.teacher(**{key: value for key, value in inputs.items() if key not in NOT_THEIRS}).logits
        apart = divergence(outputs.logits, target, labels, self.distill.temperature)
        self.store_metrics({"cross_entropy": entropy.detach(), "kl": apart.detach()})
        loss = torch.lerp(entropy, apart.to(entropy.dtype), self.distill.weight)
        return (loss, outputs) if return_outputs else loss


def load_teacher(cfg: Any, chosen: Distillation, trainer: DistillTrainer) -> nn.Module:
    """Return the teacher, frozen, on the trainer's device; each process has a whole one.

    It has the dtype that it is stored in, and bfloat16 where the training computes in that.

    Raises:
        DowncycleError: its vocabulary is another.
    """
    from transformers import AutoModelForCausalLM

    name = chosen.teacher or cfg.base_model
    teacher = AutoModelForCausalLM.from_pretrained(
        name,
        revision=None if chosen.teacher else cfg.revision_of_model,
        dtype=torch.bfloat16 if trainer.args.bf16 else "auto",
        attn_implementation=cfg.attn_implementation,
        trust_remote_code=bool(cfg.trust_remote_code),
    )
    _check_vocabulary(name, teacher, trainer)
    return teacher.eval().requires_grad_(False).to(trainer.args.device)


def _check_vocabulary(name: str, teacher: nn.Module, trainer: DistillTrainer) -> None:
    from transformers import AutoTokenizer

    theirs, ours = (_outputs(one) for one in (teacher, trainer.accelerator.unwrap_model(trainer.model)))
    if theirs != ours:
        raise DowncycleError(f"{SECTION}.distill: the teacher {name} has {theirs} tokens, and the model {ours}; give one of its own family")
    with suppress(OSError):  # a model without a tokenizer
        known = trainer.processing_class.get_vocab()
        for token, number in AutoTokenizer.from_pretrained(name).get_vocab().items():
            if known.get(token) != number:
                raise DowncycleError(
                    f"{SECTION}.distill: token {token!r} is {number} to the teacher {name}, and {known.get(token)} to the model; give one "
                    "of its own family"
                )


def _outputs(model: Any) -> int:
    return int(model.get_output_embeddings().out_features)


def _pieces(rows: Tensor) -> Iterator[slice]:
    step = max(1, PIECE // rows.shape[-1])
    return (slice(first, first + step) for first in range(0, len(rows), step))

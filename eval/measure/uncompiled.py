"""Packed ternary weights on a CPU: transformers compiles their unpacking, which needs a C++ compiler and is slower there. Not here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.weights import is_ternary

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@contextmanager
def uncompiled(checkpoint: Checkpoint, device: str) -> Iterator[None]:
    """Let what is compiled of packed ternary weights run as it is written, on a CPU; for other models and devices, nothing changes."""
    if not (is_ternary(checkpoint.config) and device == "cpu"):
        yield
        return
    import torch

    with torch.compiler.set_stance("force_eager"):
        yield


def run_uncompiled(model: PreTrainedModel, checkpoint: Checkpoint, device: str) -> None:
    """Let a model run so whenever it runs, and nothing else of the process."""
    if is_ternary(checkpoint.config) and device == "cpu":
        forward = model.forward

        @wraps(forward)
        def run(*given: Any, **named: Any) -> Any:
            with uncompiled(checkpoint, device):
                return forward(*given, **named)

        model.forward = run  # type: ignore[method-assign]

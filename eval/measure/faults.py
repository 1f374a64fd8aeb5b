"""Say where in a model the first number that is not finite arises. Runs a batch again, with hooks; unused while all is well."""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
from ...surgery.importance.parts import why_not_finite
from ...surgery.importance.pruned import find_stack
from ..origin import origin_of

if TYPE_CHECKING:
    from torch import Tensor, nn

REST = "the final norm or the head"


def locate_fault(model: nn.Module, checkpoint: Checkpoint, ids: Tensor) -> DowncycleError:
    """Run a batch once more and return the error that names the first part whose output is not finite.

    Args:
        ids: [batch, tokens].
    """
    import torch

    parts = {"the embeddings": model.get_input_embeddings()}  # type: ignore[operator]
    parts |= {f"layer {number}": layer for number, layer in enumerate(_layers(model, checkpoint.num_layers))}
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, given: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, torch.Tensor) and not hidden.isfinite().all():
                found.append(name)

        return look

    with ExitStack() as hooks, torch.inference_mode():
        for name, part in parts.items():
            hooks.callback(part.register_forward_hook(watch(name)).remove)
        model(input_ids=ids, use_cache=False)
    name = found[0] if found else REST
    return DowncycleError(
        f"{checkpoint.name}: the output of {name}{_in_parent(checkpoint, name)} is not finite{why_not_finite(parts.get(name, model))}"
    )


def _layers(model: nn.Module, depth: int) -> list[nn.Module]:
    """Return the decoder layers; none where they are in no list."""
    with suppress(DowncycleError):
        return list(model.get_submodule(find_stack(model, depth)).children())
    return []


def _in_parent(checkpoint: Checkpoint, name: str) -> str:
    """Say which layer of the first parent it was."""
    origin, (_, _, number) = origin_of(checkpoint), name.partition("layer ")
    if not origin.kept or not number or int(number) >= len(origin.kept):
        return ""
    return f" (layer {origin.kept[int(number)]} of {origin.root})"

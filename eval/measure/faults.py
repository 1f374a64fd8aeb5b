"""Say where in a model the first number that is not finite arises. Runs a batch again, with hooks; unused while all is well."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ...surgery.checkpoint import Checkpoint
from ...surgery.errors import DowncycleError
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
    parts |= {f"layer {number}": layer for number, layer in enumerate(_decoder_layers(model, checkpoint.num_layers))}
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
        f"{checkpoint.name}: the output of {name}{_in_parent(checkpoint, name)} is not finite{_cause(parts.get(name), model)}"
    )


def _decoder_layers(model: nn.Module, depth: int) -> list[nn.Module]:
    """Return the decoder layers: of the lists of as many modules, the one with the most parameters."""
    from torch.nn import ModuleList

    lists = [module for module in model.modules() if isinstance(module, ModuleList) and len(module) == depth]
    return list(max(lists, key=lambda layers: sum(weight.numel() for weight in layers.parameters()), default=[]))


def _in_parent(checkpoint: Checkpoint, name: str) -> str:
    """Say which layer of the first parent it was."""
    origin, (_, _, number) = origin_of(checkpoint), name.partition("layer ")
    if not origin.kept or not number or int(number) >= len(origin.kept):
        return ""
    return f" (layer {origin.kept[int(number)]} of {origin.root})"


def _cause(part: nn.Module | None, model: nn.Module) -> str:
    """Name a weight that is not finite itself; if there is none, the computation overflowed."""
    for name, weight in (part or model).named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            return f", as its weight {name} holds NaN or infinity: the file is damaged, or the training that made it failed"
    if str(model.dtype) == "torch.float16":
        return ": numbers grow beyond what float16 holds; try --load bf16 or fp32"
    return ", though its weights are; try --load fp32, and check how the model was made"

"""Which maps of a decoder layer write into the residual stream, found by measuring: no family need be known.

Something is added to what a map gives, and the stream, behind the layer or inside it, must move by just that, times a constant. This is
measured in float32: an MLP that adds little moves the stream by less than 16 bits round it, and would be overlooked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn

CLOSE = 1e-3  # of what is added: how far from it the stream may move, for rounding


@dataclass(frozen=True)
class Writer:
    """A map that writes into the residual stream: a linear one, or a norm behind one. name: of the module in its layer.

    coefficient: what its output is multiplied by. at: the module whose input is the stream right behind it; "": the layer's output is.
    norm: it multiplies each channel by its weight + offset.
    """

    name: str
    coefficient: float
    at: str = ""
    norm: bool = False
    offset: float = 0.0


def find_writers(layer: nn.Module, run: Callable[[], Tensor]) -> list[Writer]:
    """Return the maps of a layer that write into the stream, in the order in which they do.

    Args:
        run: runs the layer on a few tokens, always the same, and returns what leaves it, [..., tokens, width].
    """
    import torch

    entered: list[Tensor] = []
    with _in_float32(layer):
        with (
            _watching(layer) as before,
            _hooked(layer, lambda module, args, kwargs: entered.append((args[0] if args else kwargs["hidden_states"]).clone())),
        ):
            output = run().clone()
        found, generator = list[Writer](), torch.Generator().manual_seed(0)
        size = output.square().mean(-1).sqrt().median()  # a few tokens may be a thousand times as large as the others
        for name, module, norm in _maps(layer):
            given, gave = before.get(name, (None, None))
            if given is None or gave is None or not _as_many(gave, output) or not (norm or _is_affine(module, given, gave)):
                continue
            added = torch.randn(gave.shape, generator=generator).to(output) * size
            with _adding(module, added), _watching(layer) as after:
                moved = (run() - output).reshape_as(added)
            offset = _offset(module, run, layer, name, gave) if norm else 0.0
            if coefficient := _moves(moved, added):
                found.append(Writer(name, coefficient, "", norm, offset))
            elif place := _place(before, after, added, gave, entered[0]):
                found.append(Writer(name, *place, norm, offset))
    return sorted(found, key=lambda writer: not writer.at)


def _maps(layer: nn.Module) -> Iterator[tuple[str, nn.Module, bool]]:
    """Yield the modules of a layer that are a matrix (torch's Linear, and GPT-2's Conv1D, its transpose) or scale channels."""
    from torch.nn import Linear

    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or any(module.children()) or not weight.is_floating_point():
            continue
        if weight.ndim == 2 and (isinstance(module, Linear) or type(module).__name__ == "Conv1D"):
            yield name, module, False
        elif weight.ndim == 1 and "norm" in type(module).__name__.lower():
            yield name, module, True


def _as_many(one: Tensor, other: Tensor) -> bool:
    """Whether two hold vectors of the stream's width, and as many: some families make one row of batch and tokens inside their layers."""
    return one.shape[-1] == other.shape[-1] and one.numel() == other.numel()


def _is_affine(module: nn.Module, given: Tensor, gave: Tensor) -> bool:
    """Whether a map is what its weight and bias say: a subclass may round its weight, or what it is given."""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    wanted = given @ (weight if type(module).__name__ == "Conv1D" else weight.T)
    return bool((wanted + (0 if bias is None else bias) - gave).norm() <= CLOSE * gave.norm())


def _moves(moved: Tensor, added: Tensor) -> float:
    """Return by which multiple of what was added something moved everywhere; 0 where by no such."""
    coefficient = float((moved * added).mean() / added.square().mean())
    off = float((moved - coefficient * added).square().mean().sqrt() / added.square().mean().sqrt())
    return coefficient if off <= CLOSE * abs(coefficient) and abs(coefficient) > 1e-3 else 0.0


def _place(before: dict[str, Any], after: dict[str, Any], added: Tensor, gave: Tensor, entered: Tensor) -> tuple[float, str] | None:
    """Find a module inside the layer whose input moved by just that, and is what entered the layer, and what the map gave."""
    for name, (given, _) in before.items():
        now = after.get(name, (None, None))[0]
        if given is None or now is None or now.shape != given.shape or not _as_many(given, gave):
            continue
        if (coefficient := _moves((now - given).reshape_as(added), added)) and _as_many(entered, gave):
            rest = given.reshape_as(gave) - coefficient * gave - entered.reshape_as(gave)
            if float(rest.square().mean()) <= CLOSE**2 * float(given.square().mean()):
                return coefficient, name
    return None


def _offset(module: nn.Module, run: Callable[[], Tensor], layer: nn.Module, name: str, gave: Tensor) -> float:
    """Return 1 for a norm that multiplies by 1 + w, and 0 for one that multiplies by w: which of the two doubles what it gives?"""
    weight, bias = module.get_parameter("weight"), getattr(module, "bias", None)
    kept, scaled = weight.detach().clone(), gave if bias is None else gave - bias
    try:
        for offset in (0.0, 1.0):
            weight.data.copy_((kept + offset) * 2 - offset)
            with _watching(layer) as seen:
                run()
            now = seen[name][1]
            if now is not None and _moves(now - gave, scaled):
                return offset
    finally:
        weight.data.copy_(kept)
    return 0.0


@contextmanager
def _in_float32(layer: nn.Module) -> Iterator[None]:
    """Let a layer's numbers of 16 bits, and those that it is given, have 32 for a while."""
    from torch.utils._pytree import tree_map

    tensors = [one for one in (*layer.parameters(), *layer.buffers()) if _is_short(one)]
    kept = [one.data for one in tensors]

    def widen(module: Any, args: Any, kwargs: Any) -> Any:
        return tree_map(lambda one: one.float() if _is_short(one) else one, (args, kwargs))

    handle = layer.register_forward_pre_hook(widen, with_kwargs=True)
    try:
        for one in tensors:
            one.data = one.data.float()
        yield
    finally:
        handle.remove()
        for one, values in zip(tensors, kept, strict=True):
            one.data = values


def _is_short(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.element_size() == 2


@contextmanager
def _adding(module: nn.Module, added: Tensor) -> Iterator[None]:
    handle = module.register_forward_hook(lambda module, args, output: output + added)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hooked(layer: nn.Module, look: Callable[[Any, Any, Any], None]) -> Iterator[None]:
    handle = layer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _watching(layer: nn.Module) -> Iterator[dict[str, tuple[Tensor | None, Tensor | None]]]:
    """Note what each module of a layer is given first and gives, in the order in which they are run."""
    import torch

    seen: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def note(name: str) -> Any:
        def look(module: nn.Module, args: Any, output: Any) -> None:
            given = args[0] if args and isinstance(args[0], torch.Tensor) else None
            gave = output if isinstance(output, torch.Tensor) else None
            seen[name] = given if given is None else given.clone(), gave if gave is None else gave.clone()  # the caller may add in place

        return look

    handles = [module.register_forward_hook(note(name)) for name, module in layer.named_modules() if name]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()

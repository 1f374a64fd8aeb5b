"""A transformers model in parts, so that one larger than memory can be run: a frame without layers, and single decoder layers.

The frame is the stock model, whose own forward makes the arguments of each layer: masks, positions, whatever the family needs. Its layers
only stand in: those before the one that is run give what was computed of them earlier, and that one ends the forward. Parts are loaded by
stock `from_pretrained`, so that its conversions and quantisers apply. Knows no metric and no text.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any

from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..families import is_native
from ..model import class_and_config, from_tensors
from ..stack import Stack, split_layers
from .pruned import frame_class, layer_class
from .trim import trim

if TYPE_CHECKING:
    import torch
    from torch import nn

ALTOGETHER = {  # families whose layers cannot be run one by one, and why
    "reformer": "its layers hand on two streams of hidden states",
    "rwkv": "its layers change as the model goes through them",
}


@dataclass(frozen=True)
class State:
    """What stands between two layers. returned: what the last layer returned: its hidden states [..., batch, tokens, width], or a tuple of
    them and of what the next layer takes. shared: what layers put into a mapping that they were given, by the mapping's name."""

    returned: Any
    shared: dict[str, dict[Any, Any]] = field(default_factory=dict)

    @property
    def hidden(self) -> torch.Tensor:
        """The hidden states."""
        return self.returned[0] if isinstance(self.returned, tuple | list) else self.returned

    def of(self, samples: slice) -> State:
        """What stands there of some samples, where it can be taken apart."""
        return State(self.returned[samples])

    @property
    def comes_apart(self) -> bool:
        """Whether hidden states [batch, tokens, width] are all that stands there."""
        return self.returned is self.hidden and self.hidden.ndim == 3 and not self.shared


class _Reached(Exception):
    """A frame's forward came to a layer that has not been run."""

    def __init__(self, number: int, args: Any, kwargs: Any):
        self.number, self.args_given, self.kwargs_given = number, args, kwargs


class Parts:
    """The parts of a model. loads: how often a layer's weights were read; forwards: how often a layer was run on a batch.

    Args:
        device: where parts are put, as torch names it. resident: keep each layer once it is loaded.
        options: for `from_pretrained`, such as dtype.
    Raises:
        DowncycleError: a family that cannot be taken apart, with why.
    """

    def __init__(self, checkpoint: Checkpoint, *, device: str = "cpu", resident: bool = False, **options: Any):
        self.checkpoint, self.device, self.resident = checkpoint, device, resident
        self.options = options | ({"device_map": {"": device}} if device != "cpu" else {})
        self.depth = checkpoint.num_layers
        self.loads = self.forwards = 0
        _check(checkpoint, stack := split_layers(checkpoint))
        self._class, self._config = class_and_config(checkpoint)
        if getattr(self._config, "is_encoder_decoder", False):
            raise _refusal(checkpoint, "it is an encoder with a decoder, and does not run on text alone")
        names = {id(tensor): name for name, tensor in checkpoint.tensors.items()}
        self._layers = [{names[id(tensor)]: tensor for tensor in layer.values()} for layer in stack.layers]
        self._rest = stack.rest
        self._kept: dict[int, nn.Module] = {}
        self._bare: list[Any] = []
        self._ties: dict[str, str] = {}
        self._frame: Any = None
        self._shape: tuple[str, int] | None = None  # what a layer of this family returns: tensor, tuple or list, and of how many

    def layer(self, number: int, to_change: bool = False) -> nn.Module:
        """Load a decoder layer, by its number. to_change: one whose weights the caller may change."""
        if to_change and self.resident:
            return deepcopy(self.layer(number))
        if number not in self._kept:
            part = self._load(number, self.layer_tensors(number))
            layer = part.get_submodule(part.stack_name)._modules.pop(str(number))  # the rest may live on until Python collects its garbage
            self.loads += 1
            if not self.resident:
                return layer
            self._kept[number] = layer
        return self._kept[number]

    def step(self, layer: nn.Module, number: int, ids: torch.Tensor, state: State | None) -> State | None:
        """Run a layer on a batch.

        Args:
            ids: [batch, tokens]. state: what stands after the last layer that was run before; None where there was none.
        Returns:
            What stands after it; the same where the model's loop passes this layer over.
        Raises:
            DowncycleError: numbers that are not finite, with the layer's name.
        """
        import torch

        found = self._run_to(number, ids, state)
        if found is None:
            return state
        args, kwargs = found
        mappings = {name: (value, set(value)) for name, value in kwargs.items() if isinstance(value, MutableMapping)}
        for name, values in (state.shared if state else {}).items():
            mappings[name][0].update(values)
        returned = layer(*args, **kwargs)
        self.forwards += 1
        self._shape = _shape_of(returned)
        shared = {name: {key: value[key] for key in value if key not in own} for name, (value, own) in mappings.items()}
        after = State(returned, {name: values for name, values in shared.items() if values})
        if not bool(torch.isfinite(after.hidden).all()):
            entered = bool(torch.isfinite(_hidden_of_call(args, kwargs)).all())
            what, part = (f"layer {number}", layer) if entered else ("the embeddings", self.frame)
            raise DowncycleError(f"{self.checkpoint.name}: the output of {what} is not finite{why_not_finite(part)}")
        return after

    def entering(self, number: int, ids: torch.Tensor, state: State | None) -> torch.Tensor | None:
        """Return the hidden states that enter a layer, [..., batch, tokens, width]; None where the model's loop passes it over."""
        found = self._run_to(number, ids, state)
        return None if found is None else _hidden_of_call(*found)

    def notes(self) -> Any:
        """Return, for JSON, what was learnt by running layers."""
        return self._shape

    def recall(self, notes: Any) -> None:
        """Take up what an earlier process learnt."""
        self._shape = tuple(notes) if notes else self._shape

    @property
    def vocabulary(self) -> int:
        """How many tokens the model has logits for."""
        return int(self._config.get_text_config().vocab_size)

    def logits(self, ids: torch.Tensor, state: State | None, columns: torch.Tensor | None = None) -> torch.Tensor:
        """Return the logits [batch, columns, vocabulary] after the last layer, of all tokens or of these columns of them."""
        self._stand_in(self.depth, state)
        if columns is None or "logits_to_keep" in signature(self.frame.forward).parameters:
            return self._forward(ids, **({} if columns is None else {"logits_to_keep": columns})).logits
        return self._forward(ids).logits[:, columns]

    @property
    def frame(self) -> Any:
        """The model without its decoder layers."""
        if self._frame is None:
            self._frame = self._load(None, self._rest)
            self._ties = self._frame.ties
        return self._frame

    def release(self) -> None:
        """Give the frame's memory back; it is loaded again when it is needed."""
        self._frame = None

    def _forward(self, ids: torch.Tensor, **options: Any) -> Any:
        try:
            return self.frame(input_ids=ids, use_cache=False, **options)
        except (TypeError, ValueError, KeyError) as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise DowncycleError(f"{self.checkpoint.name}: does not run on text alone: {said}") from error

    def _run_to(self, number: int, ids: torch.Tensor, state: State | None) -> tuple[Any, Any] | None:
        """Return the arguments that the model gives to a layer; None where it does not call it."""
        self._stand_in(number, state)
        try:
            self._forward(ids)
        except _Reached as reached:
            if reached.number == number:
                return reached.args_given, reached.kwargs_given
        return None

    def _stand_in(self, number: int, state: State | None) -> None:
        """Let the layers before `number` give a state, or, where there is none yet, what enters them; let the others end the forward."""

        def before(place: int, *args: Any, **kwargs: Any) -> Any:
            return self._pass_on(place, args, kwargs) if state is None else state.returned

        def from_here(place: int, *args: Any, **kwargs: Any) -> Any:
            raise _Reached(place, args, kwargs)

        for place, layer in enumerate(self.frame.stand_ins):
            layer.forward = partial(before if place < number else from_here, place)

    def _pass_on(self, number: int, args: Any, kwargs: Any) -> Any:
        """Put the hidden states that enter a layer into what it would return; how that looks is learnt by running it, once."""
        if self._shape is None:
            copies = {name: dict(value) if isinstance(value, MutableMapping) else value for name, value in kwargs.items()}
            self._shape = _shape_of(self.layer(number)(*args, **copies))
        hidden = _hidden_of_call(args, kwargs)
        kind, length = self._shape
        values = [hidden, *[None] * (length - 1)]
        return {"tuple": tuple(values), "list": values}.get(kind, hidden)

    def layer_tensors(self, number: int) -> dict[str, Tensor]:
        """Return the tensors of a layer, those among them that it shares with another."""
        self.frame  # noqa: B018 - knows what is shared
        start = f"{self.frame.stack_name}.{number}."
        shared = {name: source for name, source in self._ties.items() if name.startswith(start)}
        known = self.checkpoint.tensors
        return self._layers[number] | {name: known[source] for name, source in shared.items() if name not in known and source in known}

    def _load(self, number: int | None, tensors: dict[str, Tensor]) -> Any:
        """Load the frame (None) or the part that holds one layer."""
        import torch

        trim()
        part = frame_class(self._class, self.depth) if number is None else layer_class(self._class, self.depth, number, self._bare)
        try:
            with torch.inference_mode(False), _quiet():  # weights that are made in inference mode can never have gradients
                model = from_tensors(part, self._config, tensors, self.checkpoint.name, **self.options)
        except (OSError, RuntimeError, ValueError, TypeError, ImportError, KeyError, AttributeError) as error:
            said = " ".join(str(error).split())[:200] or type(error).__name__
            raise DowncycleError(f"{self.checkpoint.name}: transformers cannot load it layer by layer: {said}") from error
        if number is None:
            stack = model.get_submodule(model.stack_name)
            stack._modules.update({str(place): layer for place, layer in enumerate(model.stand_ins)})
        for module in model.modules():
            module.__dict__.pop("_init_weights", None)  # it refers back to the module, which would outlive its last use
        for weight in model.parameters():
            weight.requires_grad_(False)
        return model


def _hidden_of_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    return args[0] if args else kwargs["hidden_states"]


def _shape_of(returned: Any) -> tuple[str, int]:
    return (type(returned).__name__, len(returned)) if isinstance(returned, tuple | list) else ("Tensor", 1)


def why_not_finite(part: nn.Module) -> str:
    """Name a weight that is not finite itself; if there is none, the computation overflowed."""
    for name, weight in part.named_parameters():
        if weight.is_floating_point() and not weight.is_meta and not weight.isfinite().all():
            return f", as its weight {name} holds NaN or infinity: the file is damaged, or the training that made it failed"
    if any(str(weight.dtype) == "torch.float16" for weight in part.parameters()):
        return ": numbers grow beyond what float16 holds; try --load bf16 or fp32"
    return ", though its weights are; try --load fp32, and check how the model was made"


def _check(checkpoint: Checkpoint, stack: Stack) -> None:
    """Refuse a model that cannot be taken apart."""
    why = ""
    if checkpoint.config.get("auto_map") and not is_native(checkpoint.config):
        why = "its Python code, which comes with it, is not run"
    elif len(stack.stems) > 1:
        why = f"each of its layers is spread over {len(stack.stems)} lists"
    else:
        why = ALTOGETHER.get(checkpoint.config.get("model_type", ""), "")
    if why:
        raise _refusal(checkpoint, why)


def _refusal(checkpoint: Checkpoint, why: str) -> DowncycleError:
    return DowncycleError(f"{checkpoint.name}: cannot be run layer by layer, as {why}; choose with --select first, tail, ends or even")


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from saying that a part of a model lacks what the whole has."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)

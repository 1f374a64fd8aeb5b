"""The decoder stack of a checkpoint: which tensors belong to which layer, by their names.

Reads names only.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from .checkpoint import Checkpoint, Span, Tensor
from .errors import DowncycleError

OTHER_TOWERS = re.compile(
    r"vision|visual|image|audio|speech|vit\b|perceiver|resampler|qformer|patcher|local_(?:en|de)coder|\bmtp", re.IGNORECASE
)
STACK_WORDS = ("layers.", "layer.", "h.", "blocks.", "block.")
# Stacks that are one: every layer has a part in each of them.
PARALLEL_STACKS = (
    ("transformer.attentions.", "transformer.layer_norm1.", "transformer.ffns.", "transformer.layer_norm2."),  # XLM
    ("model.H_module.layers.", "model.L_module.layers."),  # HRM
)
NUMBERED = re.compile(r"((?:[^.]+\.)*?)(0|[1-9][0-9]{0,8})\.(.+)", re.DOTALL)  # up to the first number, the number, the rest

Layer = dict[tuple[str, str], Tensor]  # by what stands before and behind the layer's number


@dataclass(frozen=True)
class Stack:
    """The tensors of a model by layer, those of layers beyond its depth (multi-token prediction), and the rest."""

    layers: list[Layer]
    beyond: dict[int, Layer]
    rest: dict[str, Tensor]
    stems: tuple[str, ...]

    @property
    def word(self) -> str:
        """The word before a layer's number, like "layers"."""
        return self.stems[0].rstrip(".").rpartition(".")[2]


def split_layers(checkpoint: Checkpoint) -> Stack:
    """Sort the tensors of a checkpoint by decoder layer.

    Raises:
        DowncycleError: no part, or more than one part, of the model has as many numbered layers as the config states.
    """
    depth = checkpoint.num_layers
    stems = layer_stems(checkpoint.tensors, depth)
    numbered: defaultdict[int, Layer] = defaultdict(dict)
    rest: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        match = NUMBERED.fullmatch(name)
        if match and match[1] in stems:
            numbered[int(match[2])][match[1], match[3]] = tensor
        else:
            rest[name] = tensor
    beyond = {number: numbered[number] for number in sorted(numbered) if number >= depth}
    return Stack([numbered[number] for number in range(depth)], beyond, rest, stems)


def join_layers(stack: Stack) -> dict[str, Tensor]:
    """Name the tensors of a stack by their layers' places, in the order in which they lie in their files."""
    tensors = dict(stack.rest)
    for number, layer in [*enumerate(stack.layers), *stack.beyond.items()]:
        tensors |= {f"{stem}{number}.{name}": tensor for (stem, name), tensor in layer.items()}
    return dict(sorted(tensors.items(), key=lambda item: _place(item[1])))


def layer_stems(names: Iterable[str], depth: int) -> tuple[str, ...]:
    """Return what stands before the layer's number in tensor names: "model.layers.", "transformer.h.", ...; mostly just one."""
    numbers: defaultdict[str, set[int]] = defaultdict(set)
    for name in names:
        if match := NUMBERED.fullmatch(name):
            numbers[match[1]].add(int(match[2]))
    stems = [stem for stem, found in numbers.items() if found.issuperset(range(depth)) and not OTHER_TOWERS.search(stem)]
    for preferred in (
        [stem for stem in stems if stem.endswith(STACK_WORDS)],
        [stem for stem in stems if ".encoder." not in f".{stem}"],
    ):
        if len(stems) > 1 and preferred:
            stems = [stem for stem in stems if stem in preferred]
    for parallel in PARALLEL_STACKS:
        if set(parallel) == set(stems):
            return parallel
    if len(stems) != 1:
        seen = ", ".join(f"{stem}* ({len(found)})" for stem, found in numbers.items()) or "none"
        raise DowncycleError(f"found {len(stems) or 'no'} parts with the config's {depth} numbered layers; numbered parts: {seen}")
    return (stems[0],)


def _place(tensor: Tensor) -> tuple[str, int]:
    return (tensor.data.path, tensor.data.start) if isinstance(tensor.data, Span) else ("\U0010ffff", 0)

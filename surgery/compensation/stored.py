"""Find where a module's weight is stored in the checkpoint: by its shape, values and name. Knows no family's naming."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from math import prod
from typing import TYPE_CHECKING

from ..adapter.lowrank import FLOATS, to_torch
from ..checkpoint import Span, Tensor
from ..errors import UnsuitableError

if TYPE_CHECKING:
    import torch

ROWS = 64  # of a weight that are compared
LAST_NUMBER = re.compile(r"(.+\.)([0-9]{1,6})\.(.+)")


def find_stored(model: str, name: str, value: torch.Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return under which name a weight is stored; of the stacked weights of experts, [experts, ...], that may be one name for each.

    Args:
        model: its name, for errors. name: the weight's own, in its layer or in the model. tensors: where it may be, by name.
    Raises:
        UnsuitableError: none holds it as it is (a quantiser packed it, or loading rearranges it); or several do, and none has its name.
    """
    same = [stored for stored, tensor in tensors.items() if holds(tensor, value)]
    named = [stored for stored in same if _alike(stored, name)]
    if found := named[:1] if named else same if len(same) == 1 else _experts(value, tensors) if not same else []:
        return found
    what = "several tensors hold" if same else "no tensor of it holds"
    raise UnsuitableError(
        f"{model}: {what} the values of {name} {list(value.shape)}, so that they cannot be changed; try --compensate none"
    )


def holds(tensor: Tensor, value: torch.Tensor) -> bool:
    """Whether a tensor has a weight's shape, and in its first rows the weight's values."""
    if tensor.shape != tuple(value.shape) or tensor.dtype not in FLOATS:
        return False
    return bool((to_torch(_first_rows(tensor)).to(value.dtype) == value[:ROWS].cpu()).all())


def _first_rows(tensor: Tensor) -> Tensor:
    rows = min(ROWS, tensor.shape[0]) if tensor.shape else 1
    if not isinstance(tensor.data, Span) or not tensor.shape or not prod(tensor.shape):
        return tensor
    length = tensor.nbytes // tensor.shape[0] * rows
    return Tensor(tensor.dtype, (rows, *tensor.shape[1:]), replace(tensor.data, length=length))


def _alike(stored: str, name: str) -> bool:
    """Whether one of two names is the end of the other: files may leave out the first words, and layers know nothing of what is around."""
    return f".{stored}".endswith(f".{name}") or f".{name}".endswith(f".{stored}")


def _experts(value: torch.Tensor, tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names that differ in one number, which counts the experts, and that hold each the weight of its own."""
    groups = defaultdict[tuple[str, str], dict[int, str]](dict)
    for name in tensors:
        if match := LAST_NUMBER.fullmatch(name):
            groups[match[1], match[3]][int(match[2])] = name
    for names in groups.values():
        if sorted(names) == list(range(len(value))) and all(holds(tensors[names[place]], value[place]) for place in names):
            return list(names.values())
    return []

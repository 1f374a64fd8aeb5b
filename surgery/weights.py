"""How many weights a checkpoint holds: packed ternary matrices hold four in each byte. Reads config and names only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

from .checkpoint import Checkpoint, Tensor
from .quantizer import packed_by

BITNET = "bitnet"  # transformers' name of the packing
FOUR = 4  # weights in a byte


def is_ternary(config: Mapping[str, Any]) -> bool:
    """Whether a model's weights are packed as ternary ones, by its config."""
    return packed_by(config) == BITNET


def is_inverse(config: Mapping[str, Any]) -> bool:
    """Whether the scales of a model that is packed so are 1 / s, as transformers' BitLinear reads them; AutoBitLinear reads s."""
    return dict(config.get("quantization_config") or {}).get("linear_class", "bitlinear") == "bitlinear"


def scale_of(name: str) -> str:
    """Name the tensor that holds the scale of a ternary matrix."""
    return f"{name}_scale"


def ternary_matrices(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the packed ternary matrices [outputs / 4, inputs] of a checkpoint, by their names; none where it is not packed so."""
    if not is_ternary(checkpoint.config):
        return {}
    tensors = checkpoint.tensors
    return {name: one for name, one in tensors.items() if one.dtype == "U8" and len(one.shape) == 2 and scale_of(name) in tensors}


def scaled_bias(checkpoint: Checkpoint, matrices: Iterable[str]) -> str:
    """Name the first of some maps that has a bias: AutoBitLinear multiplies that with the scale too. Empty where none has."""
    maps = (name.removesuffix(".weight") for name in matrices)
    return next((name for name in maps if f"{name}.bias" in checkpoint.tensors), "")


def weights_in(checkpoint: Checkpoint) -> dict[str, int]:
    """Return how many weights each tensor holds: numbers stored, but four in a byte of ternary ones, and none in their scales."""
    ternary = ternary_matrices(checkpoint)
    scales = set(map(scale_of, ternary))
    held = {name: prod(tensor.shape) * (FOUR if name in ternary else 1) for name, tensor in checkpoint.tensors.items()}
    return {name: 0 if name in scales else count for name, count in held.items()}


def num_parameters(checkpoint: Checkpoint) -> int:
    """Return the weights of all tensors: parameters, where nothing but ternary weights is packed."""
    return sum(weights_in(checkpoint).values())

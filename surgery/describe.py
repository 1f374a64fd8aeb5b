"""What a checkpoint is made of, from its headers alone: layers and their kinds, parameters, bytes, dtypes."""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import Any

from .checkpoint import Checkpoint, file_length
from .quantizer import packed_by
from .stack import split_layers
from .weights import num_parameters, weights_in

KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what `downcycle inspect` prints. Elements are numbers stored, or ternary weights, four in a byte: parameters, where nothing
    else is packed.

    layer_kinds counts the layers of each kind that the config names; layer_elements lists the elements of each layer.
    """
    dtypes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        dtypes[tensor.dtype] += prod(tensor.shape)
    held = weights_in(checkpoint)
    layers = enumerate(split_layers(checkpoint).layers)
    config = _section(checkpoint.config, "text_config") or checkpoint.config
    kinds = Counter(str(kind) for field in KINDS for kind in _entries(config, field))
    return {
        "name": checkpoint.name,
        "revision": checkpoint.revision,
        "model_type": checkpoint.config.get("model_type"),
        "architectures": [str(name) for name in _entries(checkpoint.config, "architectures")],
        "layers": checkpoint.num_layers,
        "layer_kinds": dict(kinds.most_common()),
        "layer_elements": [sum(held[f"{stem}{number}.{name}"] for stem, name in layer) for number, layer in layers],
        "elements": num_parameters(checkpoint),
        "tensors": len(checkpoint.tensors),
        "bytes": checkpoint.nbytes,
        "dtypes": dict(dtypes.most_common()),
        "quantization": packed_by(checkpoint.config) or None,
        "files": {path: file_length(data) for path, data in checkpoint.files.items()},
    }


def _section(config: dict[str, Any], name: str) -> dict[str, Any]:
    return config[name] if isinstance(config.get(name), dict) else {}


def _entries(config: dict[str, Any], name: str) -> list[Any]:
    return config[name] if isinstance(config.get(name), list) else []

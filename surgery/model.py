"""Make a transformers model from a Checkpoint value, written or not. Needs torch and transformers."""

from __future__ import annotations

import json
import mmap
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import CONFIG, Checkpoint, Span, Tensor
from .errors import DowncycleError
from .sources import LocalFolder

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    """Return the model in evaluation mode, made by stock `from_pretrained`, so that its conversions and quantisers apply.

    Weights of local files are mapped, not read, until the model takes them.

    Args:
        options: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.
    """
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise DowncycleError("loading a model needs torch and transformers: pip install 'downcycle[score]'") from error
    maps: dict[Path, torch.Tensor] = {}
    weights = {name: _as_torch(tensor, maps) for name, tensor in checkpoint.tensors.items()}
    with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(checkpoint.config))
        for path, data in checkpoint.files.items():
            if path == "generation_config.json" or path.endswith(".py"):
                (Path(folder) / path).write_bytes(data.read() if isinstance(data, Span) else data)
        return AutoModelForCausalLM.from_pretrained(folder, state_dict=weights, **options).eval()


def _as_torch(tensor: Tensor, maps: dict[Path, torch.Tensor]) -> torch.Tensor:
    """Give a tensor's bytes as a torch tensor: a view of the mapped file where there is one."""
    import torch
    from safetensors.torch import _TYPES

    if isinstance(tensor.data, Span) and isinstance(tensor.data.source, LocalFolder):
        span = tensor.data
        whole = _map_file(tensor.data.source.folder / span.path, maps)
        flat = whole[span.start : span.start + span.length]
        if span.start % _TYPES[tensor.dtype].itemsize:
            flat = flat.clone()
    else:
        flat = torch.frombuffer(bytearray(b"".join(tensor.chunks())) or bytearray(1), dtype=torch.uint8)[: tensor.nbytes]
    return flat.view(_TYPES[tensor.dtype]).reshape(tensor.shape)


def _map_file(path: Path, maps: dict[Path, torch.Tensor]) -> torch.Tensor:
    """Map a file privately: a model that changes its weights changes memory, never the file."""
    import torch

    if path not in maps:
        with open(path, "rb") as file:
            maps[path] = torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), dtype=torch.uint8)
    return maps[path]

"""Make a transformers model from a Checkpoint value, written or not. Needs torch and transformers."""

from __future__ import annotations

import json
import mmap
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint import Checkpoint, Span, Tensor, file_bytes
from .errors import DowncycleError
from .families import is_native
from .filenames import CONFIG, GENERATION
from .write import write

# How torch spells what safetensors calls F32, I8, ...; packed sub-byte dtypes other than F4 have no name there.
TORCH_DTYPES = {
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"{kind}{bits}": f"{word}{bits}" for kind, word in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)},
    **{"BF16": "bfloat16", "BOOL": "bool", "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"},
    **{"F8_E8M0": "float8_e8m0fnu", "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz", "F4": "float4_e2m1fn_x2"},
}
# MAP_NORESERVE, which Python names from 3.13 on: without it Linux refuses to map a file that is larger than its memory.
UNRESERVED = 0x4000 if sys.platform == "linux" else 0

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def load_model(checkpoint: Checkpoint, **options: Any) -> PreTrainedModel:
    """Return the model in evaluation mode, made by stock `from_pretrained`, so that its conversions and quantisers apply.

    Weights of local files are mapped, not read, until the model takes them.

    Args:
        options: for `AutoModelForCausalLM.from_pretrained`, such as dtype or device_map.
    Raises:
        DowncycleError: weights are missing that the model needs, torch is, or transformers knows no such model.
    """
    transformers = _transformers()
    if checkpoint.config.get("auto_map") and not is_native(checkpoint.config):
        with tempfile.TemporaryDirectory(prefix="downcycle-") as folder, _no_bars():
            return transformers.AutoModelForCausalLM.from_pretrained(write(checkpoint, Path(folder) / "model"), **options).eval()
    model = from_tensors(*class_and_config(checkpoint), checkpoint.tensors, checkpoint.name, **options)
    if GENERATION in checkpoint.files:
        with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
            (Path(folder) / GENERATION).write_bytes(file_bytes(checkpoint.files[GENERATION]))
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


def class_and_config(checkpoint: Checkpoint) -> tuple[Any, Any]:
    """Return the class that writes text, and the config that it takes: that of the text decoder, where it is made for no other tower."""
    transformers = _transformers()
    with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
        (Path(folder) / CONFIG).write_text(json.dumps(checkpoint.config))
        config = transformers.AutoConfig.from_pretrained(folder)
    model_class = _class_for(config)
    text = config.sub_configs.get("text_config")
    return model_class, config.get_text_config() if text is not None and model_class.config_class == text else config


def from_tensors(model_class: Any, config: Any, tensors: Mapping[str, Tensor], name: str, **options: Any) -> Any:
    """Make a model of a class from tensors by name, as stock `from_pretrained` does.

    Raises:
        DowncycleError: weights are missing that it needs; transformers would make random numbers of them.
    """
    maps: dict[Path, torch.Tensor] = {}
    weights = {key: _as_torch(tensor, maps) for key, tensor in tensors.items()}
    with _no_bars():
        model, told = model_class.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True, **options)
    if missing := sorted(told["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise DowncycleError(f"{name}: lacks {', '.join(missing[:3])}{more}, which a {model_class.__name__} needs; fetch it again")
    return model.eval()


def _transformers() -> Any:
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise DowncycleError("loading a model needs torch and transformers: pip install 'downcycle[score]'") from error
    return transformers


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keep transformers' bars away: a library does not print."""
    from transformers.utils import logging

    before = logging.set_tqdm_hook(lambda factory, args, kwargs: logging.EmptyTqdm(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


def _class_for(config: Any) -> Any:
    """Return the class that writes text: that of the causal-LM mapping, or, for a multimodal model that is not in it, the config's own."""
    import transformers

    if type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    names = config.architectures or ["no architecture"]
    if found := getattr(transformers, names[0], None):
        return found
    raise DowncycleError(f"transformers {transformers.__version__} has no class {names[0]} for a {config.model_type!r}; upgrade it")


def _as_torch(tensor: Tensor, maps: dict[Path, torch.Tensor]) -> torch.Tensor:
    """Give a tensor's bytes as a torch tensor: a view of the mapped file where there is one."""
    import torch

    dtype: torch.dtype = getattr(torch, TORCH_DTYPES[tensor.dtype])
    span = tensor.data
    if isinstance(span, Span) and span.length and (path := span.source.local_path(span.path)):
        flat = _map_file(path, maps)[span.start : span.start + span.length]
        if span.start % dtype.itemsize:
            flat = flat.clone()
    else:
        flat = torch.frombuffer(bytearray().join(tensor.chunks()) or bytearray(1), dtype=torch.uint8)[: tensor.nbytes]
    return flat.view(dtype).reshape(tensor.shape)


def _map_file(path: Path, maps: dict[Path, torch.Tensor]) -> torch.Tensor:
    """Map a file privately: a model that changes its weights changes memory, never the file."""
    import torch

    if path not in maps:
        with open(path, "rb") as file:
            flags = mmap.MAP_PRIVATE | UNRESERVED
            maps[path] = torch.frombuffer(mmap.mmap(file.fileno(), 0, flags, mmap.PROT_READ | mmap.PROT_WRITE), dtype=torch.uint8)
    return maps[path]

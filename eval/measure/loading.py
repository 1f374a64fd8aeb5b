"""Load a model for measuring: in the dtype that is asked for, on the device that is there, or not at all where its memory would not do.

Knows nothing of text and scores.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...recipes.dataset.tokenizer import load_files
from ...recipes.memory import FRAGMENTED, GIB, format_gib, model_size, weight_bytes
from ...surgery.checkpoint import Checkpoint, Span
from ...surgery.errors import DowncycleError
from ...surgery.families import is_native
from ...surgery.filenames import CONFIG, INDEX
from ...surgery.model import TORCH_DTYPES, load_model
from ...surgery.quantizer import packed_by
from ..content import cache_folder
from .memory import free_memory, peak_memory, start_peak
from .uncompiled import run_uncompiled, uncompiled

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LOADS = ("stored", "bf16", "fp32", "int8", "nf4")
BY_BITSANDBYTES = ("int8", "nf4")
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
WORKING = 0.5 * GIB  # activations of a batch, and what the libraries take
LENGTH = 2048  # tokens that are read at once, where a model has so many positions
POSITIONS = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length", "max_sequence_length")


@dataclass(frozen=True)
class Loaded:
    """A model that runs, and where it came from. load: one of LOADS.

    held: bytes that the process held before loading (see `memory`); peak: the most in loading above that.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    load: str
    checkpoint: Checkpoint
    held: int
    peak: int


def load(
    checkpoint: Checkpoint, how: str = "stored", *, device: str = "auto", offload: bool = False, trust_remote_code: bool = False
) -> Loaded:
    """Load a model and its tokenizer. Of a Hub repo, the files that are needed are first put into the local cache.

    Args:
        how: stored (the dtype that most weights are stored in; a quantised or packed checkpoint as it is), bf16, fp32, int8 (LLM.int8) or
            nf4 (QLoRA, arXiv 2305.14314: double quantisation, computing in bf16); the last two by bitsandbytes.
        device: auto (a GPU if there is one), cpu, cuda or cuda:N.
        offload: run a model that is larger than the device's memory: from GPUs, this machine's memory and its disk; on a CPU from the
            file of its weights, or from a copy in the cache folder where they must be converted.
    Raises:
        DowncycleError: too large, without a tokenizer, or cannot be loaded so; says what would do.
    """
    check_how(checkpoint, how)
    place = find_device(device)
    fits = check_memory(checkpoint, how, place, offload)
    fetch(checkpoint)
    tokenizer = load_tokenizer(checkpoint, trust_remote_code)
    options = load_options(checkpoint, how, place, trust_remote_code)
    if fits:
        options |= {"device_map": {"": place}} if place != "cpu" else {}
    elif place != "cpu" or not runs_from_file(checkpoint, how):
        options |= offload_options(place)
    import torch

    held = start_peak(place)
    with uncompiled(checkpoint, place):
        model = _load(checkpoint, how, options)
    run_uncompiled(model, checkpoint, place)
    peak = peak_memory(place) - held
    return Loaded(model, tokenizer, torch.device(place), how, checkpoint, held, peak)


def load_tokenizer(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer from the checkpoint's small files.

    Raises:
        DowncycleError: it has none, or a damaged one.
    """
    files = {**checkpoint.files, CONFIG: json.dumps(checkpoint.config).encode()}
    return load_files(f"{checkpoint.name}: its tokenizer", files, trust_remote_code)


def find_device(device: str) -> str:
    """Return the device that a model will lie on: cpu or cuda:N."""
    try:
        import torch
        import transformers  # noqa: F401 - both are in memory before anything is measured
    except ImportError as error:
        raise DowncycleError("measuring a model needs torch and transformers: pip install 'downcycle[eval]'") from error
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    kind, _, number = "cuda:0".partition(":") if device in ("auto", "cuda") else device.partition(":")
    if kind == "cuda" and number.isdecimal() and int(number) < gpus:
        return f"cuda:{int(number)}"
    there = ", ".join(f"cuda:{gpu}" for gpu in range(gpus)) or "no CUDA GPU"
    raise DowncycleError(f"device {device}: not there; this machine has cpu and {there}")


def positions(config: Any) -> int | None:
    """How many tokens a model of this transformers config can read at once; None where nothing limits it."""
    text = config.get_text_config()
    return next((value for name in POSITIONS if type(value := getattr(text, name, None)) is int and value > 0), None)


def vocabulary(model: Any) -> int:
    """How many tokens a model has embeddings for."""
    return int(model.get_input_embeddings().weight.shape[0])


def fetch(checkpoint: Checkpoint) -> None:
    """Put the files of a Hub repo that a checkpoint uses into the local Hub cache, from where they are read from then on."""
    from ...surgery.hub import HubRepo

    data = [part for tensor in checkpoint.tensors.values() for part in (tensor.data, *tensor.inputs)]
    spans = [part for part in (*data, *checkpoint.files.values()) if isinstance(part, Span)]
    repos = {id(span.source): span.source for span in spans if isinstance(span.source, HubRepo)}
    for key, repo in repos.items():
        used = {span.path for span in spans if id(span.source) == key}
        repo.keep(sorted(used | ({CONFIG, INDEX} & repo.files.keys())))


# How much memory.


def needed_bytes(checkpoint: Checkpoint, how: str) -> float:
    """About what a model takes to read a window, in bytes: its weights, what an allocator cannot use, logits (bf16, float32), and more."""
    size = model_size(checkpoint)
    weights = checkpoint.nbytes if how == "stored" else weight_bytes(size, how)
    return weights * FRAGMENTED + 6 * LENGTH * size.vocab + WORKING


def check_memory(checkpoint: Checkpoint, how: str, device: str, offload: bool) -> bool:
    """Whether a model fits into what a device has left; refuse one that does not and cannot be offloaded."""
    needs, free = needed_bytes(checkpoint, how), free_memory(device)
    if needs <= free:
        return True
    possible = _can_offload(checkpoint, how, device)
    if offload and possible:
        return False
    smaller = {} if packed_by(checkpoint.config) else {other: needed_bytes(checkpoint, other) for other in ("bf16", "int8", "nf4")}
    ways = [f"--load {other} ({format_gib(size)})" for other, size in smaller.items() if other != how and size <= min(free, needs)]
    ways += ["--offload"] if possible else []
    cannot = f"; --offload cannot help: {_why_not(checkpoint, how)}" if offload else ""
    advice = f"what would fit: {', or '.join(ways)}" if ways else "it needs a machine with more memory, or fewer layers"
    raise DowncycleError(
        f"{checkpoint.name}: needs about {format_gib(needs)} as {how}, and {device} has {format_gib(free)} free{cannot}; {advice}"
    )


def runs_from_file(checkpoint: Checkpoint, how: str) -> bool:
    """Whether transformers uses the bytes of local files as they are: then the kernel pages them in and out, and memory stays small."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    mapping = get_checkpoint_conversion_mapping(checkpoint.config.get("model_type", "")) or ()
    converted = any(isinstance(rule, WeightConverter) for rule in mapping)
    copied = all(isinstance(tensor.data, Span) for tensor in checkpoint.tensors.values())
    asked = how == "stored" or TORCH_DTYPES[stored_dtype(checkpoint)] == DTYPES.get(how)
    return asked and copied and not converted


def stored_dtype(checkpoint: Checkpoint) -> str:
    """The floating dtype that most bytes are stored in, as safetensors spells it."""
    sizes: Counter[str] = Counter()
    for tensor in checkpoint.tensors.values():
        if tensor.dtype in ("F16", "BF16", "F32", "F64"):
            sizes[tensor.dtype] += tensor.nbytes
    return sizes.most_common(1)[0][0] if sizes else "BF16"


def _can_offload(checkpoint: Checkpoint, how: str, device: str) -> bool:
    if how in BY_BITSANDBYTES:
        return False
    return not packed_by(checkpoint.config) or (device == "cpu" and runs_from_file(checkpoint, how))


def _why_not(checkpoint: Checkpoint, how: str) -> str:
    what = f"bitsandbytes' {how}" if how in BY_BITSANDBYTES else f"weights packed by {packed_by(checkpoint.config)}"
    return f"{what} must lie in the device's memory"


def offload_options(device: str) -> dict[str, Any]:
    """Options by which accelerate spreads a model over GPUs, memory and disk; the folder is the caller's to delete."""
    cache_folder().mkdir(parents=True, exist_ok=True)
    for left in cache_folder().glob("offload-*"):  # of runs that were killed
        if not Path("/proc", left.name.split("-")[1]).exists():
            shutil.rmtree(left, ignore_errors=True)
    folder = tempfile.mkdtemp(prefix=f"offload-{os.getpid()}-", dir=cache_folder())
    limits: dict[Any, int] = {"cpu": int(max(0, free_memory("cpu") - WORKING) / FRAGMENTED)}
    if device != "cpu":
        import torch

        limits |= {gpu: int(max(0, free_memory(f"cuda:{gpu}") - WORKING) / FRAGMENTED) for gpu in range(torch.cuda.device_count())}
    return {"device_map": "auto", "max_memory": limits, "offload_folder": folder}


# How it is loaded.


def check_load(how: str) -> None:
    """Refuse what is none of LOADS."""
    if how not in LOADS:
        raise DowncycleError(f"--load {how}: choose one of {', '.join(LOADS)}")


def held_as(loaded: Loaded) -> str:
    """How the weights of a model are held, in words: what was asked for, or what they are stored in."""
    if loaded.load != "stored":
        return loaded.load
    if quantiser := packed_by(loaded.checkpoint.config):
        return f"packed by {quantiser}"
    dtype = str(loaded.model.dtype).removeprefix("torch.")
    return next((short for short, name in DTYPES.items() if name == dtype), dtype)


def check_how(checkpoint: Checkpoint, how: str) -> None:
    """Refuse a way of loading that this model, or this machine, has not."""
    check_load(how)
    if how != "stored" and (quantiser := packed_by(checkpoint.config)):
        raise DowncycleError(f"--load {how}: the weights of {checkpoint.name} are packed by {quantiser} already; leave --load out")
    if how in BY_BITSANDBYTES:
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as error:
            raise DowncycleError(f"--load {how}: needs bitsandbytes: pip install bitsandbytes") from error


def load_options(checkpoint: Checkpoint, how: str, device: str, trust_remote_code: bool = False) -> dict[str, Any]:
    """Return the options of `from_pretrained` that load a model so, onto a device of this kind."""
    import torch
    from transformers import BitsAndBytesConfig

    options: dict[str, Any] = {"dtype": getattr(torch, DTYPES.get(how, "bfloat16"))}
    if how == "stored":
        options["dtype"] = "auto" if packed_by(checkpoint.config) else getattr(torch, TORCH_DTYPES[stored_dtype(checkpoint)])
    elif how == "int8":
        # It computes in float16, and says for each layer of each batch that it does.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        options["quantization_config"] = BitsAndBytesConfig(load_in_8bit=True)
    elif how == "nf4":
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    if checkpoint.config.get("auto_map") and not is_native(checkpoint.config):
        options["trust_remote_code"] = trust_remote_code
    return options


def _load(checkpoint: Checkpoint, how: str, options: dict[str, Any]) -> PreTrainedModel:
    """Load a model; what was put on the disk for it goes with it."""
    folder = options.get("offload_folder")
    try:
        model = load_model(checkpoint, **options)
    except (OSError, RuntimeError, ValueError, ImportError, KeyError, AttributeError) as error:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
        said = " ".join(str(error).split())[:300] or type(error).__name__
        raise DowncycleError(f"{checkpoint.name}: transformers cannot load it as {how}: {said}") from error
    if folder:
        weakref.finalize(model, shutil.rmtree, folder, ignore_errors=True)
    return model

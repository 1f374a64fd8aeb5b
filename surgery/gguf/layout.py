"""Which tensors a GGUF file of a model holds: names, kinds, the order of rows, experts put together. Reads no weight but to see what is
ternary; writes nothing.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Any

import gguf
import numpy as np

from ..checkpoint import Checkpoint, Tensor
from ..errors import DowncycleError
from ..quantizer import packed_by
from ..ternary.record import is_latent
from ..weights import FOUR, is_inverse, scale_of, scaled_bias, ternary_matrices
from .architectures import Architecture, Config
from .encode import Encoder, ternary_codes
from .kinds import TERNARY, TYPES, Kind
from .rope import rope_factors
from .rows import UNITS, Array, Matrix
from .tensors import OWN_HEAD, check_tensors, repeated_head

EXPERT = re.compile(r"model\.layers\.([0-9]+)\.(?:mlp|block_sparse_moe)\.experts\.([0-9]+)\.(\w+)\.weight")
EXPERT_PARTS = {"w1": "gate", "gate_proj": "gate", "w2": "down", "down_proj": "down", "w3": "up", "up_proj": "up"}
BUFFERS = re.compile(r"rotary_emb\.inv_freq$|attention\.(?:masked_)?bias$")  # that old checkpoints hold, and that are computed
KEPT = re.compile(r"^token_embd|^output\.|_norm|ffn_gate_inp")  # never ternary
EXACT = re.compile(r"_norm|ffn_gate_inp|rope_freqs")  # float32 in every file


@dataclass(frozen=True)
class Layout:
    """What a file holds, in its order, and what must be said of it."""

    tensors: tuple[Encoder, ...]
    notes: tuple[str, ...]


def lay_out(model: Checkpoint, arch: Architecture, config: Config, kind: Kind) -> Layout:
    """Return the tensors of a GGUF file with these numbers.

    Raises:
        DowncycleError: a tensor that llama.cpp has no place for, or nothing that is ternary where the kind wants it.
    """
    _check_packing(model)
    found = _places(model, arch, config)
    check_tensors(model, config, {new: {name: _shape(model, name) for name in parts.values()} for new, parts in found.items()})
    whole = {
        new: tuple(_matrix(model, name, arch, config) for name in _complete(new, parts, config, model)) for new, parts in found.items()
    }
    if factors := rope_factors(config, config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]):
        whole["rope_freqs.weight"] = (Matrix(Tensor("F32", (len(factors) // 4,), lambda: [factors])),)
    kinds = {name: _kind(name, matrices, kind) for name, matrices in whole.items()}
    notes = _ternary_notes(model, whole, kinds, kind) if kind in TERNARY else _latent_note(model)
    add = {name: arch.add if "_norm" in name else 0.0 for name in whole}
    return Layout(tuple(Encoder(name, kinds[name], matrices, add[name]) for name, matrices in whole.items()), notes)


def _check_packing(model: Checkpoint) -> None:
    how = model.config.get("quantization_config") or {}
    if packed_by(model.config) and how.get("quantization_mode") == "online":
        raise DowncycleError(
            f"{model.name}: rounds its weights while it runs (quantization_mode online); llama.cpp does not; pack them first"
        )
    if not is_inverse(model.config) and (biased := scaled_bias(model, ternary_matrices(model))):
        raise DowncycleError(f"{model.name}: {biased} has a bias, which AutoBitLinear scales; pack it with --linear bitlinear")
    extra = next((name for name in model.tensors if ".rms_norm." in name), "")
    if how.get("use_rms_norm") or extra:
        raise DowncycleError(
            f"{model.name}: has a norm before its ternary maps ({extra or 'use_rms_norm'}), which llama.cpp has no place for"
        )


def _places(model: Checkpoint, arch: Architecture, config: Config) -> dict[str, dict[int, str]]:
    """Return the names of tensors by llama.cpp's names, and by their places among the experts of one."""
    ids = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(ids[arch.name], config["num_hidden_layers"])
    found: dict[str, dict[int, str]] = defaultdict(dict)
    repeated = repeated_head(model, config)
    for name in model.tensors:
        if name.endswith("weight_scale") or BUFFERS.search(name) or name == repeated:
            continue
        new, place = _new_name(name, names, model.name)
        if place in found[new]:
            raise DowncycleError(f"{model.name}: two tensors of it are {new} for llama.cpp, one of them {name}; mend the checkpoint")
        found[new][place] = name
    if config.get("tie_word_embeddings") and config["model_type"] in OWN_HEAD and "token_embd.weight" in found:
        found.setdefault("output.weight", found["token_embd.weight"])
    return found


def _new_name(name: str, names: gguf.TensorNameMap, model: str) -> tuple[str, int]:
    """Return what llama.cpp calls a tensor, and its place among the experts of one."""
    if (match := EXPERT.fullmatch(name)) and match[3] in EXPERT_PARTS:
        return f"blk.{match[1]}.ffn_{EXPERT_PARTS[match[3]]}_exps.weight", int(match[2])
    new = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if new is None:
        raise DowncycleError(f"{model}: llama.cpp has no place for {name} in this family; it is of another kind, or from a wrapper")
    return new, 0


def _complete(name: str, parts: dict[int, str], config: Config, model: Checkpoint) -> tuple[str, ...]:
    """Name the experts of a tensor in their order, or the one matrix that it is."""
    experts = config.get("num_local_experts") or config.get("num_experts") or 1
    needed = experts if "_exps." in name else 1
    if sorted(parts) != list(range(needed)):
        raise DowncycleError(f"{model.name}: {name} needs {needed} parts, and {len(parts)} are there; fetch it again")
    return tuple(parts[place] for place in range(needed))


def _shape(model: Checkpoint, name: str) -> tuple[int, ...]:
    """Return the shape of a tensor as numbers: four rows of a packed one lie in one."""
    shape = model.tensors[name].shape
    return (shape[0] * FOUR, *shape[1:]) if shape and scale_of(name) in model.tensors else shape


def _matrix(model: Checkpoint, name: str, arch: Architecture, config: Config) -> Matrix:
    tensor, scale = model.tensors[name], model.tensors.get(scale_of(name))
    if tensor.dtype not in UNITS or (tensor.dtype == "U8") != (scale is not None):
        raise DowncycleError(f"{model.name}: {name} holds {tensor.dtype}, which is neither floating-point nor a packed ternary matrix")
    return Matrix(tensor, scale, is_inverse(model.config), _order(name, _shape(model, name)[0], arch, config))


def _order(name: str, rows: int, arch: Architecture, config: Config) -> Array | None:
    """Return which row of a tensor comes where; None where the order is the tensor's own."""
    heads = config["num_attention_heads"]
    if arch.rotated and (match := re.search(r"self_attn\.([qk])_proj\.", name)):
        count = heads if match[1] == "q" else config.get("num_key_value_heads") or heads
        return np.arange(rows).reshape(count, 2, -1).swapaxes(1, 2).ravel()
    if name.partition(".query_key_value.")[2]:  # [head, q k v, dimension]
        return np.arange(rows).reshape(heads, 3, -1).swapaxes(0, 1).ravel()
    return None


def _kind(name: str, matrices: tuple[Matrix, ...], kind: Kind) -> Kind:
    """Say how a tensor is written: what is a vector, or needs to be exact, as F32; what cannot be ternary as F16."""
    first = matrices[0]
    if len(first.shape) < 2 or EXACT.search(name):
        return "f32"
    if kind not in TERNARY:
        return kind
    fits = first.width % TYPES[kind].block == 0 and not (kind == "i2_s" and len(matrices) > 1)
    return kind if fits and not KEPT.search(name) and all(map(_is_ternary, matrices)) else "f16"


def _is_ternary(matrix: Matrix) -> bool:
    """Whether a matrix begins with ternary weights, in its own order of rows; whether it goes on so is seen when it is written."""
    if matrix.scale:
        return True
    try:
        ternary_codes(next(replace(matrix, order=None).blocks()), matrix.weight.dtype, np.float32(0), "")
    except DowncycleError:
        return False
    return True


def _ternary_notes(model: Checkpoint, whole: dict[str, tuple[Matrix, ...]], kinds: dict[str, Kind], kind: Kind) -> tuple[str, ...]:
    block = TYPES[kind].block
    candidates = [name for name in whole if not KEPT.search(name) and len(whole[name][0].shape) > 1]
    narrow = [name for name in candidates if whole[name][0].width % block]
    kept = [name for name in candidates if kinds[name] != kind and name not in narrow]
    if len(narrow) == len(candidates):
        raise DowncycleError(f"{model.name}: no matrix has a multiple of {block} inputs, which {kind} needs; choose --type f16")
    if len(narrow) + len(kept) == len(candidates):
        raise DowncycleError(
            f"{model.name}: holds no ternary weights, and --type {kind} would ruin others; make a packed checkpoint first: "
            "downcycle ternarize DIR --out PACKED, and give that, or choose --type f16"
        )
    notes = []
    if narrow:
        notes.append(f"{len(narrow)} matrices stay F16, as their inputs are no multiple of {block}: {_some(narrow)}")
    if kept:
        notes.append(f"{len(kept)} matrices stay F16, as they are not ternary: {_some(kept)}")
    return tuple(notes)


def _latent_note(model: Checkpoint) -> tuple[str, ...]:
    """Say that floats are not what a ternary training trained."""
    if not is_latent(model.config, model.name):
        return ()
    return (f"{model.name} was trained with ternary weights, and these are the floats beneath them; what was trained: downcycle ternarize",)


def _some(names: list[Any]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")

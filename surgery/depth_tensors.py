"""Tensors that follow depth in other ways than by a number in their names, in the few families that have them.

Works on names, shapes and byte ranges; reads weights only when what it returns is written.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from .checkpoint import Span, Tensor
from .errors import DowncycleError
from .header import DTYPE_BITS, tensor_nbytes
from .sources import CHUNK
from .stack import Layer, Stack


class Own(NamedTuple):
    """A tensor that the layer at one place has and no other has, or has not and every other has."""

    name: str  # begins so, behind the layer's number
    place: int  # 0 or -1
    has: bool
    why: str
    mend: str = ""  # "zeros": where it is missing, zeros do what its absence did; "drop": where it is not wanted, nothing uses it


OWN = (
    Own("pre_ln.", 0, True, "the first layer norms the embeddings"),  # RWKV
    Own("attn_norm.", 0, False, "the first layer has no norm before attention"),  # ModernBERT decoder
    Own("mlp.gate.router_states_scale", 0, False, "the first layer has no router states to scale", "drop"),  # Zaya
    Own("attention.dense_bias", -1, True, "the last layer's attention has a bias", "zeros"),  # GPT-NeoX Japanese
)
# Tensors that transformers computes from a layer's number and the depth unless the files hold them, and what stands beside them (MiniMax).
COMPUTED = {"self_attn.slope_rate": ("self_attn.output_gate.weight", "self_attn.qkv_proj.weight")}
PER_LAYER_COLUMNS = ("embed_tokens_per_layer.weight",)  # [vocabulary, layers * size], Gemma 3n and 4
PER_LAYER_ROWS = ("per_layer_model_projection.weight",)  # [layers * size, hidden]
# Tensors numbered by layer, but not under it, and the layer that number 0 stands for (Inkling 2).
LISTS_APART = {r"(.*attn_res\.attn_queries\.)([0-9]+)": 1, r"(.*attn_res\.mlp_queries\.)([0-9]+)": 0}
SHARED = ("shared_transf.", "shared_transformer.")  # Zamba: one block used by many layers, stored under the first of them
ADAPTER_LIST = "_adapter_list."


def follow_depth(parent: Stack, child: Stack, kept: list[int], config: dict[str, Any]) -> Stack:
    """Return `child` with everything that depends on a layer's place put right; `config` is the child's, and may be changed.

    Raises:
        DowncycleError: a tensor that the family needs at a place where no kept layer has one.
    """
    for own in OWN:
        _settle_own(own, parent, child)
    if kept != list(range(len(parent.layers))):
        _check_computed(child)
    _move_shared_blocks(parent, child, kept, config)
    depth = len(parent.layers)
    rest = dict(child.rest)
    for name, tensor in rest.items():
        if name.endswith(PER_LAYER_COLUMNS):
            rest[name] = take_blocks(tensor, kept, depth, axis=1, name=name)
        elif name.endswith(PER_LAYER_ROWS):
            rest[name] = take_blocks(tensor, kept, depth, axis=0, name=name)
    for pattern, first in LISTS_APART.items():
        rest = _renumber_list(rest, re.compile(pattern), first, kept)
    return replace(child, rest=rest)


def take_blocks(tensor: Tensor, kept: list[int], count: int, axis: int, name: str) -> Tensor:
    """Return the kept blocks of a matrix that is `count` equal blocks of rows (axis 0) or of columns (axis 1)."""
    span, bits = tensor.data, DTYPE_BITS[tensor.dtype]
    if not isinstance(span, Span) or len(tensor.shape) != 2 or tensor.shape[axis] % count or bits % 8:
        raise DowncycleError(f"{name}: {tensor.dtype} {list(tensor.shape)} is not {count} blocks, one a layer; it cannot be cut")
    rows, row_bytes = (1, span.length) if axis == 0 else (tensor.shape[0], span.length // max(tensor.shape[0], 1))
    block = row_bytes // count
    blocks = tuple(replace(span, start=span.start + index * block, length=block) for index in kept)  # where these are rows

    def by_block() -> Iterator[bytes]:
        for part in blocks:
            yield from part.chunks()

    def by_row() -> Iterator[bytes]:
        some = max(1, CHUNK // max(row_bytes, 1))
        for row in range(0, rows, some):
            data = memoryview(replace(span, start=span.start + row * row_bytes, length=min(some, rows - row) * row_bytes).read())
            starts = range(0, len(data), row_bytes)
            yield b"".join(data[at + index * block : at + (index + 1) * block] for at in starts for index in kept)

    size = tensor.shape[axis] // count * len(kept)
    shape = (size, tensor.shape[1]) if axis == 0 else (tensor.shape[0], size)
    return Tensor(tensor.dtype, shape, by_block, blocks) if axis == 0 else Tensor(tensor.dtype, shape, by_row, (span,))


def _renumber_list(rest: dict[str, Tensor], pattern: re.Pattern[str], first: int, kept: list[int]) -> dict[str, Tensor]:
    renumbered: dict[str, Tensor] = {}
    for name, tensor in rest.items():
        match = pattern.fullmatch(name)
        layer = int(match[2]) + first if match else -1
        names = [f"{match[1]}{new - first}" for new, old in enumerate(kept) if old == layer and new >= first] if match else [name]
        renumbered |= dict.fromkeys(names, tensor)
    return renumbered


def _settle_own(own: Own, parent: Stack, child: Stack) -> None:
    """Where a tensor belongs to one place, see that the child has it there and nowhere else."""
    place = own.place % len(parent.layers)
    there = [_named(layer, own.name) for layer in parent.layers]
    if not any(there) or any(bool(keys) == own.has for at, keys in enumerate(there) if at != place) or bool(there[place]) != own.has:
        return
    for at, layer in enumerate(child.layers):
        wanted = own.has == (at == own.place % len(child.layers))
        keys = _named(layer, own.name)
        if wanted and not keys and own.mend == "zeros":
            layer.update({key: _zeros(parent.layers[place][key]) for key in there[place]})
        elif not wanted and keys and own.mend == "drop":
            for key in keys:
                del layer[key]
        elif wanted != bool(keys):
            raise DowncycleError(f"this family cannot be cut like this: {own.name.rstrip('.')} stands in the way: {own.why}")


def _check_computed(child: Stack) -> None:
    for stored, beside in COMPUTED.items():
        if any(all(_named(layer, name) for name in beside) and not _named(layer, stored) for layer in child.layers):
            raise DowncycleError(
                f"this family cannot be cut like this: {stored} stands in the way: it depends on a layer's number and num_hidden_layers, "
                "and the files do not hold it; load the model with transformers and save it, which stores it"
            )


def _move_shared_blocks(parent: Stack, child: Stack, kept: list[int], config: dict[str, Any]) -> None:
    """Store each shared block under the first layer that uses it, and its adapters under their users' new ordinals.

    The k-th layer that uses a shared block uses block k mod n. A cut may leave a sequence of blocks that no such rule gives; then a
    block is stored more than once, and n (`num_mem_blocks`) is the period of the sequence.
    """
    owners = [at for at, layer in enumerate(parent.layers) if _named(layer, SHARED)]
    if not owners:
        return
    users = [at for at, layer in enumerate(parent.layers) if _named(layer, ("mamba_decoder.",))]
    ordinals = [users.index(old) for old in kept if old in users]
    places = [at for at, old in enumerate(kept) if old in users]
    blocks = [ordinal % len(owners) for ordinal in ordinals]
    period = next((n for n in range(1, len(blocks)) if all(blocks[i] == blocks[i % n] for i in range(len(blocks)))), len(blocks))
    for layer in child.layers:
        for key in _named(layer, SHARED):
            del layer[key]
    for at in range(period):
        source = parent.layers[owners[blocks[at]]]
        shared = {key: source[key] for key in _named(source, SHARED)}
        child.layers[places[at]].update({key: tensor for key, tensor in shared.items() if ADAPTER_LIST not in key[1]})
        for user in range(at, len(blocks), period):
            child.layers[places[at]].update(_adapters(shared, ordinals[user], user))
    if "num_mem_blocks" in config:
        config["num_mem_blocks"] = max(period, 1)


def _adapters(shared: Layer, old: int, new: int) -> Layer:
    """The adapters of one user of a shared block, under its new ordinal."""
    mine: Layer = {}
    for (stem, name), tensor in shared.items():
        before, word, after = name.partition(ADAPTER_LIST)
        ordinal, _, rest = after.partition(".")
        if word and ordinal == str(old):
            mine[stem, f"{before}{word}{new}.{rest}"] = tensor
    return mine


def _named(layer: Layer, beginning: str | tuple[str, ...]) -> list[tuple[str, str]]:
    return [key for key in layer if key[1].startswith(beginning)]


def _zeros(like: Tensor) -> Tensor:
    return Tensor(like.dtype, like.shape, lambda: [bytes(tensor_nbytes(like.dtype, like.shape))])

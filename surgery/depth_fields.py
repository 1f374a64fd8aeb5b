"""What each config field that follows depth must say after a cut.

Every rule is a pure function of the parent's section of the config: it returns the child's value, or refuses and names the field.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

from .errors import DowncycleError

Config = dict[str, Any]


class Cut(NamedTuple):
    """What is done to the depth of one config section: of so many layers, these are kept, in this order."""

    layers: int
    kept: list[int]

    def where(self, pattern: Any) -> list[Any]:
        """Return the kept part of what has one entry per layer of the parent; entries beyond the depth stay (multi-token prediction)."""
        return [pattern[layer] for layer in self.kept] + list(pattern[self.layers :])

    @property
    def is_prefix(self) -> bool:
        """Whether every layer keeps its number."""
        return self.kept == list(range(len(self.kept)))


Rule = Callable[[Config, str, Cut], Any]


def refuse(parent: Config, name: str, why: str) -> NoReturn:
    """Raise the error of a family that cannot be cut as asked."""
    value = f" = {str(parent[name])[:60]}" if parent.get(name) is not None else ""
    raise DowncycleError(f"{parent.get('model_type', 'this model')} cannot be cut like this: {name}{value} {why}")


def sliced(parent: Config, name: str, cut: Cut) -> Any:
    """One entry per layer, in a list or a string; a single value says the same of all layers."""
    value = parent[name]
    if not isinstance(value, list | tuple | str):
        return value
    if len(value) < cut.layers:
        refuse(parent, name, f"has not one entry for each of the {cut.layers} layers")
    kept = cut.where(value)
    return "".join(kept) if isinstance(value, str) else kept


def by_index(parent: Config, name: str, cut: Cut) -> Config:
    """Values under the numbers of the layers that deviate."""
    given = {int(layer): value for layer, value in parent[name].items()}
    return {str(new): given[old] for new, old in enumerate(cut.kept) if old in given}


def index_list(parent: Config, name: str, cut: Cut) -> list[int]:
    """The numbers of the layers that are of some kind."""
    return [new for new, old in enumerate(cut.kept) if old in parent[name]]


def index_list_from_one(parent: Config, name: str, cut: Cut) -> list[int]:
    """The numbers of the layers that are of some kind, where the first layer is number 1."""
    return [new + 1 for new, old in enumerate(cut.kept) if old + 1 in parent[name]]


def nested(parent: Config, name: str, cut: Cut) -> Any:
    """A dictionary that holds such fields in turn."""
    value = parent[name]
    return {**value, **cut_fields(value, cut, NESTED_RULES)} if isinstance(value, dict) else value


def prefix_count(parent: Config, name: str, cut: Cut) -> int:
    """How many layers from the first on are of some kind."""
    pattern = [old < parent[name] for old in cut.kept]
    if any(pattern[sum(pattern) :]):
        refuse(parent, name, "counts the first layers, which are no longer the first")
    return sum(pattern)


def window_count(parent: Config, name: str, cut: Cut) -> int:
    """Where `layer_types` was derived from; says nothing more once that is a list."""
    return sum(old < parent[name] for old in cut.kept)


def shared_kv(parent: Config, name: str, cut: Cut) -> int:
    """How many layers up to the last reuse the keys and values of the last layer of their kind before them."""
    first = cut.layers - parent[name]
    sharing = [old >= first for old in cut.kept]
    count = sum(sharing)
    if any(sharing[: len(sharing) - count]):
        refuse(parent, name, "counts the last layers, which are no longer the last")
    kinds = parent.get("layer_types") or [""] * cut.layers
    own = cut.kept[: len(cut.kept) - count]
    for layer in cut.kept[len(own) :]:
        source, now = (next((old for old in reversed(before) if kinds[old] == kinds[layer]), None) for before in (range(first), own))
        if source != now:
            refuse(parent, name, f"makes layer {layer} use the keys and values of layer {source}; keep both or neither")
    return count


def dense_layers(parent: Config, name: str, cut: Cut) -> list[int]:
    """Layers without experts: those listed and, with a sparse step, those off it; any pattern can be listed."""
    step, listed = parent.get("decoder_sparse_step") or 1, parent[name]
    return [new for new, old in enumerate(cut.kept) if old in listed or (old + 1) % step]


def every_layer(parent: Config, name: str, cut: Cut) -> int:
    """The sparse step that leaves all to `mlp_only_layers`."""
    return 1 if parent.get("mlp_only_layers") is not None else unless_prefix(parent, name, cut)


def unless_prefix(parent: Config, name: str, cut: Cut) -> Any:
    """A field that gives layers their kind by their number."""
    if not cut.is_prefix and parent[name]:
        refuse(parent, name, "depends on a layer's number, so each must keep its own; keep the first layers only")
    return parent[name]


def repeated(parent: Config, name: str, cut: Cut) -> list[Any]:
    """A pattern repeated down the layers; written out it says anything."""
    pattern = parent[name]
    return cut.where((list(pattern) * cut.layers)[: cut.layers])


def counted_types(parent: Config, name: str, cut: Cut) -> list[Any]:
    """GPT-Neo's `[[pattern, times], ...]`."""
    return [[cut.where([kind for pattern, times in parent[name] for _ in range(times) for kind in pattern]), 1]]


def period(parent: Config, name: str, cut: Cut) -> int:
    """Jamba: every n-th layer from an offset on is of some kind; sayable wherever the kept layers recur regularly."""
    if parent.get("layers_block_type"):
        return parent[name]  # Zamba's list says it
    stem = name.rpartition("_")[0]
    every, offset = parent[f"{stem}_period"], parent[f"{stem}_offset"]
    pattern = [old % every == offset for old in cut.kept]
    for new, start in [(every, offset)] + [(n, at) for n in range(1, len(pattern) + 2) for at in range(n)]:
        if pattern == [at % new == start for at in range(len(pattern))]:
            return new if name.endswith("_period") else start
    return refuse(parent, name, "makes a kind of layer recur regularly, and the kept ones do not")


def expert_range(parent: Config, name: str, cut: Cut) -> int:
    """Ernie 4.5: experts in every n-th layer from a start to an end."""
    start, end, step = (parent[f"moe_layer_{part}"] for part in ("start_index", "end_index", "interval"))
    last = cut.layers - 1 if end == -1 else end
    sparse = [new for new, old in enumerate(cut.kept) if (old + 1) % step == 0 and start <= old <= last]
    if not sparse:
        return {"moe_layer_start_index": len(cut.kept), "moe_layer_end_index": len(cut.kept), "moe_layer_interval": 1}[name]
    for every in (step, *range(1, len(cut.kept) + 1)):
        if sparse == [at for at in range(sparse[0], sparse[-1] + 1) if (at + 1) % every == 0]:
            return {"moe_layer_start_index": sparse[0], "moe_layer_end_index": sparse[-1], "moe_layer_interval": every}[name]
    return refuse(parent, "moe_layer_interval", "makes the layers with experts recur regularly, and the kept ones do not")


def residual_blocks(parent: Config, name: str, cut: Cut) -> int:
    """Inkling 2: every n-th layer, from the first on, opens a block."""
    opens = [old % parent[name] == 0 for old in cut.kept]
    if cut.kept[0] != 0 or 0 in cut.kept[1:]:
        refuse(parent, name, "opens the first block with layer 0, the only one that attends to no earlier block; keep it first")
    for every in (parent[name], *range(1, len(opens) + 1)):
        if opens == [at % every == 0 for at in range(len(opens))]:
            return every
    return refuse(parent, name, "makes every n-th layer open a block, and the kept ones do not recur so")


def ordinal_list_from_one(parent: Config, name: str, cut: Cut) -> list[int]:
    """Qwen4: layers with an embedding whose hashes depend on its place in this list."""
    listed = [old + 1 for old in cut.kept if old + 1 in parent[name]]
    if listed != parent[name][: len(listed)]:
        refuse(parent, name, "gives each such layer hashes by its place in the list; drop them from the last on")
    return index_list_from_one(parent, name, cut)


def full_first(parent: Config, name: str, cut: Cut) -> list[str]:
    """Whether a layer has an indexer of its own ("full") or uses that of the last layer that has."""
    kinds = cut.where(parent[name])
    if kinds[0] != "full":
        refuse(parent, name, f"makes layer {cut.kept[0]} use an earlier layer's indexer; begin with a layer that has its own")
    return kinds


def residual_scale(parent: Config, name: str, cut: Cut) -> float:
    """MiniCPM: every residual is scaled by this over the root of the depth, which must stay what it was, to the last bit of a float32."""
    scale, root = parent[name] / math.sqrt(cut.layers), math.sqrt(len(cut.kept))
    guess = scale * root
    near = (guess, math.nextafter(guess, math.inf), math.nextafter(guess, 0))
    best = min(near, key=lambda value: abs(value / root - scale))
    if struct.pack("f", best / root) != struct.pack("f", scale):
        refuse(parent, name, f"cannot be scaled to {len(cut.kept)} layers exactly")
    return best


FIELD_RULES: dict[str, Rule] = {
    # one entry per layer
    **dict.fromkeys(("layer_types", "layers_block_type", "mlp_layer_types", "no_rope_layers", "layer_rope_theta"), sliced),
    **dict.fromkeys(("num_attention_heads_per_layer", "activation_sparsity_pattern", "attention_layers", "attn_layers"), sliced),
    **dict.fromkeys(("intermediate_size", "num_experts", "moe_topk", "moe_layer_freq"), sliced),  # a list in some families
    **dict.fromkeys(("hybrid_override_pattern", "hybrid_layer_pattern", "compress_ratios", "index_topk_pattern"), sliced),
    "indexer_types": full_first,
    "block_types": repeated,
    "attention_types": counted_types,
    # numbers of layers
    **dict.fromkeys(("moe_layers", "cross_attention_layers", "attn_layer_indices", "full_attn_idxs"), index_list),
    **dict.fromkeys(("local_layer_ids", "hybrid_layer_ids"), index_list),
    "mlp_only_layers": dense_layers,
    "ple_layer_ids": ordinal_list_from_one,
    "per_layer_config": by_index,
    **dict.fromkeys(("linear_attn_config", "sparse_attention_config"), nested),
    # counts and periods
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "num_hash_layers", "dense_mlp_idx"), prefix_count),
    "max_window_layers": window_count,
    "num_kv_shared_layers": shared_kv,
    "decoder_sparse_step": every_layer,
    **dict.fromkeys(("attn_layer_period", "attn_layer_offset", "expert_layer_period", "expert_layer_offset"), period),
    **dict.fromkeys(("moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval"), expert_range),
    "n_layers_per_attn_res_block": residual_blocks,
    # numbers in formulas
    "scale_attn_by_inverse_layer_idx": unless_prefix,
    "scale_depth": residual_scale,
}
NESTED_RULES: dict[str, Rule] = {
    **dict.fromkeys(("full_attn_layers", "kda_layers"), index_list_from_one),
    "sparse_attention_freq": sliced,
}


def cut_fields(parent: Config, cut: Cut, rules: dict[str, Rule] = FIELD_RULES) -> Config:
    """Return what the fields of one config section that follow depth say after a cut."""
    child: Config = {}
    for name, rule in rules.items():
        if parent.get(name) is not None:
            try:
                child[name] = rule(parent, name, cut)
            except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError):
                refuse(parent, name, "is not what this field holds in any model known here")
    return child

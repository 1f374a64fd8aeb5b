"""Which config fields follow depth, family by family, and what each must say after a cut.

Works on config dictionaries alone: knows no tensors and reads no files. FAMILIES.md is the proof, family by family.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any, NamedTuple

from .errors import DowncycleError

Config = dict[str, Any]

DEPTH_FIELDS = ("decoder_layers", "num_decoder_layers", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "decoder")


class Cut(NamedTuple):
    """What is done to the depth of one config section."""

    layers: int
    kept: list[int]

    def where(self, pattern: list[Any]) -> list[Any]:
        """Return the kept part of a list that has one entry per layer of the parent."""
        return [pattern[layer] for layer in self.kept]


def num_layers(config: Config) -> int:
    """Return the number of decoder layers that a config states."""
    section = next(_sections(config), None)
    if section is None:
        raise DowncycleError(f"config.json of {config.get('model_type', 'an unnamed model type')} states no depth ({', '.join(DEPTH_FIELDS)})")
    return section[_depth_field(section)]


def cut_config(config: Config, kept: list[int]) -> Config:
    """Return the config of a model of which only these layers are left, in this order.

    Raises:
        DowncycleError: no config of this family can say what is left; names the field that stands in the way.
    """
    child = deepcopy(config)
    depth = num_layers(config)
    for section in _sections(child):
        if section[_depth_field(section)] != depth:
            continue
        cut = Cut(depth, kept)
        for name, rule in FIELD_RULES.items():
            if section.get(name) is not None:
                rule(section, name, cut)
        section[_depth_field(section)] = len(kept)
    return child


def _sections(config: Config) -> Iterator[Config]:
    """Yield the parts of a config that describe the text decoder: the outermost first."""
    if _depth_field(config):
        yield config
    for name in TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _sections(config[name])


def _depth_field(section: Config) -> str:
    return next((name for name in DEPTH_FIELDS if type(section.get(name)) is int), "")


# What a field says, and so what becomes of it. Each rule changes the section in place.


def sliced(section: Config, name: str, cut: Cut) -> None:
    """One entry per layer."""
    value = section[name]
    if not isinstance(value, list) or len(value) < cut.layers:
        raise _stands_in_the_way(section, name, f"has not one entry for each of the {cut.layers} layers")
    section[name] = cut.where(value)


def index_list(section: Config, name: str, cut: Cut) -> None:
    """The numbers of the layers that are of some kind."""
    section[name] = [new for new, old in enumerate(cut.kept) if old in section[name]]


def prefix_count(section: Config, name: str, cut: Cut) -> None:
    """How many layers from the first on are of some kind."""
    pattern = [old < section[name] for old in cut.kept]
    count = sum(pattern)
    if any(pattern[count:]):
        raise _stands_in_the_way(section, name, "counts the first layers, which are no longer the first")
    section[name] = count


def suffix_count(section: Config, name: str, cut: Cut) -> None:
    """How many layers up to the last are of some kind."""
    pattern = [old >= cut.layers - section[name] for old in cut.kept]
    count = sum(pattern)
    if any(pattern[: len(pattern) - count]):
        raise _stands_in_the_way(section, name, "counts the last layers, which are no longer the last")
    section[name] = count


Rule = Callable[[Config, str, Cut], None]
FIELD_RULES: dict[str, Rule] = {
    **dict.fromkeys(("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "layer_rope_theta", "indexer_types"), sliced),
    **dict.fromkeys(("mlp_only_layers", "moe_layers", "cross_attention_layers", "full_attn_idxs"), index_list),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), prefix_count),
    "num_kv_shared_layers": suffix_count,
}


def _stands_in_the_way(section: Config, name: str, why: str) -> DowncycleError:
    return DowncycleError(f"{section.get('model_type', 'this model')} cannot be cut like this: {name} = {str(section[name])[:60]} {why}")


def renumber_modules(value: Any, stem: str, moved: dict[int, list[int]]) -> Any:
    """Renumber the layers in the module names of a quantiser's config; names of dropped layers go.

    Args:
        stem: last word before the layer's number in tensor names, like "layers".
        moved: the new numbers of each kept layer.
    """
    if isinstance(value, dict):
        return {new: renumber_modules(item, stem, moved) for key, item in value.items() for new in _names(key, stem, moved)}
    if isinstance(value, list):
        names = [new for item in value for new in (_names(item, stem, moved) if isinstance(item, str) else [item])]
        return [renumber_modules(item, stem, moved) if isinstance(item, dict | list) else item for item in names]
    return value


def _names(name: str, stem: str, moved: dict[int, list[int]]) -> list[str]:
    """Return what one module name (or pattern) becomes: one name per new number, or none."""
    match = re.search(rf"(?:^|[.:^]){re.escape(stem)}(\\?\.)([0-9]+)(?![0-9])(?!\]|\||\))", name)
    if not match:
        if re.search(rf"{re.escape(stem)}\\?\.[(\[]", name):
            raise DowncycleError(f"quantization_config names layers by the pattern {name!r}, which cannot be renumbered; list the names in it")
        return [name]
    before, number, after = name[: match.start(2)], match[2], name[match.end(2) :]
    if after.startswith("*"):  # "layers.1*" also means layers 10 to 19
        return [f"{before}{new}{match[1]}*" for old, news in moved.items() if str(old).startswith(number) for new in news]
    return [f"{before}{new}{after}" for new in moved.get(int(number), [])]

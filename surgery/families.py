"""What the config of any model family must say after a cut.

Works on config dictionaries, and asks the family's config class in transformers what a config leaves out: knows no tensors. FAMILIES.md
is the proof, family by family.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from functools import lru_cache
from pathlib import Path
from typing import Any

from .depth_fields import FIELD_RULES, Config, Cut, cut_fields, index_list, refuse
from .errors import DowncycleError

DEPTH_FIELDS = ("decoder_layers", "num_decoder_layers", "num_layers_per_stack", "num_hidden_layers", "n_layer", "n_layers", "num_layers")
OWN_DEPTH_FIELD = {"longcat_flash": "num_layers"}  # its num_hidden_layers counts sublayers
MULTIPLES = {"hrm_text": "num_hidden_layers", "longcat_flash": "num_hidden_layers", "xlstm": "num_blocks"}  # of the depth
TEXT_SECTIONS = ("text_config", "llm_config", "language_config", "decoder", "global_config")
# Families whose layers compute with their own number: what no config field enters, and so no config can say.
NUMBER_FORMULAS = {"beam": "the scale of its residuals", "diffllama": "lambda_init"}
WITHOUT_ATTENTION = ("linear_attention", "conv", "mamba", "recurrent", "moe", "mlp")  # kinds of layers of hybrid families
CONV1D = ("clvp", "clvp_decoder", "decision_transformer", "gpt2", "imagegpt", "openai-gpt")  # transformers' Conv1D: weights [in, out]
OWN_CACHE = ("minimax",)  # hybrids whose cache counts tokens without an attention layer
# Families whose config has no field that follows depth: nothing need be asked of transformers, which takes seconds to import.
UNIFORM = frozenset((
    "apertus", "arcee", "aria_text", "biogpt", "bitnet", "bloom", "codegen", "cohere", "ctrl", "dbrx", "doge", "ernie4_5", "falcon",
    "flex_olmo", "gemma", "glm", "glm4", "gpt_bigcode", "gpt_neox", "gpt2", "gptj", "granite", "granitemoe", "granitemoeshared",
    "helium", "hunyuan_v1_dense", "hyperclovax", "internlm3", "iquestcoder", "jais2", "jetmoe", "llama", "minimax_m2", "ministral3",
    "mistral", "mixtral", "mpt", "nanochat", "nemotron", "olmo", "olmo2", "olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "rwkv",
    "seed_oss", "solar_open", "stablelm", "starcoder2", "xglm", "youtu",
))  # fmt: skip
Where = tuple[str, ...]


def num_layers(config: Config) -> int:
    """Return the number of decoder layers that a config states, or leaves to its class."""
    stated = [section[field] for _, section in _sections(config) if (field := _depth_field(section))]
    if not stated:
        known = read_config(config)
        stated = [depth for path, _ in _sections(config) if (depth := _depth_by_class(_at(known, path)))]
    if not stated:
        raise DowncycleError(
            f"config.json of {config.get('model_type', 'an unnamed model type')} states no depth ({', '.join(DEPTH_FIELDS)})"
        )
    return stated[0]


def cut_config(config: Config, kept: list[int]) -> Config:
    """Return the config of a model of which only these layers are left, in this order.

    Raises:
        DowncycleError: no config of this family can say what is left; names the field that stands in the way.
    """
    child = deepcopy(config)
    cut = Cut(num_layers(config), kept)
    known = None if config.get("model_type") in UNIFORM else read_config(config)
    if known is None and config.get("model_type") not in UNIFORM and not config.get("auto_map"):
        raise DowncycleError(
            f"model type {config.get('model_type')!r}: the installed transformers does not know it, or refuses its config.json, so nothing "
            "says what follows depth in it; upgrade transformers, or mend config.json"
        )
    for path, section in _sections(child):
        stated = section.get(_depth_field(section)) or _depth_by_class(_at(known, path))
        if stated == cut.layers:
            _cut_section(section, _at(known, path), cut, config.get("model_type", ""))
    if known is not None:
        _check_kinds(known, child, cut)
    return child


def is_native(config: Config) -> bool:
    """Whether transformers has this family itself, and so needs no code that comes with a model."""
    if config.get("model_type") in UNIFORM:
        return True
    with _quiet_transformers() as config_classes:
        return config.get("model_type") in config_classes


def read_config(config: Config) -> Any:
    """Return a config as its family's class in transformers reads it; None where there is no such class, or it refuses."""
    try:
        return _read(json.dumps(config))
    except Exception:  # noqa: BLE001 - each class has its own way to refuse
        return None


def _sections(config: Config, path: Where = ()) -> Iterator[tuple[Where, Config]]:
    """Yield the parts of a config that may describe the text decoder, the outermost first, with where they stand."""
    yield path, config
    for name in TEXT_SECTIONS:
        if isinstance(config.get(name), dict):
            yield from _sections(config[name], (*path, name))


def _depth_field(section: Config) -> str:
    names = (OWN_DEPTH_FIELD.get(str(section.get("model_type")), ""), *DEPTH_FIELDS)
    return next((name for name in names if type(section.get(name)) is int), "")


def _depth_by_class(known: Any) -> int:
    return next((value for name in DEPTH_FIELDS if type(value := getattr(known, name, None)) is int), 0)


def _cut_section(section: Config, known: Any, cut: Cut, model_type: str) -> None:
    """Change one section in place; what it leaves to its class is taken from there and spelled out."""
    spelled_out = known.to_dict() if known is not None else {}
    left_out = {name: spelled_out[name] for name in FIELD_RULES if section.get(name) is None and spelled_out.get(name) is not None}
    left_out.pop("per_layer_config", None)  # the class derives it from the others
    parent = {"model_type": model_type, **left_out, **{name: value for name, value in section.items() if value is not None}}
    if not cut.is_prefix and (formula := NUMBER_FORMULAS.get(model_type)):
        refuse(parent, formula, "is computed from a layer's number, so each must keep its own; keep the first layers only")
    for name, value in cut_fields(parent, cut).items():
        if section.get(name) is not None or value != parent[name] or isinstance(value, list):  # lists as a whole are spelled out
            section[name] = value
    multiple = MULTIPLES.get(model_type)
    if multiple and type(section.get(multiple)) is int:
        section[multiple] = section[multiple] * len(cut.kept) // cut.layers
    field = _depth_field(parent) or next((name for name in DEPTH_FIELDS if name in spelled_out), "")
    if field and field != multiple:
        section[field] = len(cut.kept)


# What the family's config class makes of a config.


@lru_cache(maxsize=4)
def _read(text: str) -> Any:
    with _quiet_transformers() as config_classes:
        model_type = json.loads(text).get("model_type")
        if model_type not in config_classes:
            return None
        with tempfile.TemporaryDirectory(prefix="downcycle-") as folder:
            (Path(folder) / "config.json").write_text(text)
            return config_classes[model_type].from_pretrained(folder)


@contextmanager
def _quiet_transformers() -> Iterator[Any]:
    """Give the config classes by model type; importing them says that torch is missing, reading with them says all manner of things."""
    advice = os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS")
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"
    try:
        from transformers import CONFIG_MAPPING, logging

        before = logging.get_verbosity()
        logging.set_verbosity(logging.CRITICAL)
        try:
            with warnings.catch_warnings(action="ignore"):
                yield CONFIG_MAPPING
        finally:
            logging.set_verbosity(before)
    finally:
        del os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"]
        if advice is not None:
            os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = advice


def _at(known: Any, path: Where) -> Any:
    for name in path:
        known = getattr(known, name, None)
    return known


def _check_kinds(known: Any, child: Config, cut: Cut) -> None:
    """See that the class gives every kept layer the kind that it had, whichever fields say so."""
    for path, _ in _sections(child):
        _check_attention(_kinds(_at(known, path), cut.layers), child, cut)
    try:
        made = _read(json.dumps(child))
    except Exception as error:  # noqa: BLE001
        said = " ".join(str(error).split())[-200:]
        fields = ", ".join(sorted(name for _, section in _sections(child) for name in FIELD_RULES if name in section))
        raise DowncycleError(
            f"{child['model_type']} cannot be cut like this: transformers refuses what is left of {fields}: {said}"
        ) from error
    for path, _ in _sections(child):
        before, after = _kinds(_at(known, path), cut.layers), _kinds(_at(made, path), len(cut.kept))
        for name in before.keys() & after.keys():
            for new, (was, now) in enumerate(zip(cut.where(before[name]), after[name], strict=True)):
                if was != now:
                    where = f"layer {cut.kept[new]} is {was!r}, and as number {new} of {len(cut.kept)} transformers would make it {now!r}"
                    refuse({"model_type": child["model_type"]}, name, f"stands in the way: {where}")


def _check_attention(kinds: dict[str, list[Any]], child: Config, cut: Cut) -> None:
    """Transformers counts the tokens in a hybrid's cache by an attention layer: without one, cached generation is wrong."""
    name = next((name for name in ("layer_types", "layers_block_type") if name in kinds), "")
    if name and child["model_type"] not in OWN_CACHE:
        attention = [kind not in WITHOUT_ATTENTION for kind in kinds[name]]
        if any(attention) and not any(cut.where(attention)):
            refuse(
                {"model_type": child["model_type"]},
                name,
                "is left without an attention layer, by which transformers counts its cache; keep one",
            )


def _kinds(known: Any, depth: int) -> dict[str, list[Any]]:
    """Return all that a config class says layer by layer, as fields or as properties."""
    if _depth_by_class(known) != depth:
        return {}
    properties = [name for name in dir(type(known)) if isinstance(getattr(type(known), name), property)]
    kinds = {}
    for name in {*vars(known), *properties}:
        if "layer" in name and "mtp" not in name and FIELD_RULES.get(name) is not index_list:
            value = getattr(known, name, None)
            if isinstance(value, list | tuple) and len(value) == depth:
                kinds[name] = list(value)
    return kinds

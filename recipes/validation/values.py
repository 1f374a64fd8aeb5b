"""Check one value against one JSON Schema of axolotl_keys.json, as leniently as pydantic reads it, and say in words what is wrong.

Knows old names of keys and likely slips; knows no rule between two keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from typing import Any

from .axolotl_schema import load_keys

# What Axolotl's schema does not say about its own old names; the rest of them is in axolotl_keys.json.
INSTEAD = {
    "evaluation_strategy": "eval_strategy",
    "noisy_embedding_alpha": "neftune_noise_alpha",
    "dpo_beta": "rl_beta",
    "eval_table_size": "generate_samples: true",
    "eval_max_new_tokens": "generation_max_new_tokens",
    "sequence_parallel_degree": "context_parallel_size",
    "flash_attn_d512": "large_head_attention: auto",
    "liger_swiglu": "liger_glu_activation",
    "message_field_role": "message_property_mappings: {role: ...}",
    "message_field_content": "message_property_mappings: {content: ...}",
}
REFUSED = {
    "max_packed_sequence_len": "sequence_len with sample_packing: true",
    "rope_scaling": "overrides_of_model_config: {rope_scaling: ...}",
    "unsloth_lora_mlp": "lora_mlp_kernel",
    "unsloth_lora_qkv": "lora_qkv_kernel",
    "unsloth_lora_o": "lora_o_kernel",
    "dpo_use_logits_to_keep": "",
    "dpo_generate_during_eval": "",
    "dpo_norm_loss": "",
    "rpo_alpha": "",
    "s2_attention": "",
    "flash_attn_rms_norm": "",
}
MEANT = {
    ("datasets[]", "text_column"): "field",
    ("datasets[]", "train_on_split"): "split",
    ("pretraining_dataset[]", "field"): "text_column",
}
WORDS = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}
SLIP = 0.75  # how alike two keys are where one may be a slip of the pen for the other
TRUTH = {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0"}


def old_name(key: str, value: Any, path: str = "") -> list[str]:
    """A key under a former name; where it is empty or off, it says nothing and is let pass."""
    if key in REFUSED and value is not None:
        return [f"{path}{key}: Axolotl no longer takes it; " + (f"write {REFUSED[key]}" if REFUSED[key] else "take it out")]
    new = (load_keys()["instead"] | INSTEAD).get(key)
    if new is None:
        return []
    return [f"{path}{key}: an old name; write {new}"] if value not in (None, False) else []


def nearest(name: str, names: Iterable[str], likeness: float = 0.6) -> str:
    """A hint at the most similar of these names, or nothing."""
    found = get_close_matches(name, list(names), 1, likeness)
    return f"; did you mean {found[0]}?" if found else ""


def resolved(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema itself, or the one that it refers to."""
    return load_keys()["models"][schema["$ref"]] if "$ref" in schema else schema


def value_faults(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    """Check one value against one JSON Schema, in the lax way of pydantic: "2e-4" is a number, 8.0 a whole one, "yes" true."""
    schema = resolved(schema)
    if "anyOf" in schema or isinstance(schema.get("type"), list):
        return _union_faults(value, schema, path)
    allowed = schema.get("enum", [schema["const"]] if "const" in schema else None)
    if allowed is not None:
        good = value in allowed and not isinstance(value, bool)
        return (
            [] if good else [f"{path}: {_shown(value)} is none of {', '.join(map(str, allowed))}{nearest(str(value), map(str, allowed))}"]
        )
    kind = schema.get("type")
    if kind is not None and not _fits(value, kind):
        return [_wrong(value, [WORDS[kind]], path)]
    if kind == "object":
        return _mapping_faults(value, schema, path)
    if kind == "array":
        return _list_faults(value, schema, path)
    return _limit_faults(value, schema, path)


def _union_faults(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    parts = schema.get("anyOf") or [{"type": kind} for kind in schema["type"]]
    found = [(value_faults(value, part, path), resolved(part)) for part in parts]
    if any(not faults for faults, _ in found):
        return []
    alike = [faults for faults, part in found if part.get("type") == ("object" if isinstance(value, dict) else "array")]
    if alike and isinstance(value, dict | list):
        return min(alike, key=len)
    choices = [name for _, part in found for name in part.get("enum", [part["const"]] if "const" in part else [])]
    kinds = [WORDS[part["type"]] for _, part in found if isinstance(part.get("type"), str) and "enum" not in part and "const" not in part]
    limits = [text for faults, part in found if _fits(value, part.get("type", "")) for text in faults]
    if limits and not choices:
        return limits
    return [
        _wrong(value, [*map(str, choices), *(kind for kind in kinds if kind != "nothing")], path) + nearest(str(value), map(str, choices))
    ]


def _wrong(value: Any, wanted: list[str], path: str) -> str:
    text = f"{', '.join(wanted[:-1])} or {wanted[-1]}" if len(wanted) > 1 else wanted[0] if wanted else "nothing"
    return f"{path}: {_shown(value)} where {text} is needed"


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "nothing", True: "true", False: "false"}[value]
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    text = str(value)
    return repr(text if len(text) < 60 else f"{text[:57]}...") if isinstance(value, str) else text


def _fits(value: Any, kind: str) -> bool:
    if kind == "number":
        return isinstance(value, int | float) or _reads(float, value)
    if kind == "integer":
        return value is not True and (
            (isinstance(value, int | float) and value == value // 1) or _reads(int, re.sub(r"\.0+$", "", str(value)))
        )
    if kind == "boolean":
        return isinstance(value, bool) or value in (0, 1) or (isinstance(value, str) and value.lower() in TRUTH)
    kinds: dict[str, type] = {"string": str, "array": list, "object": dict, "null": type(None)}
    return kind in kinds and isinstance(value, kinds[kind])


def _reads(kind: type, text: Any) -> bool:
    try:
        return isinstance(text, str) and kind(text) is not None
    except ValueError:
        return False


def _mapping_faults(value: dict[Any, Any], schema: dict[str, Any], path: str) -> list[str]:
    if "properties" in schema:
        parts = schema["properties"]
        faults = [text for key, inner in value.items() for text in _member_faults(str(key), inner, parts, path)]
        return faults + [f"{path}.{key}: missing" for key in schema.get("required", []) if key not in value]
    inside = schema.get("additionalProperties")
    if isinstance(inside, dict):
        return [text for key, inner in value.items() for text in value_faults(inner, inside, f"{path}.{key}")]
    return list(_texts_for_numbers(value, path))


def _member_faults(key: str, value: Any, parts: dict[str, Any], path: str) -> list[str]:
    place = re.sub(r"\d+", "", path)
    bare = key.removeprefix("fsdp_")
    if place == "fsdp_config" and bare != key and key not in parts and bare in parts:
        return [f"{path}.{key}: an old name; write {bare}"]
    if key in parts:
        return old_name(key, value, f"{path}.") or value_faults(value, parts[key], f"{path}.{key}")
    meant = MEANT.get((place, key))
    hint = f"; did you mean {meant}?" if meant else nearest(key, parts, SLIP)
    return [f"{path}.{key}: Axolotl has no such key here and would drop it silently{hint}"]


def _texts_for_numbers(value: Any, path: str) -> Iterator[str]:
    """Values that Axolotl hands on as they are: there YAML 1.1's `1e-5` stays a text and fails in the middle of a run."""
    if isinstance(value, dict | list) and path != "optim_args":
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts_for_numbers(inner, f"{path}.{key}" if isinstance(value, dict) else f"{path}[{key}]")
    elif isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value):
        meant = float(value)
        spelt = repr(meant) if "." in repr(meant) else repr(meant).replace("e", ".0e")
        yield f"{path}: YAML reads {value} as text, and nothing makes a number of it; write {int(meant) if meant % 1 == 0 else spelt}"


def _list_faults(value: list[Any], schema: dict[str, Any], path: str) -> list[str]:
    if len(value) < schema.get("minItems", 0) or len(value) > schema.get("maxItems", len(value)):
        least, most = schema.get("minItems", 0), schema.get("maxItems")
        return [f"{path}: {len(value)} entries where {least if most == least else f'at least {least}'} are needed"]
    inside = schema.get("prefixItems") or [schema.get("items", {})] * len(value)
    return [text for number, inner in enumerate(value) for text in value_faults(inner, inside[number], f"{path}[{number}]")]


def _limit_faults(value: Any, schema: dict[str, Any], path: str) -> list[str]:
    if "pattern" in schema and not re.search(schema["pattern"], value):
        return [f"{path}: {_shown(value)} does not match {schema['pattern']}"]
    if schema.get("type") not in ("number", "integer"):
        return []
    low, high = schema.get("minimum"), schema.get("maximum")
    above, below = schema.get("exclusiveMinimum"), schema.get("exclusiveMaximum")
    tests = [
        (low is not None and float(value) < (low or 0), f"at least {low}"),
        (high is not None and float(value) > (high or 0), f"at most {high}"),
        (above is not None and float(value) <= (above or 0), f"more than {above}"),
        (below is not None and float(value) >= (below or 0), f"less than {below}"),
    ]
    return [f"{path}: {_shown(value)} where {text} is needed" for wrong, text in tests if wrong]

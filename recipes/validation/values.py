"""Check one value against one JSON Schema of axolotl_keys.json, as leniently as pydantic reads it, and say in words what is wrong.

Knows no rule between two keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from .axolotl_schema import load_keys
from .names import MEANT, SLIP, nearest, old_name

WORDS = {
    "string": "text",
    "number": "a number",
    "integer": "a whole number",
    "boolean": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}
FEW = 12  # names that a line may list
TRUTH = {"true", "false", "yes", "no", "on", "off", "t", "f", "y", "n", "1", "0"}


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
        names = [str(name) for name in allowed]
        return [] if good else [f"{path}: {_shown(value)} is none of {', '.join(_few(names, str(value)))}{nearest(str(value), names)}"]
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
    plain = [part for _, part in found if isinstance(part.get("type"), str) and "enum" not in part and "const" not in part]
    kinds = [f"text like {part['pattern']}" if "pattern" in part else WORDS[part["type"]] for part in plain]
    limits = [text for faults, part in found if _fits(value, part.get("type", "")) for text in faults]
    if limits and not choices:
        return limits
    names = [str(name) for name in choices]
    wanted = [*_few(names, str(value)), *(kind for kind in kinds if kind != "nothing")]
    return [_wrong(value, wanted, path) + nearest(str(value), names)]


def _few(names: Sequence[str], name: str) -> list[str]:
    """These names where they are few; else the most similar to one, and how many more there are."""
    if len(names) <= FEW:
        return list(names)
    some = get_close_matches(name, names, 3, 0) or list(names[:3])
    return [*some, f"{len(names) - len(some)} others"]


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
    if not key.strip():
        return [f"{path}: holds a key without a name; name it or take it out"]
    place = re.sub(r"\d+", "", path)
    bare = key.removeprefix("fsdp_")
    if place == "fsdp_config" and key not in parts and bare in parts:
        return value_faults(value, parts[bare], f"{path}.{key}")
    if value is None and key not in parts:
        return []
    if key in parts:
        return old_name(key, value, f"{path}.") or value_faults(value, parts[key], f"{path}.{key}")
    meant = MEANT.get((place, key))
    hint = f"; did you mean {meant}?" if meant else nearest(key, parts, SLIP)
    said = "there is no such key here" if path.startswith("downcycle_") else "Axolotl has no such key here and would drop it silently"
    return [f"{path}.{key}: {said}{hint}"]


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

"""Check the keys and the kinds of values of an Axolotl config, which Axolotl itself drops silently or half checks.

Knows the schema in axolotl_keys.json only; whether keys fit together is for conflicts.py. Imports neither Axolotl nor torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from .axolotl_schema import load_keys
from .names import SLIP, doubled, key_hint, nearest, old_name
from .own_plugins import OWN
from .values import resolved, value_faults

OURS = "downcycle."  # how the names of this package's plugins begin


def check_keys(config: dict[str, Any]) -> list[str]:
    """Name every key that Axolotl does not know, no longer reads or gives another kind of value, at all levels.

    An unknown key without a value says nothing and is let pass. Keys of plugins are accepted where the plugin is listed. With a plugin
    that is neither Axolotl's nor downcycle's, an unknown top-level key may be the plugin's: only what looks like a slip is named.
    """
    keys = load_keys()
    faults = list(_plugin_faults(config))
    schemas = _schemas_of_plugins(config)
    known = keys["models"]["AxolotlInputConfig"]["properties"] | {name: part for schema in schemas for name, part in schema.items()}
    for key, value in config.items():
        if not isinstance(key, str):
            faults.append(f'{key}: not text; write "{key}" or take it out')
        elif not key.strip():
            faults.append(f'"{key}": a key without a name; write the name of an Axolotl key, or take it out')
        elif key in known:
            replaced = [] if key == "fsdp" and config.get("fsdp_config") else old_name(key, value)
            faults += replaced or list(_top_faults(config, key, value, known[key]))
        elif value is not None:
            faults += old_name(key, value) or list(_stranger(config, key, known))
    faults += doubled(config)
    for key in keys["models"]["AxolotlInputConfig"]["required"]:
        if config.get(key) is None and not any(fault.startswith(f"{key}:") for fault in faults):
            faults.append(f"{key}: missing; Axolotl needs it")
    return list(dict.fromkeys(faults))


def plugins_of(config: dict[str, Any]) -> list[str]:
    """The plugins that a config lists, as written."""
    listed = config.get("plugins")
    return [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []


def other_plugins(config: dict[str, Any]) -> list[str]:
    """Those of them that come neither with Axolotl nor with downcycle."""
    return [name for name in plugins_of(config) if not name.startswith(("axolotl.", OURS))]


def _plugin_faults(config: dict[str, Any]) -> Iterator[str]:
    keys = load_keys()
    for name in plugins_of(config):
        full = _full_name(name)
        if full in keys["plugins"] or full.startswith(tuple(f"{package}." for package in keys["unread"])):
            continue
        if "." not in name:
            yield f"plugins: {name} is no dotted path of a class, like package.module.Class"
        elif full.startswith("axolotl."):
            yield f"plugins: Axolotl has no plugin {name}{nearest(name, keys['plugins'], 0.5)}"
        elif full.startswith(OURS) and full not in OWN:
            yield f"plugins: downcycle has no plugin {name}{nearest(name, OWN, 0.5)}"


def _full_name(plugin: str) -> str:
    """Axolotl looks for a plugin that it cannot import among its own integrations."""
    inside = f"axolotl.integrations.{plugin}"
    return inside if inside in load_keys()["plugins"] else plugin


def _foreign(config: dict[str, Any]) -> bool:
    known = load_keys()["plugins"]
    return any(_full_name(name) not in known and not name.startswith(OURS) for name in plugins_of(config))


def _schemas_of_plugins(config: dict[str, Any]) -> list[dict[str, Any]]:
    keys = load_keys()
    models = [keys["plugins"].get(_full_name(name)) for name in plugins_of(config)]
    ours = [OWN[name] for name in plugins_of(config) if name in OWN]
    return ours + [keys["models"][model]["properties"] for model in models if model]


def _stranger(config: dict[str, Any], key: str, known: dict[str, Any]) -> Iterator[str]:
    keys = load_keys()
    owners = [plugin for plugin, model in keys["plugins"].items() if model and key in keys["models"][model]["properties"]]
    owners += [plugin for plugin, properties in OWN.items() if key in properties]
    if owners:
        yield f"{key}: needs plugin {min(owners, key=len)} under plugins"
    elif key.startswith("downcycle_"):
        yield f"{key}: downcycle has no such key{nearest(key, [name for properties in OWN.values() for name in properties], SLIP)}"
    elif not _foreign(config) or get_close_matches(key, known, 1, 0.9):
        yield f"{key}: Axolotl has no such key and would drop it silently{key_hint(key, known)}"


def _top_faults(config: dict[str, Any], key: str, value: Any, schema: dict[str, Any]) -> Iterator[str]:
    if (
        key in ("base_model_config", "tokenizer_config")
        and value is None
        or key == "datasets"
        and value is None
        and "pretraining_dataset" in config
    ):
        yield f"{key}: empty, which crashes Axolotl; give a value or take it out"
    elif key in ("micro_batch_size", "gradient_accumulation_steps") and value is None:
        yield f"{key}: empty, which crashes Axolotl; give a whole number or take it out"
    elif key in ("datasets", "test_datasets") and isinstance(value, list) and value:
        for number, entry in enumerate(value):
            yield from value_faults(entry, _entry_schema(config, key, entry, schema), f"{key}[{number}]")
    else:
        yield from value_faults(value, schema, key)


def _entry_schema(config: dict[str, Any], key: str, entry: Any, schema: dict[str, Any]) -> dict[str, Any]:
    """Which kind of entry Axolotl makes of one: training entries are SFTDataset unless `rl` or the type says otherwise."""
    kind = str(entry.get("type")) if isinstance(entry, dict) else ""
    if kind == "_synthetic":
        return {"$ref": "SyntheticDataset"}
    kinds = [part["$ref"] for part in resolved(_arrays(schema)[0]["items"])["anyOf"]]
    if config.get("rl") or kind.startswith("stepwise"):
        models = load_keys()["models"]
        return {"type": "object", "properties": {name: {} for other in kinds for name in models[other]["properties"]}}
    return {"$ref": "SFTDataset"} if key == "datasets" else {"anyOf": [{"$ref": kind} for kind in kinds]}


def _arrays(schema: dict[str, Any]) -> list[dict[str, Any]]:
    return [part for part in schema.get("anyOf", [schema]) if part.get("type") == "array"]

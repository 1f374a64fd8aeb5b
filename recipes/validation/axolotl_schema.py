"""The keys that Axolotl's config accepts, as one file that can be read where Axolotl is not installed.

`python -m downcycle.recipes.validation.axolotl_schema --write` reads the installed Axolotl and writes axolotl_keys.json: names, types and
allowed values, in JSON Schema, and nothing of its texts. Judges no config.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ...surgery.errors import DowncycleError

KEYS_FILE = Path(__file__).with_name("axolotl_keys.json")
KEPT = ("$ref", "anyOf", "type", "enum", "const", "pattern", "items", "prefixItems", "additionalProperties", "properties", "required")
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "minItems", "maxItems")
OTHER_SPELLINGS = {"float8_e4m3fn": ["fp8", "float8"]}  # taken by Axolotl's own converter beside the enum's names


@cache
def load_keys() -> dict[str, Any]:
    """Read axolotl_keys.json; the caller must not change what it is given.

    Returns:
        models: JSON Schemas by class name, AxolotlInputConfig first; plugins: {dotted class: class name of its keys, or null};
        instead: {deprecated key: what to write}; names: lists that Axolotl keeps outside its schema; axolotl: version.
    """
    return json.loads(KEYS_FILE.read_text(encoding="utf-8"))


def read_axolotl() -> dict[str, Any]:
    """Read the installed Axolotl's config models, plugins and name lists into the form of axolotl_keys.json."""
    try:
        from importlib.metadata import version

        from axolotl.utils.schemas.config import AxolotlInputConfig
    except ImportError as error:
        raise DowncycleError(f"Axolotl is not installed ({error}); try: pip install 'downcycle[train]'") from error
    models = _models_of(AxolotlInputConfig)
    plugins: dict[str, str | None] = {}
    for name, arguments in sorted(_plugins()):
        plugins[name] = arguments.__name__ if arguments else None
        models |= _models_of(arguments) if arguments else {}
    return {
        "axolotl": version("axolotl"),
        "models": models,
        "plugins": plugins,
        "unread": [name for name in _packages() if not any(plugin.startswith(f"{name}.") for plugin in plugins)],
        "instead": dict(_replacements(AxolotlInputConfig)),
        "names": _names(),
    }


def _models_of(model: Any) -> dict[str, Any]:
    """Schemas of a pydantic model and of all models and enums inside it, by class name; every alias is a property of its own."""
    from pydantic.json_schema import GenerateJsonSchema

    class Names(GenerateJsonSchema):
        """Write enum members by the names that a YAML file uses, and leave defaults out."""

        def enum_schema(self, schema: Any) -> Any:
            names = [member.value if isinstance(member.value, str) else member.name for member in schema["members"]]
            return {"enum": names + [other for name in names for other in OTHER_SPELLINGS.get(name, [])]}

        def default_schema(self, schema: Any) -> Any:
            return self.generate_inner(schema["schema"])

    found = model.model_json_schema(by_alias=False, schema_generator=Names)
    schemas = {model.__name__: found} | found.pop("$defs", {})
    for schema in schemas.values():
        for properties in [schema["properties"]] if "properties" in schema else []:
            _add_aliases(properties, _class_named(model, schema.get("title", "")))
    return {name: _slim(schema) for name, schema in schemas.items()}


def _class_named(model: Any, name: str) -> Any:
    return model if model.__name__ == name else next((kind for kind in _nested(model, set()) if kind.__name__ == name), None)


def _nested(model: Any, seen: set[Any]) -> Iterator[Any]:
    """All pydantic models among the field types of a model, at any depth."""
    from typing import get_args

    waiting = [field.annotation for field in model.model_fields.values()]
    while waiting:
        kind = waiting.pop()
        waiting += get_args(kind)
        if hasattr(kind, "model_fields") and kind not in seen:
            seen.add(kind)
            yield kind
            yield from _nested(kind, seen)


def _add_aliases(properties: dict[str, Any], model: Any) -> None:
    for name, field in model.model_fields.items() if model else ():
        other = field.validation_alias
        for alias in getattr(other, "choices", [other] if isinstance(other, str) else []):
            properties.setdefault(alias, properties[name])


def _slim(schema: Any) -> Any:
    """Keep of a JSON Schema what says names, types and values; shorten references to the class name."""
    if not isinstance(schema, dict):
        return schema
    slim = {key: schema[key] for key in (*KEPT, *BOUNDS) if key in schema and not (key == "additionalProperties" and schema[key] is True)}
    if "$ref" in slim:
        slim["$ref"] = slim["$ref"].rsplit("/", 1)[1]
    for key in ("anyOf", "prefixItems"):
        if key in slim:
            slim[key] = [_slim(part) for part in slim[key]]
    for key in ("items", "additionalProperties"):
        if key in slim:
            slim[key] = _slim(slim[key])
    if "properties" in slim:
        slim["properties"] = {name: _slim(part) for name, part in slim["properties"].items()}
    if set(slim) == {"anyOf"} and all(set(part) == {"type"} for part in slim["anyOf"]):
        return {"type": [part["type"] for part in slim["anyOf"]]}
    return slim


def _packages() -> list[str]:
    import pkgutil

    import axolotl.integrations

    return [f"axolotl.integrations.{module.name}" for module in pkgutil.iter_modules(axolotl.integrations.__path__) if module.ispkg]


def _plugins() -> Iterator[tuple[str, Any]]:
    """Every plugin class of Axolotl under each of its import paths, with the model of its keys."""
    import importlib

    from axolotl.integrations.base import BasePlugin

    for package in _packages():
        for name in (package, f"{package}.plugin", f"{package}.plugins"):
            try:
                module = importlib.import_module(name)
            except ImportError:
                continue
            for title, kind in list(vars(module).items()):
                if isinstance(kind, type) and issubclass(kind, BasePlugin) and kind is not BasePlugin:
                    where = kind().get_input_args()
                    parent, _, model = (where or "").rpartition(".")
                    yield f"{name}.{title}", getattr(importlib.import_module(parent), model) if where else None


def _replacements(model: Any) -> Iterator[tuple[str, str]]:
    """What to write in place of each deprecated key, taken from the names in its deprecation note."""
    from axolotl.utils.schemas.enums import LEGACY_ATTN_FLAG_TO_IMPL

    for name, field in model.model_fields.items():
        if isinstance(field.deprecated, str):
            quoted = [text for text in re.findall(r"`([^`]+)`", field.deprecated) if text != name]
            yield name, quoted[0] if quoted else re.findall(r"[Uu]se (\w+)", field.deprecated)[0]
    for name, value in LEGACY_ATTN_FLAG_TO_IMPL.items():
        yield name, f"attn_implementation: {value}"


def _names() -> dict[str, list[str]]:
    """Lists that Axolotl and transformers look values up in after validation."""
    import transformers
    from axolotl.utils.data.wrappers import DATASET_HANDLERS
    from axolotl.utils.schemas import enums
    from transformers.trainer_optimizer import _BITSANDBYTES_OPTIMIZERS
    from transformers.trainer_utils import HubStrategy, IntervalStrategy, SaveStrategy, SchedulerType
    from transformers.training_args import OptimizerNames

    public = dir(transformers)
    heads = (
        r"Auto(Model|ModelFor)\w*$|\w+(ForCausalLM|ForConditionalGeneration|ForSequenceClassification|ForTokenClassification|LMHeadModel)$"
    )
    return {
        "attn_implementation": sorted(enums.CANONICAL_ATTN_IMPLS),
        "packing_attention": sorted(enums.ATTN_IMPLS_SUPPORTING_PACKING | enums.ATTN_IMPLS_WITHOUT_DTYPE_CAST),
        "custom_optimizer": sorted(item.value for item in enums.CustomSupportedOptimizers),
        "bitsandbytes_optimizer": sorted(item.value for item in _BITSANDBYTES_OPTIMIZERS),
        "optimizer": sorted({item.value for item in OptimizerNames} | {item.value for item in enums.CustomSupportedOptimizers}),
        "lr_scheduler": sorted({item.value for item in SchedulerType} | {"one_cycle", "rex"}),  # the last two: SchedulerMixin
        "dataset_type": sorted(set(DATASET_HANDLERS) | set(_strategies())),
        "eval_strategy": [item.value for item in IntervalStrategy],
        "save_strategy": [item.value for item in SaveStrategy],
        "hub_strategy": [item.value for item in HubStrategy],
        "model_type": [*(name for name in public if re.match(heads, name)), "MambaLMHeadModel"],
        "layer_class": _layer_classes(),
        "tokenizer_type": [name for name in public if re.match(r"\w+Tokenizer(Fast)?$", name)],
    }


def _layer_classes() -> list[str]:
    """Names of the classes that FSDP may wrap, from the text of the models' code: importing hundreds of models takes minutes."""
    import axolotl
    import transformers

    trees = [(transformers, "models/*/modeling_*.py"), (axolotl, "**/*model*.py")]
    files = [file for package, pattern in trees for file in Path(package.__path__[0]).glob(pattern)]
    return sorted({name for file in files for name in re.findall(r"^class (\w+(?:Layer|Block))\(", file.read_text("utf-8"), re.M)})


def _strategies() -> Iterator[str]:
    """Values of a dataset's `type`: modules of prompt strategies, and module.function for their further loaders."""
    import importlib
    import pkgutil

    import axolotl.prompt_strategies as strategies

    for module in pkgutil.walk_packages(strategies.__path__, f"{strategies.__name__}."):
        name = module.name.removeprefix(f"{strategies.__name__}.")
        if name.split(".")[0] in ("base", "dpo", "kto", "orpo", "ebft"):  # only under `rl`, whose types are not listed
            continue
        loaders = [loader for loader in vars(importlib.import_module(module.name)) if re.match(r"load(_|$)", loader)]
        yield from (f"{name}.{loader}" for loader in loaders)
        yield from [name] if "load" in loaders else []


def render(keys: dict[str, Any]) -> str:
    """The text of axolotl_keys.json: one line for each key of a model, so that a new Axolotl shows as a readable difference."""
    return _lines(keys, 4) + "\n"


def _lines(value: Any, depth: int, indent: str = "") -> str:
    if not isinstance(value, dict) or not value or not depth:
        return json.dumps(value, sort_keys=True)
    rows = [f"{indent} {json.dumps(key)}: {_lines(value[key], depth - 1, indent + ' ')}" for key in sorted(value)]
    return "{\n" + ",\n".join(rows) + f"\n{indent}}}"


if __name__ == "__main__":
    import sys

    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m downcycle.recipes.validation.axolotl_schema --write")
    try:
        KEYS_FILE.write_text(render(read_axolotl()), encoding="utf-8")
    except DowncycleError as error:
        sys.exit(f"downcycle: {error}")

"""The metadata of a GGUF file that no architecture decides: name, type, what the model was made from. Knows the writer's types."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from gguf import GGML_QUANT_VERSION, GGUFValueType, GGUFWriter

from ..checkpoint import Checkpoint

PHI3, PHI3_TOKENS = re.compile(r"(phi)-?(3)", re.IGNORECASE), {"</s>", "<unk>", "<s>", "<|endoftext|>"}


def general_fields(model: Checkpoint, file_type: int, tokens: list[str]) -> dict[str, Any]:
    """Return name, type and base model by key.

    llama.cpp trims spaces as Phi-3's tokenizer does in every model whose name tells of it, and breaks off where these tokens are missing:
    the name of another one is spelled otherwise.
    """
    name = PurePath(model.name).name or model.name
    if model.config.get("model_type") != "phi3" or not set(tokens) >= PHI3_TOKENS:
        name = PHI3.sub(r"\1_\2", name)
    fields = {"type": "model", "name": name, "file_type": file_type}
    fields["quantization_version"] = GGML_QUANT_VERSION
    if base := _base(model.lineage):
        fields |= {"base_model.count": 1, "base_model.0.name": PurePath(base).name}
        if "/" in base and not base.startswith((".", "/", "~")) and base.count("/") == 1:
            fields["base_model.0.repo_url"] = f"https://huggingface.co/{base}"
    return fields


def add_fields(writer: GGUFWriter, start: str, fields: Mapping[str, Any]) -> None:
    """Add metadata to a file, under keys that begin with `start`."""
    for key, value in fields.items():
        if isinstance(value, list):
            writer.add_array(f"{start}.{key}", value)
        else:
            writer.add_key_value(f"{start}.{key}", value, _type(value))


def _type(value: Any) -> GGUFValueType:
    if isinstance(value, bool):
        return GGUFValueType.BOOL
    if isinstance(value, int):
        return GGUFValueType.UINT32
    return GGUFValueType.FLOAT32 if isinstance(value, float) else GGUFValueType.STRING


def _base(lineage: Mapping[str, Any]) -> str:
    """Return the model that all began with."""
    base = ""
    while lineage:
        base, lineage = str(lineage.get("parent") or base), lineage.get("parent_lineage") or {}
    return base

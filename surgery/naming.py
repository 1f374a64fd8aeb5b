"""The default name of a child: its parent's, with the size replaced (Meta-Llama-3-8B -> Llama-3-6B)."""

from __future__ import annotations

import re
from pathlib import Path

from .checkpoint import Checkpoint

SIZE = re.compile(r"(?<![A-Za-z0-9.])(\d+(?:\.\d+)?)([BbMm])(?![A-Za-z0-9])")
UNITS = {"b": 1e9, "m": 1e6}


def child_name(parent: Checkpoint, child: Checkpoint) -> str:
    """Name a child after its parent, the size replaced by its own; without a size in the name, the layers are counted.

    The size is the child's parameters where the parent's name speaks of its own, and scaled by what is left where it does not (packed
    weights, "8x7B").
    A name that begins with "Meta-Llama" begins with "Llama" in the child, as the Llama licence asks of derived models.
    """
    name = re.sub(r"^Meta-(?=Llama)", "", folder_name(parent.name))
    match = SIZE.search(name)
    if not match:
        return f"{name}-{child.num_layers}L"
    stated = float(match[1]) * UNITS[match[2].lower()]
    plain = 2 / 3 < parent.num_elements / max(stated, 1) < 3 / 2
    size = child.num_elements if plain else stated * child.num_elements / parent.num_elements
    renamed = name[: match.start()] + format_size(size, upper=match[2].isupper()) + name[match.end() :]
    return renamed if renamed != name else f"{name}-{child.num_layers}L"


def folder_name(path: str) -> str:
    """Return the last part of a folder's path or of a Hub id, also where it is spelt `.` or `..`."""
    name = Path(path).name
    return name if name not in ("", "..") else Path(path).expanduser().resolve().name


def format_size(count: float, upper: bool = True) -> str:
    """Write a number of parameters as model names do: 6B, 1.2B, 450M."""
    unit, letter = (1e9, "B") if count >= 0.9995e9 else (1e6, "M")
    text = f"{count / unit:.0f}" if count >= 2.95 * unit else f"{count / unit:.1f}".removesuffix(".0")
    return text + (letter if upper else letter.lower())

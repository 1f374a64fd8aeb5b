"""Prove that the files of a folder hold what a Checkpoint value says, byte for byte.

Reads both sides in pieces; decodes no weight.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .checkpoint import DEMO, Checkpoint, Span, Tensor, file_bytes, open_checkpoint
from .errors import DowncycleError
from .filenames import LINEAGE
from .layers import keep_layers
from .sources import Progress


@dataclass(frozen=True)
class Proof:
    """What was compared and found equal."""

    parent: str
    layers: list[int]
    tensors: int
    files: int
    bytes: int


def verify(
    folder: str | Path, src: str | Path | None = None, *, trust_remote_code: bool = False, progress: Progress = lambda count: None
) -> Proof:
    """Make the checkpoint again, as a value, from its parent and downcycle.json, and compare the folder with it.

    Args:
        src: the parent, where it is not where downcycle.json says.
        progress: called with the number of bytes of each step.
    Raises:
        DowncycleError: anything differs; names the first differences.
    """
    found = open_checkpoint(folder, trust_remote_code=trust_remote_code)
    expected = rebuild(found, src, trust_remote_code=trust_remote_code)
    faults = list(differences(expected, found, progress))
    if faults:
        more = f", and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise DowncycleError(f"{folder} is not what {LINEAGE} says: {'; '.join(faults[:3])}{more}. Cut it again")
    lineage = expected.lineage
    return Proof(lineage["parent"], lineage["layers"], len(expected.tensors), len(expected.files) + 1, expected.nbytes)


def rebuild(made: Checkpoint, src: str | Path | None = None, *, trust_remote_code: bool = False) -> Checkpoint:
    """Return the value that a checkpoint was written from, by its downcycle.json."""
    if not made.lineage:
        raise DowncycleError(f"{made.name}: holds no {LINEAGE}; only a folder that downcycle wrote can be verified")
    try:
        parent_name, revision, layers, fingerprint, rule = (
            made.lineage[key] for key in ("parent", "revision", "layers", "fingerprint", "rule")
        )
    except KeyError as error:
        raise DowncycleError(f"{made.name}/{LINEAGE}: lacks {error}; it was changed, or is another version's") from error
    if not isinstance(parent_name, str) or not isinstance(layers, list) or not all(type(layer) is int for layer in layers):
        raise DowncycleError(f"{made.name}/{LINEAGE}: names no parent or no list of layers; it was changed")
    where: str | Path = parent_name if revision or parent_name == DEMO else Path(parent_name)  # a folder is never looked for on the Hub
    if src is not None and str(src) != parent_name:
        where, revision = src, None
    try:
        parent = open_checkpoint(where, revision, trust_remote_code=trust_remote_code)
    except DowncycleError as error:
        if src is not None:
            raise
        raise DowncycleError(f"{error}. If the parent of {made.name} lies elsewhere now, give it with --src") from error
    if parent.fingerprint != fingerprint:
        raise DowncycleError(f"{parent.name} is not the parent of {made.name}: config or tensors differ; give the parent with --src")
    return keep_layers(parent, layers, rule)


def differences(expected: Checkpoint, found: Checkpoint, progress: Progress = lambda count: None) -> Iterator[str]:
    """Yield each way in which two checkpoints differ, in words; nothing where they are equal."""
    for key in sorted({*expected.config, *found.config}):
        wanted, there = _spell(expected.config, key), _spell(found.config, key)
        if wanted != there:
            yield f"config.json: {key} is {there[:60]} instead of {wanted[:60]}"
    for path, data in expected.files.items():
        if path not in found.files:
            yield f"{path} is missing"
        elif file_bytes(data) != file_bytes(found.files[path]):
            yield f"{path} differs"
    for path in (path for path in found.files if path not in expected.files):
        yield f"{path} does not belong"
    for name in (name for name in found.tensors if name not in expected.tensors):
        yield f"tensor {name} does not belong"
    for name, tensor in expected.tensors.items():
        if name not in found.tensors:
            yield f"tensor {name} is missing"
        elif fault := _differ(tensor, found.tensors[name], progress):
            yield f"tensor {name} {fault}"


def _spell(config: dict[str, Any], key: str) -> str:
    """Spell a value as JSON: there true is not 1, and NaN is NaN."""
    return json.dumps(config[key], sort_keys=True) if key in config else "absent"


def _differ(expected: Tensor, found: Tensor, progress: Progress) -> str:
    if (expected.dtype, expected.shape) != (found.dtype, found.shape):
        return f"is {found.dtype} {list(found.shape)} instead of {expected.dtype} {list(expected.shape)}"
    assert isinstance(found.data, Span)
    done = 0
    for chunk in expected.chunks():
        if found.data.source.read(found.data.path, found.data.start + done, len(chunk)) != chunk:
            return f"differs between bytes {done} and {done + len(chunk)}"
        done += len(chunk)
        progress(len(chunk))
    return ""
